"""What a run's page tells beside its curves, as `report.json` keeps it in the run's folder (stdlib only).

{"rows": 120, "eval_rows": 12, "tokens": 9120, "trained_tokens": 3411, "lengths": [[0, 64, 80], [64, 128, 40]],
 "notes": ["..."], "plan": {"weights": 14689408, ...}, "samples": [{"prompt": "...", "before": "...", "after": "..."}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError
from edgelora.whole_file import write_whole

FILE = "report.json"
N_BINS = 12


@dataclass(frozen=True)
class Sample:
    """A prompt, and how base and result go on, greedily."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class RunFacts:
    """See the module's example.

    Attributes:
        lengths: (from, to, rows) of the training sequences' tokens.
        plan: bytes by part, as `memory_plan` reckoned them; empty where it could not.
        report: `TrainReport.summary`, once the run has ended.
    """

    rows: int
    eval_rows: int
    tokens: int
    trained_tokens: int
    lengths: Sequence[Sequence[int]]
    steps: int
    plan: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    samples: Sequence[Sample] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_whole(folder / FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunFacts:
        """Raises DataFileError: the file is not there, or is none of ours."""
        try:
            values = json.loads((folder / FILE).read_text(encoding="utf-8"))
            samples = tuple(Sample(**each) for each in values.pop("samples"))
            return cls(**values, samples=samples)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataFileError(
                f"{folder / FILE}: cannot be read ({error})", hint="Give the folder that `edgelora train -o` wrote."
            ) from None


def length_bins(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """A small histogram: (from, up to but without, rows)."""
    least, most = min(lengths), max(lengths)
    width = -(-(most - least + 1) // N_BINS)
    edges = range(least, most + 1, width)
    return [(low, low + width, sum(low <= length < low + width for length in lengths)) for low in edges]
