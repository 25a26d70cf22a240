"""Tensors into GGUF files, one after the other: read in rows, quantized on every core, written in order.

At any moment a few chunks of `CHUNK_BYTES` are alive, so memory does not grow with the model; nor much with the number
of cores, as many of them take smaller chunks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from converters.errors import FormatError, UnsupportedError, listed
from converters.quantize import ON_A_GRID, Bytes, Floats, quantize_rows
from converters.writer import Part, TensorSpec, create_parts

T = TypeVar("T")
Progress = Callable[[int, int, str], None]
"""Called with bytes written, bytes in all, and the tensor that is being written."""

CHUNK_BYTES = 4 << 20  # of float32 rows
ALL_CHUNKS_BYTES = 96 << 20


class Importances(Protocol):
    """Rows of an importance matrix by the number of the expert; see `imatrix.Means`."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int, /) -> Floats: ...


@dataclass(frozen=True)
class Source:
    """One tensor to be made.

    Attributes:
        read: rows `start` to `stop` of it as float32; a vector is one row.
        read_blocks: the same as blocks of the tensor's own type, where they go over as they are.
        importance: float32 (row length,) for each expert of a stack, or for one matrix; None without.
        chunk_bytes: of float32 rows to read at a time.
    """

    spec: TensorSpec
    read: Callable[[int, int], Floats] | None = None
    read_blocks: Callable[[int, int], Bytes] | None = None
    importance: Importances | None = None
    chunk_bytes: int = CHUNK_BYTES

    @property
    def rows_of_importance(self) -> int:
        """How many rows share their importance: those of one expert, or all."""
        return prod(self.spec.shape[:-1]) // (1 if self.importance is None else len(self.importance))


@dataclass(frozen=True)
class _Chunk:
    source: Source
    data: Bytes
    is_finite: bool
    overflowed: bool
    is_last: bool


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_tensors(
    parts: Sequence[Part], sources: Sequence[Source], threads: int | None, progress: Progress | None, *, strict: bool
) -> list[str]:
    """Write a whole file, or all parts of one; returns notices about values that are not finite.

    Args:
        sources: the tensors of all parts, in their order.

    Raises:
        FormatError: values that are NaN or infinite, with `strict`, or where the type cannot hold them.
        ConversionError: a source that cannot be read, or a file that cannot be written; nothing is left behind.
    """
    threads = threads or default_threads()
    done, total = len(parts[0].header), sum(part.size_bytes for part in parts)
    broken: dict[str, str] = {}
    overflowed: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool, create_parts(parts) as file:
        for chunk in in_order(pool, _jobs(sources, threads), ahead=_ahead(threads)):
            name = chunk.source.spec.name
            file.write(chunk.data.data)
            done += chunk.data.nbytes
            if not chunk.is_finite:
                broken.setdefault(name, f"{name}: holds values that are NaN or infinite")
            elif chunk.overflowed:
                overflowed.setdefault(name, f"{name}: holds values too large for F16, which became infinite")
            if chunk.is_last:
                done += file.end_tensor(chunk.source.spec)
            if progress:
                progress(done, total, name)
        if broken and strict:
            raise FormatError(
                f"{parts[0].path}: the weights are broken, nothing was written:{listed(list(broken.values()))}",
                hint="Download the model again, or write them as they are without --strict.",
            )
    return list({**overflowed, **broken}.values())


def peak_memory(sources: Iterable[Source], threads: int | None = None) -> int:
    """Bytes that chunks in flight take at most: each is read, held as float32 and quantized."""
    threads = threads or default_threads()
    largest = max((_chunk_rows(source, threads) * source.spec.shape[-1] * 4 for source in sources), default=0)
    return _ahead(threads) * 3 * largest


def _ahead(threads: int) -> int:
    """How many chunks are in memory."""
    return threads + 2


def _chunk_rows(source: Source, threads: int) -> int:
    n_bytes = min(source.chunk_bytes, ALL_CHUNKS_BYTES // _ahead(threads))
    return min(max(1, n_bytes // (4 * source.spec.shape[-1])), source.rows_of_importance)


def _jobs(sources: Iterable[Source], threads: int) -> Iterator[Callable[[], _Chunk]]:
    for source in sources:
        n_rows, unit, step = prod(source.spec.shape[:-1]), source.rows_of_importance, _chunk_rows(source, threads)
        starts = (start for first in range(0, n_rows, unit) for start in range(first, first + unit, step))
        for start in starts:
            stop = min(start + step, (start // unit + 1) * unit)
            yield partial(_encode, source, start, stop, is_last=stop >= n_rows)


def _encode(source: Source, start: int, stop: int, *, is_last: bool) -> _Chunk:
    """Read and quantize some rows; runs in a thread."""
    if source.read_blocks is not None:
        blocks = source.read_blocks(start, stop)
        return _Chunk(source, blocks, _is_finite(blocks, source.spec.block_type.name), False, is_last)
    assert source.read is not None
    rows, block_type = source.read(start, stop), source.spec.block_type
    is_finite = bool(np.isfinite(rows).all())
    if not is_finite and block_type.name in ON_A_GRID:
        raise FormatError(
            f"{source.spec.name}: holds values that are NaN or infinite, which {block_type.name} cannot hold",
            hint="Download the model again, or choose another quantization.",
        )
    try:
        weights = None if source.importance is None else source.importance[start // source.rows_of_importance]
        data = quantize_rows(rows, block_type, weights)
    except UnsupportedError as error:
        raise UnsupportedError(f"{source.spec.name}: {error.message}", hint=error.hint) from None
    overflowed = block_type.name == "F16" and is_finite and not _is_finite(data, "F16")
    return _Chunk(source, data, is_finite, overflowed, is_last)


# All bits of an exponent: that is no finite number. By its bits, as numpy's own test of float16 is ten times slower.
_EXPONENTS: Mapping[str, npt.NDArray[np.unsignedinteger[Any]]] = {
    "F32": np.array(0x7F800000, np.uint32),
    "F16": np.array(0x7C00, np.uint16),
    "BF16": np.array(0x7F80, np.uint16),
}


def _is_finite(data: Bytes, type_name: str) -> bool:
    """Whether values of a plain type are; blocks are not looked at."""
    exponent = _EXPONENTS.get(type_name)
    return exponent is None or bool(((data.view(exponent.dtype) & exponent) != exponent).all())


def in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """Results in the order of the jobs, with at most `ahead` of them in memory."""
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
