"""Perplexity of a base on a text, as llama-perplexity measures it: the second half of each window is scored.

For a window of n tokens, those at positions n // 2 + 1 to n - 1 are predicted from all before them; the value is
exp(mean of -log p(token)) over all windows (tools/perplexity/perplexity.cpp, `perplexity`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelora.engine.native import InterruptFlag
from edgelora.engine.windows import Outputs, Progress, Source, Windows, WindowSettings, interruptible
from edgelora.errors import BaseMismatchError, EdgeloraError
from edgelora.template import ChatTemplate

MAX_MEAN_LOSS = 700.0  # exp of more is no float64
ROWS_AT_ONCE = 32
"""Rows of logits turned into probabilities at a time: 20 MiB of float32 for a vocabulary of 152,000."""


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and how sure it is.

    Attributes:
        value: exp of the mean negative log-likelihood; at least 1, and the vocabulary's size for a model that guesses.
        uncertainty: standard error of `value`, from the spread of the tokens' log-likelihoods.
        n_tokens: tokens that were scored.
        n_chunks: windows that were read.
        window_losses: -log p of all scored tokens of each window, float64 (n_chunks,); all have as many.
    """

    value: float
    uncertainty: float
    n_tokens: int
    n_chunks: int
    window_losses: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4f} +/- {self.uncertainty:.5f}"


@dataclass(frozen=True)
class PerplexityChange:
    """The same text through two files, for instance before and after quantization."""

    before: Perplexity
    after: Perplexity

    @property
    def difference(self) -> float:
        return self.after.value - self.before.value

    @property
    def ratio(self) -> float:
        return self.after.value / self.before.value


def perplexity(
    base: Path,
    source: Source,
    *,
    chunk_size: int = 512,
    chunks: int | None = None,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    threads: int | None = None,
    gpu_layers: int = 0,
    batch_tokens: int | None = None,
    chat_template: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """The perplexity of a GGUF base, or of it with an adapter, on a text.

    Args:
        source: a text, `calibration_text.read_calibration`'s result, or token ids.
        progress: see `Progress`.
        others: see `WindowSettings`.

    Raises:
        ModelFileError, BaseMismatchError: a base or adapter that cannot be used.
        SettingsError: a number out of range.
        DataFileError: too little text, or conversations that cannot be rendered.
        EdgeloraError: logits that are not finite, or llama.cpp failed.
    """
    settings = WindowSettings(
        base, chunk_size, chunks, adapter, adapter_scale, threads, gpu_layers, batch_tokens, chat_template
    )

    def work(flag: InterruptFlag) -> Perplexity:
        with Windows(settings, flag) as windows:
            tokens = windows.tokens(source)
            losses = [
                loss
                for outputs in windows.decode(tokens, chunk_size // 2, progress)
                for loss in _losses(outputs, tokens, chunk_size, windows.model.n_vocab)
            ]
            return _summary(losses, windows.count(tokens), base)

    return interruptible(work)


def compare_perplexity(
    before: Path,
    after: Path,
    source: Source,
    *,
    chunk_size: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    chat_template: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> PerplexityChange:
    """The perplexity of two files on one text. `progress` is called for both, one after the other.

    Raises:
        BaseMismatchError: they cut the text into different numbers of tokens, so nothing can be compared.
        others: see `perplexity`.
    """

    def measure(path: Path) -> Perplexity:
        return perplexity(
            path,
            source,
            chunk_size=chunk_size,
            chunks=chunks,
            threads=threads,
            gpu_layers=gpu_layers,
            chat_template=chat_template,
            progress=progress,
        )

    change = PerplexityChange(measure(before), measure(after))
    if change.before.n_tokens != change.after.n_tokens:
        raise BaseMismatchError(
            f"{before} scores {change.before.n_tokens} tokens of the text, {after} {change.after.n_tokens}: they have "
            "different tokenizers, and their perplexities cannot be compared"
        )
    return change


def _losses(
    outputs: Outputs, tokens: Sequence[int], chunk_size: int, n_vocab: int
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """-log p of every scored token that `outputs` predicts, float64, with the number of its window."""
    begin, end = outputs.positions
    if begin == end:
        return
    scored = min(end, chunk_size - 1) - begin  # the last position predicts the next window's first token
    logits = np.ctypeslib.as_array(outputs.logits, (len(outputs.windows), end - begin, n_vocab))
    for rows, window in zip(logits, outputs.windows, strict=True):
        start = window * chunk_size + begin + 1
        yield window, negative_log_likelihoods(rows[:scored], np.array(tokens[start : start + scored]))


def negative_log_likelihoods(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """-log softmax(logits)[target], row by row.

    Args:
        logits: float32, shape (n, n_vocab).
        targets: shape (n,).

    Raises:
        EdgeloraError: logits that are not finite.
    """
    losses = np.empty(len(logits), np.float64)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        part = logits[start : start + ROWS_AT_ONCE]
        most = part.max(axis=1, keepdims=True)
        if not np.isfinite(most).all():  # NaN anywhere, or infinity
            raise EdgeloraError(
                "the model computes logits that are not finite numbers",
                hint="Its weights are broken, or too large for their type: convert it again from the original.",
            )
        total = np.exp(part - most).sum(axis=1, dtype=np.float64)
        wanted = part[np.arange(len(part)), targets[start : start + ROWS_AT_ONCE]]
        losses[start : start + len(part)] = np.log(total) - (wanted - most[:, 0]).astype(np.float64)
    return losses


def _summary(parts: Sequence[tuple[int, npt.NDArray[np.float64]]], n_chunks: int, base: Path) -> Perplexity:
    losses, by_window = np.concatenate([part for _, part in parts]), np.zeros(n_chunks)
    for window, part in parts:
        by_window[window] += part.sum()
    count, mean = losses.size, float(losses.mean())
    spread = float((losses * losses).mean()) - mean * mean
    if not mean < MAX_MEAN_LOSS:
        raise EdgeloraError(f"{base}: gives the text no chance at all (mean loss {mean:.0f})")
    value = math.exp(mean)
    return Perplexity(value, value * math.sqrt(max(spread, 0.0) / (count - 1)), count, n_chunks, by_window)
