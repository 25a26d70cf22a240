"""How the next token is chosen: one frozen record shared by chat, batch, the contract and the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from edgelora.errors import SettingsError

MAX_LAST_N = 65536


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults suit open chat.

    Attributes:
        temperature: 0 is greedy; higher is more varied.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probabilities reach p (nucleus sampling, arXiv:1904.09751).
        min_p: drop tokens less likely than this fraction of the best one (arXiv:2407.01082).
        repeat_penalty: divide the logits of recent tokens by this; 1 changes nothing.
        presence_penalty: subtract this from the logits of recent tokens.
        frequency_penalty: subtract this from the logits of recent tokens, once for each time they occur.
        repeat_last_n: how many tokens, of the prompt and the reply, are recent; 0 turns the three penalties off.
        logit_bias: token id to what is added to its logit before anything else.
        grammar: GBNF (llama.cpp's notation) that the reply follows; stop strings and max_tokens still end it.
        schema: a JSON schema that the reply fits, unless a stop string or max_tokens ends it before; {} is any object.
        logprobs: report each token's log probability, and those of this many likeliest candidates; None reports none.
        seed: same seed, same text; None takes a new one each time.
        max_tokens: end after this many generated tokens; None goes on to the end of the context.
        stop: strings that end the reply; they are not part of it.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    grammar: str | None = None
    schema: Mapping[str, Any] | None = field(default=None, hash=False)
    logprobs: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _by_token(self.logit_bias))
        object.__setattr__(self, "schema", _copied(self.schema))
        problems = [
            f"{name} is {getattr(self, name)!r}, expected {wanted}" for name, ok, wanted in self._checks() if not ok
        ]
        hint = ""
        if not problems:
            problems = list(self._grammar_problems())
            hint = "Of a schema, leave out what is not supported, and check the replies for it." if self.schema else ""
        if problems:
            raise SettingsError("sampling: " + "; ".join(problems), hint=hint)

    @property
    def gbnf(self) -> str | None:
        """The grammar that the reply follows: the given one, or the schema's."""
        if self.schema is None:
            return self.grammar
        from edgelora.json_grammar import grammar_of

        return grammar_of(json.dumps(self.schema))

    def _grammar_problems(self) -> Iterator[str]:
        if self.grammar is not None and self.schema is not None:
            yield "grammar and schema are both given, expected one"
        if self.grammar is not None:
            from edgelora.gbnf import problems

            yield from (f"grammar, {problem}" for problem in problems(self.grammar))
        if self.schema is not None:
            from edgelora.json_grammar import problems_of

            yield from (f"schema, {problem}" for problem in problems_of(json.dumps(self.schema)))

    def _checks(self) -> list[tuple[str, bool, str]]:
        def number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def penalty(value: float) -> bool:
            return number(value) and -2 <= value <= 2

        return [
            ("temperature", number(self.temperature) and 0 <= self.temperature <= 100, "a number from 0 to 100"),
            ("top_k", whole(self.top_k) and 0 <= self.top_k < 2**31, "a whole number from 0, below 2**31"),
            ("top_p", number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", number(self.min_p) and 0 <= self.min_p < 1, "a number from 0, below 1"),
            (
                "repeat_penalty",
                number(self.repeat_penalty) and 0.1 <= self.repeat_penalty <= 10,
                "a number from 0.1 to 10",
            ),
            ("presence_penalty", penalty(self.presence_penalty), "a number from -2 to 2"),
            ("frequency_penalty", penalty(self.frequency_penalty), "a number from -2 to 2"),
            (
                "repeat_last_n",
                whole(self.repeat_last_n) and 0 <= self.repeat_last_n <= MAX_LAST_N,
                f"a whole number from 0 to {MAX_LAST_N}",
            ),
            (
                "logit_bias",
                isinstance(self.logit_bias, dict)
                and all(whole(token) and 0 <= token < 2**31 for token in self.logit_bias)
                and all(number(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values()),
                "token ids with numbers from -100 to 100",
            ),
            ("grammar", isinstance(self.grammar, str | None), "text"),
            ("schema", isinstance(self.schema, dict | None), "a JSON schema, as a mapping"),
            (
                "logprobs",
                self.logprobs is None or (whole(self.logprobs) and 0 <= self.logprobs <= 20),
                "a whole number from 0 to 20",
            ),
            (
                "seed",
                self.seed is None or (whole(self.seed) and 0 <= self.seed < 2**32),
                "a whole number from 0, below 2**32",
            ),
            (
                "max_tokens",
                self.max_tokens is None or (whole(self.max_tokens) and self.max_tokens >= 1),
                "a whole number, 1 or more",
            ),
            (
                "stop",
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "strings that are not empty",
            ),
        ]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], defaults: Sampling | None = None) -> Sampling:
        """`defaults` (or the class's own) with `values` laid over them; None means "not given".

        `stop` may be a string or a list of strings, as in the OpenAI API.

        Raises:
            SettingsError: an unknown name or a value out of range; all problems in one message.
        """
        unknown = sorted(map(str, set(values) - set(cls.field_names())))
        if unknown:
            raise SettingsError(
                f"unknown sampling settings: {', '.join(unknown)}", hint=f"Known: {', '.join(cls.field_names())}."
            )
        given = {name: value for name, value in values.items() if value is not None}
        if "stop" in given:
            stop = given["stop"]
            given["stop"] = (
                (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
            )
        if len({"grammar", "schema"} & set(given)) == 1:  # it takes the place of the other one
            given = {"grammar": None, "schema": None, **given}
        return replace(defaults or cls(), **given)

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults, ready for JSON."""
        plain = Sampling()
        changed = {name: getattr(self, name) for name in self.field_names()}
        changed = {name: value for name, value in changed.items() if value != getattr(plain, name)}
        if "logit_bias" in changed:
            changed["logit_bias"] = {str(token): bias for token, bias in changed["logit_bias"].items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _by_token(biases: Any) -> Any:
    """Biases with whole numbers for keys, which JSON has as text; anything else as it is."""
    if not isinstance(biases, Mapping):
        return biases
    return {
        int(token)
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 12
        else token: bias
        for token, bias in biases.items()
    }


def _copied(schema: Any) -> Any:
    """A schema that nobody else can change; what is no JSON mapping as it is."""
    try:
        return json.loads(json.dumps(dict(schema), allow_nan=False)) if isinstance(schema, Mapping) else schema
    except (TypeError, ValueError, RecursionError):
        return repr(schema)
