"""Quantizations of one base, made one at a time, and each measured as it would be served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.fit import DEFAULT_N_CTX, serving_bytes
from edgelora.engine.scoring import Speed
from edgelora.errors import ModelFileError
from edgelora.evaluation.answers import Answers, Needs
from edgelora.evaluation.bootstrap import RESAMPLES, Interval, RowSums, interval, resampled
from edgelora.evaluation.comparison import Comparison
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.rows import EvalRow, RowSettings
from edgelora.evaluation.settings import EngineSettings
from edgelora.evaluation.variants import BARE, Variant
from edgelora.evaluation.work_file import WorkFile
from edgelora.store import Store

if TYPE_CHECKING:
    from converters.imatrix import ImportanceMatrix
    from converters.job import Job
    from converters.options import QuantizeOptions
    from converters.reader import GGUFHeader

QUANTS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
WITH_IMATRIX = ("iq4_xs", "iq3_m", "iq2_m")
"""Tried beside `QUANTS` where there is an importance matrix."""
PERPLEXITY = "perplexity"
UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0")
"""Types that an importance matrix changes nothing of."""


@dataclass(frozen=True)
class SweepSettings:
    """What `edgelora fit` can be told.

    Attributes:
        ram_bytes: memory that serving one conversation may take.
        quants: to try; empty for `QUANTS`.
        metric: decides; as on the command line of `edgelora eval`.
        imatrix: an importance matrix's file; each quantization is tried without and with it.
        calibrate: a text to measure one on instead.
        out: where the one that is picked is written.
    """

    ram_bytes: int
    quants: tuple[str, ...] = ()
    metric: str = PERPLEXITY
    imatrix: Path | None = None
    calibrate: Path | None = None
    rows: RowSettings = field(default_factory=RowSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    seed: int = 0
    resamples: int = RESAMPLES
    out: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Candidate:
    """One quantization.

    Attributes:
        name: of the table: "q4_k_m", "q4_k_m imatrix".
        file_bytes: of the GGUF file.
        memory_bytes: of one conversation (`engine.fit.serving_bytes`).
        sums, interval, speed: what was measured; None for what does not fit.
        compared: with the one that is picked; None for that one itself.
    """

    quant: str
    has_imatrix: bool
    file_bytes: int
    memory_bytes: int
    fits: bool
    sums: RowSums | None = None
    interval: Interval | None = None
    speed: Speed | None = None
    compared: Comparison | None = None

    @property
    def name(self) -> str:
        return f"{self.quant} imatrix" if self.has_imatrix else self.quant

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant": self.quant,
            "imatrix": self.has_imatrix,
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "value": self.interval.to_dict() if self.interval else None,
            "prefill_tokens_per_second": self.speed.prefill if self.speed else None,
            "decode_tokens_per_second": self.speed.decode if self.speed else None,
            "compared_with_picked": self.compared.to_dict() if self.compared else None,
        }


class Bench:
    """Makes quantizations of one base in a folder, one at a time, and measures them."""

    def __init__(self, base: Path, adapter: AdapterRef | None, settings: SweepSettings, folder: Path) -> None:
        self._base, self._settings, self._folder = base, settings, folder
        self._adapter = _ready(adapter, base, force=settings.engine.force)
        self._imatrix = self._read_imatrix()
        header = self._header()
        trained = header.metadata.get(f"{header.architecture}.context_length", DEFAULT_N_CTX)
        self.n_ctx = settings.engine.n_ctx or min(int(trained), DEFAULT_N_CTX)
        self._shape = header

    def plan(self) -> list[Candidate]:
        """Every quantization with its sizes, the largest first.

        Raises:
            ConversionError: a quantization that this base cannot have, or that needs an importance matrix.
        """
        adapter = self._adapter.path.stat().st_size if self._adapter else 0
        kv_type = self._settings.engine.kv_type or "f16"
        found = []
        for quant, has_imatrix in self._asked():
            file_bytes = self._planned_bytes(quant, has_imatrix)
            memory = serving_bytes(self._shape, file_bytes, adapter, self.n_ctx, kv_type)
            found.append(Candidate(quant, has_imatrix, file_bytes, memory, memory <= self._settings.ram_bytes))
        return sorted(found, key=lambda each: (-each.file_bytes, each.has_imatrix))

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

    def measure(self, candidate: Candidate, rows: Sequence[EvalRow], metric: Metric) -> Candidate:
        """Make it, score it, time it, delete it."""
        path = self._folder / f"{candidate.name.replace(' ', '-')}.gguf"
        try:
            self._convert(candidate.quant, candidate.has_imatrix, path)
            engine_settings = replace(self._settings.engine, n_ctx=self.n_ctx)
            variant = Variant(candidate.name, path, self._adapter.name if self._adapter else BARE)
            needs = Needs(metric.looks_at == "reply", metric.looks_at == "likelihood")
            adapters = [self._adapter] if self._adapter else []
            with WorkFile(None) as work, engine_settings.open(path, adapters) as engine:
                answers = Answers(rows, [variant], needs, engine_settings, work, lambda done, total, what: None)
                answers.gather(path, engine)
                speed = engine.measure_speed(variant.adapter)
        finally:
            path.unlink(missing_ok=True)
        sums = metric.sums(answers.of[variant.name], rows)
        (values,) = resampled([sums], seed=self._settings.seed, resamples=self._settings.resamples)
        return replace(candidate, sums=sums, interval=interval(sums, values), speed=speed)

    def write(self, picked: Candidate) -> Path:
        """The file that was asked for."""
        out = self._settings.out
        assert out
        self._convert(picked.quant, picked.has_imatrix, out, force=self._settings.force)
        Store().register(out)
        return out

    def _planned_bytes(self, quant: str, has_imatrix: bool) -> int:
        """How large a quantization would be."""
        options = self._options(quant, self._imatrix if has_imatrix else None)
        with self._job(options) as job:
            return sum(part.size_bytes for part in job.parts(self._folder / "planned.gguf", options))

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
        return read_header(path)


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
