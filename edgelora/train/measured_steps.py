"""A few real steps on the longest rows: how fast they are, and how much memory they take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from edgelora.train.base import placement
from edgelora.train.job import Job, Prepared
from edgelora.train.peak_memory import peak_memory
from edgelora.train.progress import SilentProgress, TrainStatus
from edgelora.train.row_lengths import longest

WARM_UP, TIMED = 1, 2


@dataclass(frozen=True)
class MeasuredSteps:
    """What was measured.

    Attributes:
        seconds_per_step, tokens_per_second: of optimizer steps; padding counts as tokens.
        peak: bytes above what the process had before the base was loaded.
    """

    steps: int
    seconds_per_step: float
    tokens_per_second: float
    peak: int


def measure_steps(job: Job, prepared: Prepared) -> MeasuredSteps:
    """Load the base and train it for some steps, as the run would; nothing of it is kept.

    Raises:
        ModelFileError, SettingsError, EdgeloraError: what a run raises.
    """
    from edgelora.train.run import trainee_of
    from edgelora.train.trainer import build_trainer

    recipe = replace(job.recipe, max_steps=WARM_UP + TIMED + 1, save_steps=2**31, report_to=None, logging_steps=2**31)
    place, batch = placement(recipe), recipe.batch_size * recipe.gradient_accumulation
    rows, length = longest(prepared.rows, recipe.batch_size, repeated=recipe.gradient_accumulation)
    clock = _Clock()
    with peak_memory(place.device) as peak:
        trainee = trainee_of(job, replace(prepared, rows=rows, eval_rows=None), place)
        trainer, _ = build_trainer(trainee, prepared.tokenizer, rows, None, recipe, place, job.run, clock, job.base)
        trainer.add_callback(_StopAfter(WARM_UP + TIMED))
        trainer.train()
    seconds = statistics.median(clock.seconds[WARM_UP:])
    tokens = batch * length * recipe.objective_row.sequences
    return MeasuredSteps(WARM_UP + TIMED, seconds, tokens / seconds, peak.value)


class _Clock(SilentProgress):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.monotonic()

    def update(self, status: TrainStatus) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self._last = now


class _StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ends before the last step, after which the trainer would save."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self._steps:
            control.should_training_stop = True
