"""Quantizations of one base, made one at a time, and each measured as it would be served."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.fit import DEFAULT_N_CTX, serving_bytes
from edgelora.errors import ModelFileError
from edgelora.evaluation.answers import Answers, Needs
from edgelora.evaluation.bootstrap import interval, resampled
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.quant_candidate import Candidate, SweepSettings
from edgelora.evaluation.quant_repair import plan_repairs
from edgelora.evaluation.rows import EvalRow
from edgelora.evaluation.variants import BARE, Variant
from edgelora.evaluation.work_file import WorkFile
from edgelora.store import Store

if TYPE_CHECKING:
    from converters.imatrix import ImportanceMatrix
    from converters.job import Job
    from converters.options import QuantizeOptions
    from converters.reader import GGUFHeader
    from converters.writer import TensorSpec

QUANTS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
WITH_IMATRIX = ("iq4_xs", "iq3_m", "iq2_m")
"""Tried beside `QUANTS` where there is an importance matrix."""
UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0")
"""Types that an importance matrix changes nothing of."""


class Bench:
    """Makes quantizations of one base in a folder, one at a time, and measures them."""

    def __init__(self, base: Path, adapter: AdapterRef | None, settings: SweepSettings, folder: Path) -> None:
        self._base, self._settings, self._folder = base, settings, folder
        self._adapter = _ready(adapter, base, force=settings.engine.force)
        self._imatrix = self._read_imatrix()
        ranks, force = settings.repair_ranks, settings.engine.force
        self._repairs = plan_repairs(ranks, base, self._adapter, self._imatrix, force=force)
        header = self._header()
        trained = header.metadata.get(f"{header.architecture}.context_length", DEFAULT_N_CTX)
        self.n_ctx = settings.engine.n_ctx or min(int(trained), DEFAULT_N_CTX)
        self._shape = header

    def plan(self) -> list[Candidate]:
        """Every quantization with its sizes, repaired and not, the largest first.

        Raises:
            ConversionError: a quantization that this base cannot have, or that needs an importance matrix.
        """
        found = []
        for quant, has_imatrix in self._asked():
            size, specs = self._planned(quant, has_imatrix)
            plain = self._sized(Candidate(quant, has_imatrix, size, 0, fits=False), 0)
            found.append(plain)
            sizes = self._repairs.sizes(specs) if self._repairs else ()
            found += (self._sized(replace(plain, repair_rank=rank), size) for rank, size in sizes)
        return sorted(found, key=lambda each: (-each.file_bytes, each.has_imatrix))

    def _sized(self, candidate: Candidate, repair_bytes: int) -> Candidate:
        """With a repair of such a size."""
        weights = candidate.file_bytes - candidate.repair_bytes
        adapter = (self._adapter.path.stat().st_size if self._adapter else 0) + repair_bytes
        memory = serving_bytes(self._shape, weights, adapter, self.n_ctx, self._settings.engine.kv_type or "f16")
        return replace(
            candidate,
            file_bytes=weights + repair_bytes,
            repair_bytes=repair_bytes,
            memory_bytes=memory,
            fits=memory <= self._settings.ram_bytes,
        )

    def _asked(self) -> Iterator[tuple[str, bool]]:
        from converters.quant_types import find_recipe

        has_imatrix = self._imatrix is not None
        names = self._settings.quants or (*QUANTS, *(WITH_IMATRIX if has_imatrix else ()))
        for name in dict.fromkeys(each.lower() for each in names):
            recipe = find_recipe(name)
            is_possible = not (recipe.needs_imatrix and has_imatrix)  # without one it is refused by name
            if is_possible:
                yield name, False
            if has_imatrix and recipe.default not in UNWEIGHTED:
                yield name, True

    def measure(self, candidates: Sequence[Candidate], rows: Sequence[EvalRow], metric: Metric) -> Iterator[Candidate]:
        """Make their file, repair, score and time one after another, delete the file.

        A repair that turns out larger than was planned, and too large, is not measured.

        Args:
            candidates: of one file.
        """
        quant, has_imatrix = candidates[0].file
        path = self._folder / "base.gguf"
        try:
            self._convert(quant, has_imatrix, path)
            for candidate in candidates:
                candidate, adapter = self._with_adapter(candidate, path)
                yield self._measured(candidate, path, adapter, rows, metric) if candidate.fits else candidate
        finally:
            path.unlink(missing_ok=True)

    def _with_adapter(self, candidate: Candidate, base: Path) -> tuple[Candidate, AdapterRef | None]:
        """The adapter to measure it with, and how large it is."""
        if not (candidate.repair_rank and self._repairs and self._adapter):
            return candidate, self._adapter
        repaired = self._repairs.write(base, candidate.repair_rank, self._repaired(candidate))
        return self._sized(candidate, repaired.path.stat().st_size - self._adapter.path.stat().st_size), repaired

    def _repaired(self, candidate: Candidate) -> Path:
        """Where an adapter that repairs a quantization lies, until one is picked."""
        return self._folder / f"{candidate.name.replace(' ', '-')}.gguf"

    def _measured(
        self, candidate: Candidate, path: Path, adapter: AdapterRef | None, rows: Sequence[EvalRow], metric: Metric
    ) -> Candidate:
        engine_settings = replace(self._settings.engine, n_ctx=self.n_ctx)
        variant = Variant(candidate.name, path, adapter.name if adapter else BARE)
        needs = Needs(metric.looks_at == "reply", metric.looks_at == "likelihood")
        with WorkFile(None) as work, engine_settings.open(path, [adapter] if adapter else []) as engine:
            answers = Answers(rows, [variant], needs, engine_settings, work, lambda done, total, what: None)
            answers.gather(path, engine)
            speed = engine.measure_speed(variant.adapter)
        sums = metric.sums(answers.of[variant.name], rows)
        (values,) = resampled([sums], seed=self._settings.seed, resamples=self._settings.resamples)
        return replace(candidate, sums=sums, interval=interval(sums, values), speed=speed)

    def write(self, picked: Candidate, out: Path) -> tuple[Path, Path | None]:
        """The file that was asked for, and beside it the adapter that was measured, where that repairs it."""
        self._convert(*picked.file, out, force=self._settings.force)
        store = Store()
        store.register(out)
        if not (picked.repair_rank and self._adapter):
            return out, None
        repaired = repaired_out(out, self._adapter)
        os.replace(self._repaired(picked), repaired)
        store.register_adapter(repaired)
        return out, repaired

    def _planned(self, quant: str, has_imatrix: bool) -> tuple[int, list[TensorSpec]]:
        """How large a quantization would be, and its tensors."""
        options = self._options(quant, self._imatrix if has_imatrix else None)
        with self._job(options) as job:
            parts = job.parts(self._folder / "planned.gguf", options)
            return sum(part.size_bytes for part in parts), [source.spec for source in job.sources]

    @contextmanager
    def _job(self, options: QuantizeOptions) -> Iterator[Job]:
        """A conversion with everything decided and no weight read."""
        from converters.base import plan_base
        from converters.base_file import BaseFile
        from converters.checkpoint import Checkpoint
        from converters.requantize import plan_requantize

        if self._base.is_dir():
            with Checkpoint(self._base) as checkpoint:
                yield plan_base(checkpoint, options, {})
        else:
            with BaseFile(self._base) as base:
                yield plan_requantize(base, options, {})

    def _convert(self, quant: str, has_imatrix: bool, path: Path, *, force: bool = False) -> None:
        from converters.base import convert_base
        from converters.requantize import requantize

        options = self._options(quant, self._imatrix if has_imatrix else None)
        if self._base.is_dir():
            convert_base(self._base, path, options=options, force=force)
        else:
            requantize(self._base, path, options, force=force)

    def _options(self, quant: str, imatrix: ImportanceMatrix | None) -> QuantizeOptions:
        from converters.options import QuantizeOptions

        name = str(self._settings.imatrix or "") if imatrix else ""
        return QuantizeOptions(quant=quant, imatrix=imatrix, imatrix_file=name, threads=self._settings.engine.threads)

    def _read_imatrix(self) -> ImportanceMatrix | None:
        from converters.imatrix import read_imatrix
        from edgelora.base_conversion import in_own_precision
        from edgelora.calibration_text import read_calibration
        from edgelora.engine.calibration import compute_imatrix

        settings, threads = self._settings, self._settings.engine.threads
        if settings.imatrix:
            return read_imatrix(settings.imatrix)
        if not settings.calibrate:
            return None
        text = read_calibration(settings.calibrate)
        with in_own_precision(self._base, self._folder / "own.gguf", threads, None) as path:
            return compute_imatrix(path, text, threads=threads)

    def _header(self) -> GGUFHeader:
        """The metadata that any quantization of the base has."""
        from converters.reader import read_header
        from converters.writer import create, header_bytes

        if not self._base.is_dir():
            return read_header(self._base)
        path = self._folder / "header.gguf"
        with self._job(self._options("f32", None)) as job, create(path, header_bytes(job.metadata, ())):
            pass
        header = read_header(path)
        path.unlink()
        return header


def repaired_out(out: Path, adapter: AdapterRef) -> Path:
    """`best.gguf` -> `best-support.gguf`."""
    return out.with_name(f"{out.stem}-{adapter.name}.gguf")


def _ready(adapter: AdapterRef | None, base: Path, *, force: bool) -> AdapterRef | None:
    """The adapter as GGUF."""
    from converters.detect import SourceKind, detect
    from edgelora.adapter_conversion import adapter_from_folder

    if detect(base) not in (SourceKind.HF_BASE, SourceKind.GGUF_BASE):
        raise ModelFileError(f"{base} is an adapter, not a base", hint=f"Use it as the adapter: --adapter {base}")
    if adapter is None:
        return None
    kind = detect(adapter.path)
    if kind is SourceKind.PEFT_ADAPTER:
        return replace(adapter, path=adapter_from_folder(adapter.path, base, Store(), force=force))
    if kind is not SourceKind.GGUF_ADAPTER:
        raise ModelFileError(
            f"{adapter.path} is a base, not an adapter", hint=f"Use it as the base: --base {adapter.path}"
        )
    return adapter
