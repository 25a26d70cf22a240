"""A JSON schema as GBNF for values in `literals.TOKEN_QUOTES`: keys are bare, and texts end at a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from edgelora.json_grammar import RULES, Converter
from edgelora.tools.free_text import literal, rules_without
from edgelora.tools.literals import TOKEN_QUOTES

QUOTE = TOKEN_QUOTES.quotes[0]
_IN_NO_KEY = "{}[](),:<\"'\\"
_SPACES = r"\x00-\x20\x7F\x85\xA0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000"
_NOT_PLAIN = r'{}\[\](),:<"\\' + "'" + _SPACES


def _state(number: int) -> str:
    return "text" + f"-{'abcdef'[number]}" * bool(number)


class TokenQuotesConverter(Converter):
    """Texts of bounded length have no `<`, and a pattern is refused."""

    quote: ClassVar[str] = literal(QUOTE)
    not_plain: ClassVar[str] = _NOT_PLAIN
    shared: ClassVar[Mapping[str, str]] = {
        **RULES,
        **dict(rules_without(QUOTE, _state)),
        "string": f"{quote} text {quote}",
        "char": "[^<]",
        "plain": f"[^{_NOT_PLAIN}]",
        "key": "plain plain*",
    }

    def written(self, value: Any, at: str) -> str:
        match value:
            case str():
                if QUOTE in value:
                    self._problem(f"{QUOTE} in a text", at)
                return f"{QUOTE}{value}{QUOTE}"
            case dict():
                return (
                    "{" + ",".join(f"{self.written_key(k, at)}:{self.written(v, at)}" for k, v in value.items()) + "}"
                )
            case list():
                return "[" + ",".join(self.written(each, at) for each in value) + "]"
        return super().written(value, at)

    def written_key(self, name: str, at: str) -> str:
        if not name or name != name.strip() or any(c in _IN_NO_KEY or c == "\n" for c in name):
            self._problem(f"a name that cannot stand without quotes: {name!r}", at)
        return name

    def _key_of(self, rule: str) -> str:
        return rule

    def _is_plain(self, character: str) -> bool:
        return character not in _IN_NO_KEY and not character.isspace() and ord(character) > 0x20

    def _pattern(self, schema: Mapping[str, Any], at: str) -> str:
        return self._problem("unsupported keyword pattern of a text that ends at a token", at)
