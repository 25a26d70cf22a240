"""Importance matrices, measured by running calibration text through the model that is to be quantized.

While llama.cpp computes, its evaluation callback hands out the input rows of every multiplication with a weight of a
layer; their squares are summed by column. It is what llama-imatrix does (`IMatrixCollector::collect_imatrix`,
tools/imatrix/imatrix.cpp), sum by sum in the same order and in float32, but with the installed library, and also with
an adapter active: then the rows are those of the fine-tuned model on its own kind of text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.imatrix import Importance, ImportanceMatrix
from edgelora.calibration_text import CalibrationText
from edgelora.engine.graph import F32, Node, operations, values, weight_name
from edgelora.engine.native import InterruptFlag
from edgelora.engine.windows import (
    MIN_CHUNK_SIZE,
    Callback,
    Progress,
    Source,
    Windows,
    WindowSettings,
    interruptible,
)
from edgelora.errors import EdgeloraError
from edgelora.template import ChatTemplate

Floats = npt.NDArray[np.float32]
ROWS_AT_ONCE = 128
"""Rows squared at a time: 15 MiB of float32 where a row has 28,672 columns (the widest of a 70B model)."""


def compute_imatrix(
    base: Path,
    source: Source,
    *,
    chunk_size: int = 512,
    chunks: int | None = None,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    threads: int | None = None,
    gpu_layers: int = 0,
    process_output: bool = False,
    batch_tokens: int | None = None,
    chat_template: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """The importance matrix of a GGUF base on a text.

    Args:
        source: a text, `calibration_text.read_calibration`'s result, or token ids.
        adapter: a GGUF adapter to have active while the base's weights are measured.
        process_output: measure `output.weight` too, which llama-imatrix leaves out unless it is asked.
        progress: see `Progress`.
        others: see `WindowSettings`.

    Raises:
        ModelFileError, BaseMismatchError: a base or adapter that cannot be used.
        SettingsError: a number out of range.
        DataFileError: too little text, or conversations that cannot be rendered.
        EdgeloraError: activations that are not finite, or llama.cpp failed.
    """
    settings = WindowSettings(
        base, chunk_size, chunks, adapter, adapter_scale, threads, gpu_layers, batch_tokens, chat_template
    )
    collector = Collector(process_output=process_output)

    def work(flag: InterruptFlag) -> None:
        with Windows(settings, flag, Callback(collector.wants, collector.see)) as windows:
            for _ in windows.decode(windows.tokens(source), progress=progress):
                pass

    interruptible(work)
    name = source.name if isinstance(source, CalibrationText) else "text"
    return collector.matrix(name, chunk_size)


class Collector:
    """Sums of squared rows by weight, as nodes of the graph go by."""

    def __init__(self, *, process_output: bool = False) -> None:
        self._plain, self._by_id = operations()
        self._process_output = process_output
        self._sums: dict[str, Floats] = {}  # (n_mat, n_cols)
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._rows = np.empty(0, np.float32)

    def matrix(self, dataset: str, chunk_size: int) -> ImportanceMatrix:
        """What was collected.

        Raises:
            EdgeloraError: nothing was.
        """
        if not self._sums:
            raise EdgeloraError("no weight of this base was multiplied with, so there is no importance to measure")
        entries = {name: Importance(self._sums[name].reshape(-1), self._counts[name]) for name in sorted(self._sums)}
        most = max(int(counts.max()) for counts in self._counts.values())
        return ImportanceMatrix(entries, (dataset,), most // chunk_size, chunk_size)

    def wants(self, address: int) -> bool:
        """Whether a node multiplies many rows with a weight; every multiplication by experts counts."""
        node = Node.from_address(address)
        if node.op not in (self._plain, self._by_id):
            return False
        name = weight_name(node.source(0))
        if name.endswith((".lora_a", ".lora_b")):  # an adapter's own; llama-imatrix would list them as weights
            return False
        if node.op == self._by_id:
            return True
        rows = node.source(1)
        if rows.ne[1] < MIN_CHUNK_SIZE or rows.type != F32:
            return False
        return name.startswith("blk.") or (self._process_output and name == "output.weight")

    def see(self, address: int) -> None:
        """Add a node's rows.

        Raises:
            EdgeloraError: they are not finite.
        """
        node = Node.from_address(address)
        weight, rows = node.source(0), values(node.source(1))
        name = weight_name(weight)
        with np.errstate(over="ignore", invalid="ignore"):
            if node.op == self._by_id:
                self._add_experts(name, weight.ne[2], rows[0], values(node.source(2))[0, 0])
            else:
                self._add_plain(name, (weight.ne[3], weight.ne[2]), rows)
        if not np.isfinite(self._sums[name]).all():
            raise EdgeloraError(
                f"{name}: the model computes values that are not finite numbers",
                hint="Its weights are broken, or too large for their type: convert it again from the original.",
            )

    def _add_plain(self, name: str, shape: tuple[int, int], rows: npt.NDArray[Any]) -> None:
        """rows: (i3, i2, n_rows, n_cols), shared by a stack of `shape` matrices, mostly (1, 1)."""
        n_mat = shape[0] * shape[1]
        sums, counts = self._entry(name, n_mat, rows.shape[-1], 1)
        for i3, i2 in np.ndindex(rows.shape[:2]):
            self._add(sums[i3 % shape[0] * shape[1] + i2 % shape[1]], rows[i3, i2])
        counts += rows.size // rows.shape[-1] // n_mat

    def _add_experts(self, name: str, n_expert: int, rows: npt.NDArray[Any], ids: npt.NDArray[Any]) -> None:
        """rows: (n_tokens, n_used or 1, n_cols); ids: int32 (n_tokens, n_used), the experts each token goes to."""
        sums, counts = self._entry(name, n_expert, rows.shape[-1], n_expert)
        slot, token = (index.reshape(-1) for index in np.indices(ids.T.shape))  # slot by slot, as the tool adds them
        chosen = ids[token, slot]
        if chosen.min() < 0 or chosen.max() >= n_expert:
            raise EdgeloraError(f"{name}: expert {chosen.max()} of {n_expert} was chosen")
        for expert in np.unique(chosen):
            at = np.flatnonzero(chosen == expert)
            self._add(sums[expert], rows[token[at], slot[at] % rows.shape[1]])
            counts[expert] += len(at)

    def _entry(self, name: str, n_mat: int, n_cols: int, n_counts: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        sums = self._sums.setdefault(name, np.zeros((n_mat, n_cols), np.float32))
        counts = self._counts.setdefault(name, np.zeros(n_counts, np.int64))
        if sums.shape != (n_mat, n_cols) or counts.shape != (n_counts,):
            raise EdgeloraError(
                f"{name} is multiplied with rows of {n_cols} in {n_counts} groups, and was with {sums.shape[1]} in "
                f"{len(counts)}"
            )
        return sums, counts

    def _add(self, sums: Floats, rows: npt.NDArray[Any]) -> None:
        """Add the squares of `rows` (n, n_cols) to `sums` (n_cols,), one row after the other, in float32."""
        n_cols = len(sums)
        if self._rows.size < (ROWS_AT_ONCE + 1) * n_cols:
            self._rows = np.empty((ROWS_AT_ONCE + 1) * n_cols, np.float32)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            work = self._rows[: (len(part) + 1) * n_cols].reshape(-1, n_cols)
            work[0] = sums
            np.multiply(part, part, out=work[1:])
            # Along the first axis numpy adds row by row: the order, and so the rounding, of llama-imatrix's loop.
            np.add.reduce(work, axis=0, out=sums)
