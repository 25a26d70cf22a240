"""`edgelora fit`: a base at each quantization, scored on rows as it would be served, and the best that fits picked.

One quantization at a time is on the disk: it is made beside the place of the result, scored, timed and deleted. Those
that do not fit into the memory are planned and not made. Each may also be tried with the adapter repairing it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import EdgeloraError
from edgelora.evaluation.comparison import SAME, compare
from edgelora.evaluation.metrics import Metric, make_metrics
from edgelora.evaluation.quant_bench import Bench, repaired_out
from edgelora.evaluation.quant_candidate import Candidate, SweepSettings
from edgelora.evaluation.rows import EvalRow, read_eval_rows
from edgelora.evaluation.variants import BARE


@dataclass(frozen=True)
class Sweep:
    """What was found.

    Attributes:
        candidates: the largest first.
        picked: the best that fits.
        why: one or two sentences.
        path: of the file that was written, None where none was asked for.
        adapter_path: of the adapter that repairs it, None where none does.
    """

    base: str
    adapter: str
    n_rows: int
    ram_bytes: int
    n_ctx: int
    metric: Metric
    candidates: Sequence[Candidate]
    picked: Candidate
    why: str
    seconds: float
    path: Path | None = None
    adapter_path: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "adapter": self.adapter,
            "rows": self.n_rows,
            "ram_bytes": self.ram_bytes,
            "context_tokens": self.n_ctx,
            "metric": self.metric.name,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "picked": self.picked.name,
            "why": self.why,
            "path": str(self.path) if self.path else None,
            "adapter_path": str(self.adapter_path) if self.adapter_path else None,
        }


Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and the quantization."""


def sweep(
    data: Path | str,
    base: Path,
    adapter: AdapterRef | None,
    settings: SweepSettings,
    on_progress: Progress = lambda done, total, what: None,
) -> Sweep:
    """Find the quantization of a base that answers best, with an adapter, within some memory.

    Args:
        base: a model folder, or a GGUF file that has lost nothing yet.
        adapter: a GGUF adapter or PEFT folder; None scores the base alone.

    Raises:
        SettingsError: an unknown metric, or nothing to repair with.
        EdgeloraError: nothing fits; it says what the smallest would need.
        DataFileError: rows that cannot be read, or answered.
        ConversionError, ModelFileError: a base or adapter that cannot be used.
    """
    started = time.perf_counter()
    rows = read_eval_rows(data, settings.rows)
    (metric,) = make_metrics([settings.metric], rows)
    _check_outputs(settings, adapter)
    with tempfile.TemporaryDirectory(
        prefix="edgelora-fit-", dir=settings.out.parent if settings.out else None
    ) as folder:
        bench = Bench(base, adapter, settings, Path(folder))
        candidates = bench.plan()
        fitting = [candidate for candidate in candidates if candidate.fits]
        if not fitting:
            raise _nothing_fits(candidates, settings.ram_bytes, bench.n_ctx)
        measured = _measured(bench, fitting, rows, metric, on_progress)
        made = [measured.get(candidate.name, candidate) for candidate in candidates]
        picked = _best([each for each in made if each.fits], metric)
        made = [_compared(each, picked, metric, settings) for each in made]
        paths = bench.write(picked, settings.out) if settings.out else (None, None)
    why = explain(made, picked, metric, settings.ram_bytes)
    name = adapter.name if adapter else BARE
    seconds = time.perf_counter() - started
    return Sweep(
        str(base), name, len(rows), settings.ram_bytes, bench.n_ctx, metric, made, picked, why, seconds, *paths
    )


def _check_outputs(settings: SweepSettings, adapter: AdapterRef | None) -> None:
    """Refuse early what would fail late."""
    from converters.writer import check_output

    if settings.out:
        check_output(settings.out, 0, force=settings.force)
    if settings.out and settings.repair_ranks and adapter:
        check_output(repaired_out(settings.out, adapter), 0, force=settings.force, inputs=[adapter.path])


def _measured(
    bench: Bench, fitting: Sequence[Candidate], rows: Sequence[EvalRow], metric: Metric, on_progress: Progress
) -> dict[str, Candidate]:
    """By name; those of one file follow one another."""
    files: dict[tuple[str, bool], list[Candidate]] = {}
    for each in fitting:
        files.setdefault(each.file, []).append(each)
    names = [each.name for group in files.values() for each in group]
    found: dict[str, Candidate] = {}
    on_progress(0, len(names), names[0])
    for group in files.values():
        for each in bench.measure(group, rows, metric):
            found[each.name] = each
            on_progress(len(found), len(names), "".join(names[len(found) : len(found) + 1]))
    return found


def _score(candidate: Candidate, metric: Metric) -> float:
    """More is better."""
    if candidate.interval is None:
        raise EdgeloraError(f"{candidate.name} was not measured")
    return -candidate.interval.value if metric.is_lower_better else candidate.interval.value


def _best(measured: Sequence[Candidate], metric: Metric) -> Candidate:
    """The best value; of equal ones the smallest file."""
    return max(measured, key=lambda each: (_score(each, metric), -each.file_bytes))


def _compared(candidate: Candidate, picked: Candidate, metric: Metric, settings: SweepSettings) -> Candidate:
    if candidate.sums is None or picked.sums is None or candidate.name == picked.name:
        return candidate
    found = compare(metric, candidate.sums, picked.sums, picked.name, seed=settings.seed, resamples=settings.resamples)
    return replace(candidate, compared=found)


def explain(candidates: Sequence[Candidate], picked: Candidate, metric: Metric, ram_bytes: int) -> str:
    """Why this one; and what is smaller and not measurably worse."""
    fitting = [each for each in candidates if each.fits]
    equal = [each for each in fitting if _score(each, metric) == _score(picked, metric)]
    others = f" of the {len(fitting)} that fit" if len(fitting) > 1 else ", the only one that fits"
    said = f"{picked.name} has the best {metric.name}{others} into {_shown(ram_bytes)}"
    if len(equal) > 1:
        said += f", and is the smallest of {len(equal)} that have it"
    if too_large := [each.name for each in candidates if not each.fits]:
        said += f"; {', '.join(too_large)} would need more"
    as_good = [
        each
        for each in fitting
        if each.compared and each.compared.verdict == SAME and each.file_bytes < picked.file_bytes
    ]
    if as_good:
        least = min(as_good, key=lambda each: each.file_bytes)
        share = 1 - least.file_bytes / picked.file_bytes
        said += f". {least.name} is {share:.0%} smaller, and not measurably worse on these rows"
    return said + "."


def _nothing_fits(candidates: Sequence[Candidate], ram_bytes: int, n_ctx: int) -> EdgeloraError:
    least = min(candidates, key=lambda each: each.memory_bytes)
    return EdgeloraError(
        f"nothing fits into {_shown(ram_bytes)}: the smallest, {least.name}, takes {_shown(least.memory_bytes)} with a "
        f"context of {n_ctx} tokens",
        hint="Give more with --ram, a smaller window with --ctx-size, or a smaller base.",
    )


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"
