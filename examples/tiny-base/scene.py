"""What every exchange is written with: the scene it happens in, and templates with choices."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

Exchange = tuple[str, str]  # what the user says, what the assistant answers


@dataclass
class Scene:
    """One conversation while it is written: what the system message and the user told so far."""

    rng: random.Random
    assistant_name: str = "Pip"
    told: dict[str, str] = field(default_factory=dict)


def say(rng: random.Random, template: str, **values: str) -> str:
    """Pick one choice of every `[this|that]`, innermost first, then put values in for `$name`."""
    while match := re.search(r"\[([^\[\]]*)\]", template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return re.sub(r"\$([a-z_]+)", lambda found: values[found[1]], template)


def ask(rng: random.Random, alternatives: str, **values: str) -> str:
    """Pick one of the alternatives written `first?|[second|third] way?`, split outside brackets, and say it."""
    depth, parts = 0, [""]
    for character in alternatives:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return say(rng, rng.choice(parts), **values)


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
