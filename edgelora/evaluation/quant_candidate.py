"""What `edgelora fit` is told, and a quantization that it tries."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.engine.scoring import Speed
from edgelora.evaluation.bootstrap import RESAMPLES, Interval, RowSums
from edgelora.evaluation.comparison import Comparison
from edgelora.evaluation.rows import RowSettings
from edgelora.evaluation.settings import EngineSettings

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class SweepSettings:
    """What `edgelora fit` can be told.

    Attributes:
        ram_bytes: memory that serving one conversation may take.
        quants: to try; empty for `QUANTS`.
        metric: decides; as on the command line of `edgelora eval`.
        imatrix: an importance matrix's file; each quantization is tried without and with it, and it weights the error
            that every repair is to hold.
        calibrate: a text to measure one on instead.
        repair_ranks: each quantization is also tried with the adapter repairing it at so many ranks.
        out: where the one that is picked is written; the adapter that repairs it lies beside (`repaired_out`).
    """

    ram_bytes: int
    quants: tuple[str, ...] = ()
    metric: str = PERPLEXITY
    imatrix: Path | None = None
    calibrate: Path | None = None
    repair_ranks: tuple[int, ...] = ()
    rows: RowSettings = field(default_factory=RowSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    seed: int = 0
    resamples: int = RESAMPLES
    out: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Candidate:
    """One quantization, with an adapter that repairs it or without.

    Attributes:
        name: of the table: "q4_k_m", "q4_k_m imatrix", "q2_k + repair 32".
        file_bytes: of the GGUF file, and of what the repair adds to the adapter's.
        memory_bytes: of one conversation (`engine.fit.serving_bytes`).
        sums, interval, speed: what was measured; None for what does not fit.
        compared: with the one that is picked; None for that one itself.
        repair_rank: 0 for the adapter as it was trained.
        repair_bytes: see `file_bytes`; planned, until it is made.
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
    repair_rank: int = 0
    repair_bytes: int = 0

    @property
    def file(self) -> tuple[str, bool]:
        """What candidates on the same GGUF file have in common."""
        return self.quant, self.has_imatrix

    @property
    def name(self) -> str:
        name = f"{self.quant} imatrix" if self.has_imatrix else self.quant
        return f"{name} + repair {self.repair_rank}" if self.repair_rank else name

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant": self.quant,
            "imatrix": self.has_imatrix,
            "repair_rank": self.repair_rank,
            "repair_bytes": self.repair_bytes,
            "file_bytes": self.file_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "value": self.interval.to_dict() if self.interval else None,
            "prefill_tokens_per_second": self.speed.prefill if self.speed else None,
            "decode_tokens_per_second": self.speed.decode if self.speed else None,
            "compared_with_picked": self.compared.to_dict() if self.compared else None,
        }
