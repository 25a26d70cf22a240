"""A run before it is run: what it trains, what memory it takes and for what, how long it takes, whether it fits.

Memory is reckoned without loading the base (`memory_plan`). Where it fits, a few real steps on the longest rows say how
fast this machine is, and what the peak really is.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.dataset import Given
from edgelora.train.extra import require_extra
from edgelora.train.folder import RunFolder
from edgelora.train.job import Job, Notes, Prepared
from edgelora.train.progress import SilentProgress, TrainProgress
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.measured_steps import MeasuredSteps
    from edgelora.train.memory_plan import Change, MemoryPlan

ROOM = 0.95  # of the free memory, so that other programs still run
FORWARD = 1 / 3  # an evaluation has no backward pass, which takes about twice the forward pass
MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        rows, longest, steps: training sequences, tokens of the longest, optimizer steps.
        memory: by part.
        libraries: bytes that the process holds before the base is loaded; on GPUs 0.
        free: bytes that are free on `device` now.
        measured: of real steps; None where it does not fit, or nobody asked.
        seconds: of all steps and evaluations, at the measured speed.
        changes: what makes it fit, in this order.
    """

    base: str
    method: str
    device: str
    rows: int
    longest: int
    steps: int
    memory: MemoryPlan
    libraries: int
    free: int
    measured: MeasuredSteps | None = None
    seconds: float | None = None
    changes: tuple[Change, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes beside the libraries: reckoned, or measured where that was more."""
        return max(self.memory.peak, self.measured.peak if self.measured else 0)

    @property
    def fits(self) -> bool:
        return self.memory.needed <= ROOM * self.free

    def to_dict(self) -> dict[str, Any]:
        """As JSON; sizes in bytes, times in seconds."""
        found = asdict(self)
        return {**found, "peak": self.peak, "fits": self.fits, "full_tuning": list(self.memory.full_tuning)}

    def memory_lines(self) -> Iterator[tuple[str, int]]:
        """Parts and their bytes, for a table."""
        memory = self.memory
        yield "weights", memory.weights
        yield "gradients", memory.gradients
        yield "optimizer", memory.optimizer
        yield "activations", memory.activations
        yield "the rest", memory.rest
        yield "peak while training", memory.training
        yield "peak while loading", memory.loading
        if memory.certificate:
            yield "peak while certifying", memory.certificate


def plan(
    data: Given,
    base: str,
    recipe: Recipe,
    *,
    eval_data: Given | None = None,
    measure: bool = True,
    progress: TrainProgress | None = None,
) -> Plan:
    """Look at a run without running it; nothing is left on the disk.

    Args:
        data, base, recipe, eval_data: as `train` takes them.
        measure: train a few steps where the run fits.

    Raises:
        MissingExtraError, SettingsError, DataFileError, ModelFileError: what `train` raises for these.
    """
    require_extra("planning")
    from edgelora.train.library_log import library_log
    from edgelora.train.run import check_settings, prepare_libraries, read_job

    check_settings(recipe, has_eval=eval_data is not None)
    prepare_libraries()
    with tempfile.TemporaryDirectory(prefix="edgelora-plan-") as folder, library_log() as log:
        run = RunFolder(Path(folder))
        job = read_job(data, base, recipe, eval_data, run)
        log.write_to(run.log_path)
        return _plan(job, Notes(progress or SilentProgress()), measure=measure)


def _plan(job: Job, said: Notes, *, measure: bool) -> Plan:
    from edgelora.train.base import placement
    from edgelora.train.measured_steps import measure_steps
    from edgelora.train.memory_plan import changes, memory_plan
    from edgelora.train.peak_memory import free_memory, memory_now
    from edgelora.train.preparation import prepare
    from edgelora.train.row_lengths import lengths

    device = placement(job.recipe).device
    prepared = prepare(job, "", said)
    found = lengths(prepared.rows)
    longest = max(found)
    said.note("reckoning the memory")
    memory = memory_plan(job.base, job.recipe, prepared.found, longest, padded=len({*found}) > 1)
    libraries, free = 0 if device == "cuda" else memory_now(device), free_memory(device)
    measured, room = None, int(ROOM * free)
    if measure and memory.needed <= room:
        said.note("training a few steps on the longest rows")
        measured = measure_steps(job, prepared)
    wanted = () if memory.needed <= room else tuple(changes(job.base, job.recipe, prepared.found, longest, room))
    return Plan(
        base=job.base.name,
        method=job.recipe.method,
        device=device,
        rows=len(found),
        longest=longest,
        steps=steps_of(job.recipe, len(found)),
        memory=memory,
        libraries=libraries,
        free=free,
        measured=measured,
        seconds=_seconds(job.recipe, prepared, measured) if measured else None,
        changes=wanted,
    )


def steps_of(recipe: Recipe, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run on so many rows, as transformers' trainer counts them."""
    if recipe.max_steps:
        return recipe.max_steps
    batches = math.ceil(rows / (recipe.batch_size * processes))
    return math.ceil(recipe.epochs * math.ceil(batches / recipe.gradient_accumulation))


def _seconds(recipe: Recipe, prepared: Prepared, measured: MeasuredSteps) -> float:
    """Of all steps and evaluations; loading, saving and the certificate come on top."""
    from edgelora.train.row_lengths import lengths, padded_tokens

    found, sequences = lengths(prepared.rows), recipe.objective_row.sequences
    steps = steps_of(recipe, len(found))
    passes = steps * recipe.batch_size * recipe.gradient_accumulation / len(found)
    tokens = passes * padded_tokens(found, recipe.batch_size, recipe.seed)
    if prepared.eval_rows is not None:
        evaluations = math.ceil(steps / (recipe.eval_steps or recipe.save_steps))  # the last step has one too
        tokens += evaluations * FORWARD * padded_tokens(lengths(prepared.eval_rows), recipe.batch_size, recipe.seed)
    return tokens * sequences / measured.tokens_per_second
