"""How the next token is chosen: one frozen record shared by chat, batch, the contract and the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from edgelora.errors import SettingsError


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults suit open chat.

    Attributes:
        temperature: 0 is greedy; higher is more varied.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probabilities reach p (nucleus sampling, arXiv:1904.09751).
        min_p: drop tokens less likely than this fraction of the best one (arXiv:2407.01082).
        repeat_penalty: divide the logits of the last 64 tokens by this; 1 changes nothing.
        seed: same seed, same text; None takes a new one each time.
        max_tokens: end after this many generated tokens; None goes on to the end of the context.
        stop: strings that end the reply; they are not part of it.
    """

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected {wanted}" for name, ok, wanted in self._checks() if not ok
        ]
        if problems:
            raise SettingsError("sampling: " + "; ".join(problems))

    def _checks(self) -> list[tuple[str, bool, str]]:
        def number(value: object) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool)

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

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
        return replace(defaults or cls(), **given)

    def changes(self) -> dict[str, Any]:
        """The settings that differ from the defaults, ready for JSON."""
        plain = asdict(Sampling())
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v != plain[k]}
