"""A JSON schema as GBNF, so that a reply is JSON that fits it.

Every text of the grammar fits the schema; where both cannot be had, the grammar is narrower (an object with
`properties` has no others unless `additionalProperties` is a schema or true; bounded numbers have no exponent). A
keyword that cannot be kept is refused by name: a reply that breaks its schema would be worse than an error. After
llama.cpp's common/json-schema-to-grammar.cpp, which leaves out what it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeGuard

from edgelora import gbnf
from edgelora.json_pattern import PatternError, expression_of, quoted

MAX_DEPTH = 64
MAX_STEPS = 20_000
"""Rules made, and schemas compared, for one schema: alternatives within alternatives double with every level, and a
schema may come from anybody."""
MAX_TIMES = 100_000
"""The highest minItems, maxLength ...; beyond gbnf.MAX_REPEATS, rules are chained."""

_HEX = "[0-9a-fA-F]"
_PLAIN = r'"\\\x00-\x1F\x7F'  # what a string cannot have as it is
RULES = {
    "space": r'| " " | "\n"{1,2} [ \t]{0,20}',
    "comma": 'space "," space',
    "colon": 'space ":" space',
    "char": rf'[^{_PLAIN}] | "\\" (["\\bfnrt] | "u" ([0-9a-cA-CeEfF] {_HEX}{{3}} | [dD] [0-7] {_HEX}{{2}}))',
    "plain": f"[^{_PLAIN}]",
    "whole": "[0-9] | [1-9] [0-9]{1,15}",
    "fraction": '"." [0-9]{1,16}',
    "string": r'"\"" char* "\""',
    "integer": '"-"? whole',
    "number": '"-"? whole fraction? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "key": "string",
    "pair": "key colon value",
    "comma-pair": "comma pair",
    "comma-value": "comma value",
    "object": '"{" space (pair comma-pair* space)? "}"',
    "array": '"[" space (value comma-value* space)? "]"',
    "day": '("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
    ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',
    "date": '([1-9] [0-9]{3} | "0" [0-9]{2} [1-9]) "-" day',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? zone',
    "zone": '"Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "date-time": 'date "T" time',
    "uuid": "-".join(f"{_HEX}{{{n}}}" for n in (8, 4, 4, 4, 12)).replace("-[", ' "-" ['),
}
"""The rules that all grammars share, of which each takes what it needs."""

ANNOTATIONS = frozenset(
    ("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator")
) | {"$schema", "$id", "$comment", "$defs", "definitions"}
COMBINERS = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
KEYWORDS: Mapping[str, frozenset[str]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "format", "pattern")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum")),
    "boolean": frozenset(),
    "null": frozenset(),
}
TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
"""What Python reads a JSON value of each type as; a bool is no number."""
FORMATS = ("date", "time", "date-time", "uuid")
_KNOWN = frozenset().union(*KEYWORDS.values())


def grammar_of(schema: str, converter: Callable[[Any], Converter] | None = None) -> str:
    """The GBNF of a JSON schema, which is given as JSON text, and of which `problems_of` finds nothing.

    Args:
        converter: for values that are written in another way than JSON's.
    """
    kind: Callable[[Any], Converter] = converter or Converter
    return _converted(schema, kind)[0]


def problems_of(schema: str, converter: Callable[[Any], Converter] | None = None) -> tuple[str, ...]:
    """What of a JSON schema is not supported, each with its place in it."""
    kind: Callable[[Any], Converter] = converter or Converter
    return _converted(schema, kind)[1]


@lru_cache(maxsize=64)
def _converted(schema: str, kind: Callable[[Any], Converter]) -> tuple[str, tuple[str, ...]]:
    converter = kind(json.loads(schema))
    try:
        text = converter.grammar()
    except RecursionError:
        return "", ("it is nested too deeply, or holds a name that is too long",)
    except _TooLarge:
        return "", (f"as a grammar, it takes more than {MAX_STEPS} rules and comparisons",)
    found = converter.problems or [f"as a grammar, {problem}" for problem in gbnf.problems(text)]
    return text, tuple(dict.fromkeys(found))


class _TooLarge(Exception):
    pass


class Converter:
    """One schema on its way to rules. A subclass is another way to write values.

    Attributes:
        shared: the rules that all grammars share.
        quote: GBNF of what a text stands between.
        not_plain: what a character of a key that has no rule of its own cannot be; as in a set of GBNF.
        problems: what is not supported, each with its place as a JSON pointer.
    """

    shared: ClassVar[Mapping[str, str]] = RULES
    quote: ClassVar[str] = r'"\""'
    not_plain: ClassVar[str] = _PLAIN

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._rules: dict[str, str] = {}
        self._by_ref: dict[str, str] = {}
        self._depth = self._steps = 0
        self.problems: list[str] = []

    def grammar(self) -> str:
        rule = self._shared("object") if self._root == {} else self._rule(self._root, "#")
        rules = {"root": rule, **self._rules}
        return "".join(f"{name} ::= {text}\n" for name, text in rules.items())

    def _problem(self, problem: str, at: str) -> str:
        self.problems.append(f"{problem} at {at}")
        return self._shared("null")

    def _add(self, text: str) -> str:
        """The name of a new rule."""
        self._step()
        name = f"r{len(self._rules)}"
        self._rules[name] = text.strip()
        return name

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _TooLarge

    def _shared(self, name: str) -> str:
        """The name of one of `RULES`, which comes with those it needs."""
        if name not in self._rules:
            self._rules[name] = self.shared[name]
            for needed in _words_outside_quotes(self.shared[name]):
                if needed in self.shared:
                    self._shared(needed)
        return name

    def _rule(self, schema: Any, at: str) -> str:
        """The name of the rule for a schema."""
        self._step()
        if schema is True or schema == {}:
            return self._shared("value")
        if not isinstance(schema, Mapping):
            return self._problem(f"{json.dumps(schema)} is no schema that a value can fit", at)
        if self._depth == MAX_DEPTH:
            return self._problem(f"nested deeper than {MAX_DEPTH}", at)
        self._depth += 1
        try:
            return self._rule_of_mapping(schema, at)
        finally:
            self._depth -= 1

    def _rule_of_mapping(self, schema: Mapping[str, Any], at: str) -> str:
        keywords = schema.keys() - ANNOTATIONS
        if not keywords:
            return self._shared("value")
        combiner = next((name for name in COMBINERS if name in keywords), None)
        if combiner:
            beside = keywords - {combiner} - ({"type"} if combiner in ("enum", "const") else set())
            if beside:
                return self._problem(f"{', '.join(sorted(beside))} beside {combiner}", at)
            return self._combined(combiner, schema, at)
        wanted = schema.get("type", _implied(keywords))
        if isinstance(wanted, list) and wanted:
            return self._any_of([{**schema, "type": each} for each in _each_once(wanted)], at)
        if unknown := sorted(keywords - _KNOWN - {"type"}):
            return self._problem(f"unsupported keyword {', '.join(unknown)}", at)
        if not isinstance(wanted, str) or wanted not in KEYWORDS:
            return self._problem(f"type is {wanted!r}, expected one of {', '.join(KEYWORDS)}", at)
        if wanted == "number" and (narrow := sorted(keywords & (KEYWORDS["integer"] - KEYWORDS["number"]))):
            return self._problem(f"unsupported keyword {', '.join(narrow)} of a number", at)
        makers: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
        }
        return makers[wanted](schema, at) if wanted in makers else self._shared(wanted)

    def _combined(self, combiner: str, schema: Mapping[str, Any], at: str) -> str:
        value = schema[combiner]
        if combiner == "$ref":
            return self._referred(value, at)
        if combiner in ("enum", "const"):
            types = _type_names(schema) if "type" in schema else None
            return self._literals([value] if combiner == "const" else value, types, at)
        if not isinstance(value, list) or not value:
            return self._problem(f"{combiner} is no list of schemas", at)
        if combiner == "allOf" and len(value) > 1:
            return self._problem("unsupported keyword allOf of more than one schema", at)
        if combiner == "oneOf" and not self._exclude_each_other(value):
            return self._problem("oneOf of schemas that may fit one value both (anyOf would do)", at)
        return self._any_of(value, f"{at}/{combiner}")

    def _any_of(self, schemas: Sequence[Any], at: str) -> str:
        return self._add(" | ".join(self._rule(each, f"{at}/{index}") for index, each in enumerate(schemas)))

    def _referred(self, reference: Any, at: str) -> str:
        target = self._target(reference)
        if target is None:
            return self._problem(f"$ref {json.dumps(reference)} points to nothing in the schema", at)
        if reference not in self._by_ref:
            name = self._by_ref[reference] = self._add("")  # known before its text: it may hold itself
            self._rules[name] = self._rule(target, str(reference))
        return self._by_ref[reference]

    def _target(self, reference: Any) -> Any:
        """What a `$ref` of this schema points to, None if nothing."""
        if not isinstance(reference, str) or not re.match("#(/|$)", reference):
            return None
        target = self._root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and re.fullmatch("[0-9]{1,9}", part) and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, Mapping) and part in target:
                target = target[part]
            else:
                return None
        return target

    def _literals(self, values: Any, types: Sequence[str] | None, at: str) -> str:
        listed = values if isinstance(values, list) else []
        fitting = [value for value in listed if types is None or any(is_a(value, each) for each in types)]
        if not fitting:
            return self._problem("no value fits the enum or const", at)
        texts = dict.fromkeys(self.written(value, at) for value in fitting)
        return self._add(" | ".join(map(quoted, texts)))

    def written(self, value: Any, at: str) -> str:
        """A value as the reply has it."""
        return json.dumps(value, ensure_ascii=False)

    def written_key(self, name: str, at: str) -> str:
        """The name of a property as the reply has it."""
        return json.dumps(name, ensure_ascii=False)

    def _exclude_each_other(self, schemas: Sequence[Any]) -> bool:
        return all(self._apart(one, other) for index, one in enumerate(schemas) for other in schemas[:index])

    def _apart(self, one: Any, other: Any, depth: int = 0) -> bool:
        """Whether it is plain that no value fits both."""
        self._step()
        one, other = self._resolved(one), self._resolved(other)
        if not isinstance(one, Mapping) or not isinstance(other, Mapping) or depth > 8:
            return False
        values = [_values_of(each) for each in (one, other)]
        if values[0] is not None and values[1] is not None:
            return not values[0] & values[1]
        types = [_types_of(each) for each in (one, other)]
        if types[0] and types[1] and not types[0] & types[1]:
            return True
        if types != [{"object"}, {"object"}]:
            return False
        mine, yours = (_required_properties(each) for each in (one, other))
        return any(self._apart(mine[name], yours[name], depth + 1) for name in mine if name in yours)

    def _resolved(self, schema: Any) -> Any:
        for _ in range(8):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"])
        return schema

    def _object(self, schema: Mapping[str, Any], at: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not _are_strings(required):
            return self._problem("properties is no mapping, or required no list of names", at)
        others = schema.get("additionalProperties", not properties and not required)
        unnamed = schema.get("additionalProperties", True)
        wanted = {**properties, **{name: unnamed for name in required if name not in properties}}
        if not wanted and others in (True, {}):
            return self._shared("object")
        self._shared("comma")
        pairs = [
            (
                self._pair(quoted(self.written_key(name, at)), part, f"{at}/properties/{name}"),
                name in required,
            )
            for name, part in wanted.items()
        ]
        extra = None
        if others is not False:
            extra = self._pair(self._other_key(wanted), others, f"{at}/additionalProperties")
        members, may_be_empty = self._members(pairs, extra)
        self._shared("space")
        if not members:
            return self._add('"{" space "}"')
        inner = f"({members} space)?" if may_be_empty else f"{members} space"
        return self._add(f'"{{" space {inner} "}}"')

    def _pair(self, key: str, schema: Any, at: str) -> str:
        return self._add(f"{key} {self._shared('colon')} {self._rule(schema, at)}")

    def _members(self, pairs: Sequence[tuple[str, bool]], extra: str | None) -> tuple[str, bool]:
        """The rule for what is between the braces, in the order of the schema, and whether nothing may be."""
        rest = self._add(f"({self._add(f'comma {extra}')})*") if extra else ""
        firsts: list[str] = [extra + " " + rest] if extra else []
        may_be_empty = True
        for pair, is_required in reversed(pairs):
            first = f"{pair} {rest}".strip()
            firsts = [first] if is_required else [first, *firsts]
            may_be_empty = may_be_empty and not is_required
            rest = self._add(f"comma {pair} {rest}" if is_required else f"(comma {pair})? {rest}")
        return (self._add(" | ".join(firsts)) if firsts else ""), may_be_empty

    def _other_key(self, names: Mapping[str, Any]) -> str:
        """The rule for a key that is none of `names`; without escapes, so that none can be written in another way."""
        if not names:
            return self._shared("key")
        trie: dict[str, Any] = {}
        for name in names:
            node = trie
            for character in name:
                node = node.setdefault(character, {})
            node[""] = {}
        self._shared("plain")
        return self._key_of(self._not_in(trie))

    def _key_of(self, rule: str) -> str:
        return self._add(f"{self.quote} {rule} {self.quote}")

    def _not_in(self, node: Mapping[str, Any]) -> str:
        """The rule for how a key goes on after a beginning that some names share, without becoming one of them."""
        children = {character: child for character, child in node.items() if character}
        if not children:
            return self._add("plain plain*")
        usable = {c: child for c, child in children.items() if self._is_plain(c)}
        ways = [f"[{_in_set(character)}] {self._not_in(child)}" for character, child in usable.items()]
        ways.append(f"[^{self.not_plain}{''.join(map(_in_set, usable))}] plain*")
        return self._add(" | ".join(ways if "" in node else ["", *ways]))

    def _is_plain(self, character: str) -> bool:
        return character not in '"\\' and ord(character) >= 0x20 and character != "\x7f"

    def _array(self, schema: Mapping[str, Any], at: str) -> str:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if "prefixItems" not in schema and isinstance(rest, list):  # how drafts 4 to 7 write it
            first, rest = rest, True
        bounds = self._bounds(schema, "minItems", "maxItems", at)
        if bounds is None or not isinstance(first, list):
            return self._problem("prefixItems is no list of schemas", at) if bounds else self._shared("null")
        least, most = bounds
        if first and "items" not in schema and least <= len(first):
            most = len(first) if most is None else most
        if rest is False:
            most = len(first) if most is None else min(most, len(first))
            if least > most:
                return self._problem(f"minItems {least} of at most {most} items", at)
        parts = [self._rule(each, f"{at}/prefixItems/{index}") for index, each in enumerate(first[:most])]
        self._shared("comma")
        listed = " comma ".join(parts)
        if most is None or most > len(parts):
            item, begun = self._rule(rest, f"{at}/items"), len(parts) or 1
            more = self._add(f"comma {item}")
            tail = self._times(more, max(0, least - begun), None if most is None else most - begun)
            listed = f"{listed or item} {tail}"
        if not listed:
            return self._add('"[" space "]"')
        inner = f"{listed} space" if parts or least else f"({listed} space)?"
        return self._add(f'"[" space {inner} "]"')

    def _bounds(self, schema: Mapping[str, Any], low: str, high: str, at: str) -> tuple[int, int | None] | None:
        given = {name: schema[name] for name in (low, high) if name in schema}
        least, most = given.get(low, 0), given.get(high)
        if not all(type(value) is int and 0 <= value <= MAX_TIMES for value in given.values()):
            self._problem(f"{given}: expected whole numbers from 0 to {MAX_TIMES}", at)
            return None
        if most is not None and most < least:
            self._problem(f"{low} {least} is above {high} {most}", at)
            return None
        return least, most

    def _times(self, rule: str, least: int, most: int | None) -> str:
        """A rule repeated; llama.cpp counts to 2000 only, so that more are chains."""
        size = gbnf.MAX_REPEATS // 2
        parts = [f"{rule}{{{size}}}"] * (least // size) + ([f"{rule}{{{least % size}}}"] if least % size else [])
        if most is None:
            return " ".join([*parts, f"{rule}*"])
        left = most - least
        tail = f"{rule}{{0,{left % size}}}" if left % size else ""
        for _ in range(left // size):
            tail = self._add(f"{rule}{{0,{size - 1}}} | {rule}{{{size}}} {tail}")
        return " ".join([*parts, tail]).strip()

    def _string(self, schema: Mapping[str, Any], at: str) -> str:
        lengths = schema.keys() & {"minLength", "maxLength"}
        if "pattern" in schema:
            beside = sorted(schema.keys() & {"minLength", "maxLength", "format"})
            return self._problem(f"{', '.join(beside)} beside pattern", at) if beside else self._pattern(schema, at)
        if "format" in schema:
            name = schema["format"]
            if name not in FORMATS or lengths:
                known = f"supported alone: {', '.join(FORMATS)}"
                return self._problem(f"unsupported format {json.dumps(name)} ({known})", at)
            return self._add(f"{self.quote} {self._shared(name)} {self.quote}")
        if not lengths:
            return self._shared("string")
        bounds = self._bounds(schema, "minLength", "maxLength", at)
        if bounds is None:
            return self._shared("null")
        return self._add(f"{self.quote} {self._times(self._shared('char'), *bounds)} {self.quote}")

    def _pattern(self, schema: Mapping[str, Any], at: str) -> str:
        self._shared("char")
        try:
            return self._add(rf'"\"" ({expression_of(str(schema["pattern"]))}) "\""')
        except PatternError as error:
            return self._problem(str(error), at)

    def _number(self, schema: Mapping[str, Any], at: str) -> str:
        is_integer = schema.get("type", "integer") == "integer"
        names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        given = {name: schema[name] for name in names if name in schema}
        if not given:
            return self._shared("integer" if is_integer else "number")
        if not all(type(value) is int or (type(value) is float and value.is_integer()) for value in given.values()):
            return self._problem(f"unsupported bounds of {schema.get('type')} that are not whole: {given}", at)
        low, above, high, below = (
            int(given[n]) if n in given else None for n in (names[0], names[2], names[1], names[3])
        )
        lows = [value for value in (low, None if above is None else above + 1) if value is not None]
        highs = [value for value in (high, None if below is None else below - 1) if value is not None]
        low, high = max(lows, default=-(10**15)), min(highs, default=10**15)
        if not -(10**15) <= low <= high <= 10**15:
            return self._problem(f"bounds with no whole number between them, or beyond 10**15: {given}", at)
        return self._add(" | ".join(_between(low, high, "" if is_integer else f" {self._shared('fraction')}?")))


def _between(low: int, high: int, fraction: str) -> Iterator[str]:
    """Sequences for the numbers from `low` to `high`; `fraction` follows all but the outermost, if any may."""
    if low < 0:
        for part in _magnitudes(max(1, -high), -low, fraction):
            yield f'"-" {part}'
        if fraction and high >= 0:
            yield f'"-0"{fraction}'
    if high >= 0:
        yield from _magnitudes(max(0, low), high, fraction)


def _magnitudes(low: int, high: int, fraction: str) -> Iterator[str]:
    if fraction:
        yield quoted(str(high))
        high -= 1
    for length in range(len(str(low)), len(str(max(high, 0))) + 1):
        first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        if first <= last:
            yield from (part + fraction for part in _digits(str(first), str(last)))


def _digits(low: str, high: str) -> Iterator[str]:
    """Sequences for the numbers between two of one length."""
    if len(low) == 1:
        yield f"[{low}-{high}]"
        return
    if low[0] == high[0]:
        yield from (f'"{low[0]}" {part}' for part in _digits(low[1:], high[1:]))
        return
    rest = len(low) - 1
    begin, end = int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        yield from (f'"{begin}" {part}' for part in _digits(low[1:], "9" * rest))
        begin += 1
    partial = high[1:] != "9" * rest
    if begin <= end - partial:
        yield f"[{begin}-{end - partial}] [0-9]{{{rest}}}"
    if partial:
        yield from (f'"{end}" {part}' for part in _digits("0" * rest, high[1:]))


def _words_outside_quotes(rule: str) -> list[str]:
    return re.findall(r"[a-z][a-z-]*", re.sub(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]', " ", rule))


def _implied(keywords: set[str]) -> str | None:
    """The one type that the keywords are of."""
    types = [name for name, known in KEYWORDS.items() if known & keywords]
    return "integer" if types == ["integer", "number"] else types[0] if len(types) == 1 else None


def _in_set(character: str) -> str:
    return f"\\U{ord(character):08X}"


def _are_strings(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def is_a(value: Any, name: Any) -> bool:
    """Whether a value is of a type of JSON schemas."""
    return isinstance(value, TYPES.get(name, ())) and (name == "boolean" or not isinstance(value, bool))


def _values_of(schema: Mapping[str, Any]) -> set[str] | None:
    """The values that an enum or const allows, as JSON."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    same = (int(value) if isinstance(value, float) and value.is_integer() else value for value in values)
    return {json.dumps(value, sort_keys=True) for value in same}


def _types_of(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows, a number standing for an integer too; empty where that is not plain."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {name for value in values for name in KEYWORDS if name != "integer" and is_a(value, name)}
    return {"number" if name == "integer" else name for name in _type_names(schema)}


def _type_names(schema: Mapping[str, Any]) -> list[str]:
    wanted = schema.get("type")
    return [wanted] if isinstance(wanted, str) else wanted if _are_strings(wanted) else []


def _required_properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not _are_strings(required):
        return {}
    return {name: properties[name] for name in required if name in properties}


def _each_once(values: list[Any]) -> list[Any]:
    """Without those that came before; a value may be anything that JSON has."""
    return [value for at, value in enumerate(values) if value not in values[:at]]
