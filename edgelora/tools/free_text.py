"""GBNF for fixed texts, and for text that goes on until one of them comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def literal(text: str) -> str:
    """A text as GBNF."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def rules_without(end: str, name: Callable[[int], str]) -> Iterator[tuple[str, str]]:
    """The rules for text that does not hold `end` (Knuth, Morris and Pratt's automaton); the first is for all of it.

    Args:
        name: the name of a state's rule; the state is how much of `end` the text ends with.
    """
    for state in range(len(end)):
        known = {character: _next_state(end, state, character) for character in dict.fromkeys(end)}
        known = {character: to for character, to in known.items() if to}
        ways = [f"{literal(character)} {name(to)}" for character, to in known.items() if to < len(end)]
        others = "".join(f"\\U{ord(character):08X}" for character in known)
        yield name(state), " | ".join(['""', f"[^{others}] {name(0)}", *ways])


def _next_state(text: str, state: int, character: str) -> int:
    """How much of `text` is there after `state` characters of it and one more."""
    seen = text[:state] + character
    return next(n for n in range(min(len(seen), len(text)), -1, -1) if seen.endswith(text[:n]))
