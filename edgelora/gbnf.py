"""GBNF, llama.cpp's grammar notation (its grammars/README.md), read and checked before llama.cpp sees it.

llama.cpp tells what is wrong with a grammar on stderr only, and expands some grammars without end: those whose rules
begin with themselves behind something that may be empty. A grammar that passes here is neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter

MAX_LENGTH = 1 << 18
MAX_DEPTH = 100
"""Parentheses in one another: llama.cpp's parser calls itself for each."""
MAX_REPEATS = 2000
"""MAX_REPETITION_THRESHOLD, llama-grammar.cpp: a minimum above is refused there, a maximum above *taken for none*."""
MAX_STARTS = 5000
"""Ways to begin a rule: llama.cpp follows all of them at once, for every token."""
MAX_STEPS = 1_000_000
"""Steps of llama.cpp's own search for left recursion, which looks at shared rules again and again."""

_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_LEXICON = re.compile(
    rf"""(?P<space>[ \t]+|\#[^\r\n]*)
    | (?P<newline>\r\n|\r|\n)
    | (?P<literal>"(?:[^"\\]|{_ESCAPE})*")
    | (?P<set>\[\^?(?:[^\]\\]|{_ESCAPE})*\])
    | (?P<define>::=)
    | (?P<name>[A-Za-z0-9-]+)
    | (?P<repeat>[*+?]|\{{[ \t]*\d{{1,9}}[ \t]*(?:,[ \t]*(?:\d{{1,9}})?[ \t]*)?\}})
    | (?P<token>!?<\[\d{{1,9}}\]>)
    | (?P<any>\.)
    | (?P<or>\|)
    | (?P<open>\()
    | (?P<close>\))""",
    re.VERBOSE,
)
_TERMINALS = ("literal", "set", "token", "any")


@dataclass(frozen=True)
class _Word:
    kind: str
    text: str
    at: int


@dataclass(frozen=True)
class _Item:
    """A part of a sequence.

    Attributes:
        rule: the name of the rule it stands for; empty for characters.
        is_empty: it takes no character: `""`.
        most: how often at most; None has no limit.
    """

    rule: str
    at: int
    is_empty: bool = False
    least: int = 1
    most: int | None = 1


_Rules = dict[str, list[list[_Item]]]


class _Malformed(Exception):
    def __init__(self, problem: str, at: int) -> None:
        super().__init__(problem)
        self.problem, self.at = problem, at


@lru_cache(maxsize=64)
def problems(text: str) -> tuple[str, ...]:
    """What is wrong with a grammar, each with its line and column; empty for one that llama.cpp can use."""
    if not text.strip():
        return ("it is empty",)
    if len(text) > MAX_LENGTH:
        return (f"it is {len(text)} characters long; at most {MAX_LENGTH} are read",)
    try:
        text.encode("utf-8")
        reader = _Reader(text)
        found = list(_problems(reader.rules(), reader.places))
    except UnicodeEncodeError as error:
        found = [("it holds half a character", error.start)]
    except _Malformed as error:
        found = [(error.problem, error.at)]
    return tuple(f"{_place(text, at)}{problem}" for problem, at in found)


def _place(text: str, at: int) -> str:
    if at < 0:
        return ""
    line_start = text.rfind("\n", 0, at) + 1
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - line_start + 1}: "


class _Reader:
    """Text to rules; what is in parentheses becomes a rule of its own, as in llama.cpp.

    Attributes:
        places: where each rule begins.
    """

    def __init__(self, text: str) -> None:
        self._words = [word for word in _words(text) if word.kind != "space"]
        self._next = 0
        self._rules: _Rules = {}
        self.places: dict[str, int] = {}

    def rules(self) -> _Rules:
        self._skip_newlines()
        while self._word.kind != "end":
            name = self._take("name", "the name of a rule")
            if name.text in self._rules:
                raise _Malformed(f"rule {name.text} is defined twice", name.at)
            self._take("define", f"::= after {name.text}")
            self._define(name.text, name.at, depth=0)
            if self._word.kind not in ("newline", "end"):
                raise _Malformed(f"expected the end of rule {name.text}, found {self._word.text}", self._word.at)
            self._skip_newlines()
        return self._rules

    def _define(self, name: str, at: int, depth: int) -> None:
        self._rules[name], self.places[name] = [], at
        self._skip_newlines()
        self._rules[name] = self._alternatives(depth)

    @property
    def _word(self) -> _Word:
        return self._words[self._next]

    def _take(self, kind: str, wanted: str) -> _Word:
        word = self._word
        if word.kind != kind:
            raise _Malformed(f"expected {wanted}, found {word.text or 'the end'}", word.at)
        self._next += 1
        return word

    def _skip_newlines(self) -> None:
        while self._word.kind == "newline":
            self._next += 1

    def _alternatives(self, depth: int) -> list[list[_Item]]:
        found = [self._sequence(depth)]
        while self._word.kind == "or":
            self._next += 1
            self._skip_newlines()
            found.append(self._sequence(depth))
        return found

    def _sequence(self, depth: int) -> list[_Item]:
        items: list[_Item] = []
        while True:
            if depth:
                self._skip_newlines()
            word = self._word
            if word.kind == "repeat":
                if not items or items[-1].is_empty:
                    raise _Malformed(f"{word.text} has nothing before it to repeat", word.at)
                self._next += 1
                items[-1] = _repeated(items[-1], word)
            elif word.kind in (*_TERMINALS, "name", "open"):
                items.append(self._item(depth))
            else:
                return items

    def _item(self, depth: int) -> _Item:
        word = self._word
        self._next += 1
        if word.kind != "open":
            return _Item(word.text if word.kind == "name" else "", word.at, word.text in ('""', "[]", "[^]"))
        if depth == MAX_DEPTH:
            raise _Malformed(f"more than {MAX_DEPTH} parentheses in one another", word.at)
        group = f"the parentheses at {word.at}"  # no rule's name has a space
        self._define(group, word.at, depth + 1)
        self._take("close", "a )")
        return _Item(group, word.at)


