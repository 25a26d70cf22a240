"""Perplexity on a plain text, of a base, adapters and other quantizations, in windows as llama-perplexity reads it.

The values are those of `engine.perplexity`; their intervals come from resampling windows, which all variants share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.adapter_ref import AdapterRef
from edgelora.calibration_text import read_calibration
from edgelora.engine.perplexity import Perplexity, perplexity
from edgelora.errors import BaseMismatchError
from edgelora.evaluation.bootstrap import RESAMPLES, RowSums
from edgelora.evaluation.comparison import Measured, measure
from edgelora.evaluation.metrics import PERPLEXITY
from edgelora.evaluation.thresholds import Threshold, check_names, failures
from edgelora.evaluation.variants import BARE, Variant, variants_of
from edgelora.resolution import resolve_files
from edgelora.template import ChatTemplate, resolve


@dataclass(frozen=True)
class TextSettings:
    """How a text is read.

    Attributes:
        chunk_size: tokens in a window; the second half of each is scored.
        chunks: windows to read, None for all.
        gpu_layers: layers on the GPU, -1 for all.
    """

    chunk_size: int = 512
    chunks: int | None = None
    threads: int | None = None
    gpu_layers: int = -1
    chat_template: str | None = None
    thresholds: tuple[Threshold, ...] = ()
    seed: int = 0
    resamples: int = RESAMPLES
    force: bool = False


@dataclass(frozen=True)
class TextEvaluation:
    """What was found.

    Attributes:
        perplexities, measured: by variant's name.
        failures: thresholds that were not kept, a sentence each.
    """

    text: str
    variants: Sequence[Variant]
    perplexities: dict[str, Perplexity]
    measured: dict[str, Measured]
    failures: Sequence[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "variants": [
                {
                    "name": variant.name,
                    "base": str(variant.base),
                    "adapter": variant.adapter,
                    "perplexity": self.perplexities[variant.name].value,
                    "uncertainty": self.perplexities[variant.name].uncertainty,
                    "tokens": self.perplexities[variant.name].n_tokens,
                    "windows": self.perplexities[variant.name].n_chunks,
                    "measured": self.measured[variant.name].to_dict(),
                }
                for variant in self.variants
            ],
            "failures": list(self.failures),
        }


def evaluate_text(
    text: Path,
    base: Path | None,
    adapters: Sequence[AdapterRef] = (),
    against: Sequence[Path] = (),
    settings: TextSettings | None = None,
    on_window: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> TextEvaluation:
    """The perplexity of every variant on a text, or on conversations of a `.jsonl` or `.csv` file.

    Args:
        on_window: called with a variant's name, its windows done and its windows in all.

    Raises:
        DataFileError: the text cannot be read, or is too short.
        SettingsError: a number out of range, or thresholds of what is not measured.
        ModelFileError, ConversionError: a base or adapter that cannot be used.
        BaseMismatchError: quantizations that cut the text into different tokens.
    """
    settings = settings or TextSettings()
    source = read_calibration(text)
    template = ChatTemplate(resolve(settings.chat_template)) if settings.chat_template else None
    resolved = [resolve_files(adapters, path, force=settings.force) for path in [base, *against]]
    first, *others = [files.base for files in resolved]
    variants = variants_of(first, [adapter.name for adapter in adapters], others)
    check_names(settings.thresholds, [PERPLEXITY.name], variants)
    references = {(files.base, adapter.name): adapter for files in resolved for adapter in files.adapters}
    found = {}
    for variant in variants:
        adapter = None if variant.adapter == BARE else references[variant.base, variant.adapter]
        found[variant.name] = perplexity(
            variant.base,
            source,
            chunk_size=settings.chunk_size,
            chunks=settings.chunks,
            adapter=adapter.path if adapter else None,
            adapter_scale=adapter.scale if adapter else 1.0,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            chat_template=template,
            progress=lambda done, total, name=variant.name: on_window(name, done, total),  # type: ignore[misc]
        )
    _check_tokens(found)
    sums = {
        name: RowSums(each.window_losses, np.full(each.n_chunks, each.n_tokens / each.n_chunks), np.exp)
        for name, each in found.items()
    }
    measured = measure(
        [PERPLEXITY], variants, {PERPLEXITY.name: sums}, seed=settings.seed, resamples=settings.resamples
    )
    broken = failures(settings.thresholds, variants, measured)
    return TextEvaluation(str(text), variants, found, measured[PERPLEXITY.name], broken)


def _check_tokens(found: dict[str, Perplexity]) -> None:
    counts = {name: each.n_tokens for name, each in found.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise BaseMismatchError(f"they score different numbers of tokens of the text, and cannot be compared: {said}")
