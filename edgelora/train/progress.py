"""What a training run says while it goes on and when it is done (stdlib only: the command line draws it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrainStatus:
    """Where a run is after an optimizer step.

    Attributes:
        step, total_steps: optimizer steps done and to do, over the whole run, breaks included.
        epoch: passes through the data so far, as a fraction.
        loss: mean loss per trained token in this step, in nats.
        eval_loss: the same on the evaluation data, when it was last measured.
        steps_per_second, seconds_left: by the speed since the run began or went on, evaluation and saving included.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    steps_per_second: float
    seconds_left: float
    eval_loss: float | None = None


class TrainProgress(Protocol):
    """Where a run reports to; both are called from the thread that trains."""

    def note(self, text: str) -> None:
        """Something that a person should know: what is being loaded, rows that are cut, where a run goes on."""

    def update(self, status: TrainStatus) -> None:
        """An optimizer step is done."""


class SilentProgress:
    """For callers who do not watch."""

    def note(self, text: str) -> None:
        pass

    def update(self, status: TrainStatus) -> None:
        pass


@dataclass(frozen=True)
class TrainReport:
    """What a finished run made, and from what.

    Attributes:
        output: the PEFT folder.
        base: a folder or a hub id; `base_fingerprint` is `converters.fingerprint` of it.
        export: what the result becomes, a key of `methods.EXPORTS`.
        rows, eval_rows: training sequences after dropping and splitting.
        steps: optimizer steps of the whole run.
        loss, eval_loss: the last that were logged, in nats per trained token; of a run that ends with its best
            checkpoint, the lowest eval_loss, which `best_step` had.
        trained_parameters, total_parameters: counts of weights.
        seconds, steps_per_second: since the run began or last went on; the first includes loading, the second is 0
            where no step was left to do.
        versions: of the libraries that trained it.
        notes: what a person should know: rows cut or dropped, where the run went on.
    """

    output: Path
    base: str
    base_fingerprint: str
    method: str
    rows: int
    eval_rows: int
    steps: int
    loss: float
    eval_loss: float | None
    trained_parameters: int
    total_parameters: int
    seconds: float
    steps_per_second: float
    versions: Mapping[str, str]
    export: str = ""
    best_step: int | None = None
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The figures, as the contract keeps them beside the recipe."""
        return {name: getattr(self, name) for name in SUMMARY}


SUMMARY = (
    "rows",
    "eval_rows",
    "steps",
    "loss",
    "eval_loss",
    "trained_parameters",
    "total_parameters",
    "seconds",
    "steps_per_second",
    "versions",
    "export",
    "best_step",
)
