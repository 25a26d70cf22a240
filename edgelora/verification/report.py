"""The checks of one verification, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["ok", "FAIL", "not checked", "shown"]
Part = Literal["file", "adapter", "quantization", "together"]

PARTS: Mapping[Part, str] = {
    "file": "Is it the right one?",
    "adapter": "What the adapter path costs",
    "quantization": "What quantization costs (the base alone)",
    "together": "Base and adapter together",
}


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        name: a word for it, as in the JSON.
        title: what a person reads.
        value: what was found, in words; `number` is the same for programs.
        limit: what passes, in words.
        outcome: "shown" where nothing is asked of a value.
        note: which tensor, where tokens part, or why it was not checked.
    """

    part: Part
    name: str
    title: str
    value: str
    limit: str
    outcome: Outcome
    note: str = ""
    number: float | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        recorded: under what the certificate was made; empty without one.
        notices: what a person should know beside the checks.
    """

    adapter: str
    base: str
    backend: str
    checks: tuple[Check, ...]
    recorded: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.outcome == "FAIL")

    @property
    def unchecked(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.outcome == "not checked")

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"passed": self.passed, "failed": list(self.failed), **asdict(self)}