def _words(text: str) -> Iterator[_Word]:
    at = 0
    while at < len(text):
        match = _LEXICON.match(text, at)
        if match is None or "\0" in match[0]:
            raise _Malformed(_unreadable(text[at:]), at)
        yield _Word(str(match.lastgroup), match[0], at)
        at = match.end()
    yield _Word("end", "", len(text))


def _unreadable(rest: str) -> str:
    if rest.startswith(('"', "[")):
        return f"{rest[0]} is not closed, or has an unknown escape behind it"
    if rest.startswith(("<", "!")):
        return "a token is written by its id, as in <[17]> or !<[17]>"
    return f"unexpected {rest[0]!r}"


def _repeated(item: _Item, word: _Word) -> _Item:
    """`item` repeated as `word` says; repetitions of repetitions multiply."""
    if word.text in "*+?":
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[word.text]
    else:
        first, comma, second = (part.strip() for part in word.text[1:-1].partition(","))
        least, most = int(first), int(second) if second else None if comma else int(first)
    if max(least, most or 0) > MAX_REPEATS:
        raise _Malformed(f"{word.text} repeats more than {MAX_REPEATS} times", word.at)
    if most is not None and most < least:
        raise _Malformed(f"{word.text} has a maximum below its minimum", word.at)
    if most is None and item.least == 0:
        raise _Malformed("what may be empty is repeated without a limit", word.at)
    total = None if most is None or item.most is None else item.most * most
    if max(item.least * least, total or 0) > MAX_REPEATS:
        raise _Malformed(f"{word.text} makes more than {MAX_REPEATS} repetitions in all", word.at)
    return _Item(item.rule, item.at, item.is_empty, item.least * least, total)


def _problems(rules: _Rules, places: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    if "root" not in rules:
        yield "no rule is named root", -1
    items = [item for alternatives in rules.values() for sequence in alternatives for item in sequence]
    undefined = [item for item in items if item.rule and item.rule not in rules]
    for item in undefined:
        yield f"rule {item.rule} is not defined", item.at
    if undefined or "root" not in rules:
        return
    empty = _empty_rules(rules)
    endless = [item for item in items if item.most is None and (item.is_empty or item.rule in empty)]
    for item in endless:
        yield "what may be empty is repeated without a limit", item.at
    if not endless:
        yield from _too_many_ways(rules, empty, places)


def _empty_rules(rules: _Rules) -> set[str]:
    """Names of the rules that may match nothing."""
    empty: set[str] = set()
    while True:
        more = {
            name
            for name, alternatives in rules.items()
            if name not in empty and any(all(_may_be_empty(item, empty) for item in each) for each in alternatives)
        }
        if not more:
            return empty
        empty |= more


def _may_be_empty(item: _Item, empty: Iterable[str]) -> bool:
    return item.is_empty or item.least == 0 or item.rule in empty


def _beginnings(sequence: Sequence[_Item], empty: set[str]) -> Iterator[_Item]:
    """The items that the first character of a sequence may belong to."""
    for item in sequence:
        yield item
        if not _may_be_empty(item, empty):
            return


def _too_many_ways(rules: _Rules, empty: set[str], places: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    begins = {
        name: [item for sequence in alternatives for item in _beginnings(sequence, empty)]
        for name, alternatives in rules.items()
    }
    graph = {name: {item.rule for item in items if item.rule} for name, items in begins.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        cycle = list(reversed(error.args[1]))
        yield f"a rule begins with itself: {' -> '.join(cycle)}", places[cycle[0]]
        return
    ways: dict[str, int] = {}
    for name in order:
        each = (ways.get(item.rule, 1) * _copies(item, empty) for item in begins[name])
        ways[name] = min(len(rules[name]) + sum(each), MAX_STEPS + 1)
    if (most := max(ways, key=ways.__getitem__)) and ways[most] > MAX_STARTS:
        yield f"rule {most} can begin in more than {MAX_STARTS} ways", places[most]
    elif sum(ways.values()) > MAX_STEPS:
        yield "its rules refer to each other in too many ways", -1


def _copies(item: _Item, empty: set[str]) -> int:
    """How often its beginning is looked at: of what may be empty, each repetition is one."""
    return max(item.least, item.most or 1, 1) if item.rule in empty else 1
