"""What a conversion would do, before it does it: every tensor, exact sizes, memory, disk and time.

No weight is looked at: times come from made-up rows, quantized on this machine, and from reading a few megabytes of the
model's files without decoding them.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from converters.block_types import TYPES, BlockType
from converters.dequantize import dequantize_rows
from converters.quant_types import ABORTS_WITHOUT_IMATRIX
from converters.quantize import Floats, quantize_rows
from converters.stream import Source, default_threads, peak_memory
from converters.writer import Part

SAMPLE_COLUMNS = 1024  # every type's blocks divide it
SAMPLE_ROWS = 1024
SAMPLE_SECONDS = 0.03
READ_SAMPLE_BYTES = 8 << 20
Kind = tuple[str, bool]
"""A type's name, and whether it is made with importance."""


@dataclass(frozen=True)
class PlannedTensor:
    """One row of the table.

    Attributes:
        shape: in numpy order.
        source: what it is now: "BF16", "Q8_0"; "computed" where it is in no file.
        type: what it will be.
        size_bytes: what it will take.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    type: str
    size_bytes: int


@dataclass(frozen=True)
class PlannedFile:
    path: Path
    size_bytes: int
    n_tensors: int


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        size_bytes: of all files together, exact.
        peak_memory_bytes: resident memory of the process at its highest, an estimate.
        free_bytes: on the disk that the files would be on.
        seconds: how long it would take, an estimate: a disk that is slower later makes it longer.
    """

    files: tuple[PlannedFile, ...]
    tensors: tuple[PlannedTensor, ...]
    size_bytes: int
    peak_memory_bytes: int
    free_bytes: int
    seconds: float

    @property
    def fits(self) -> bool:
        return self.size_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON: paths as text."""
        return {
            **asdict(self),
            "fits": self.fits,
            "files": [{**asdict(file), "path": str(file.path)} for file in self.files],
        }


def make_plan(
    parts: Sequence[Part], sources: Sequence[Source], stored: Mapping[str, str], inputs: Iterable[Path],
    threads: int | None,
) -> Plan:  # fmt: skip
    """The plan of writing `sources` into `parts`.

    Args:
        stored: what each tensor is now, by name.
        inputs: the files that hold the weights.
    """
    specs = [source.spec for source in sources]
    return Plan(
        tuple(PlannedFile(part.path, part.size_bytes, len(part.specs)) for part in parts),
        tuple(
            PlannedTensor(spec.name, spec.shape, stored[spec.name], spec.block_type.name, spec.size_bytes)
            for spec in specs
        ),
        sum(part.size_bytes for part in parts),
        max(_peak_until_now(), _resident() + peak_memory(sources, threads)),
        shutil.disk_usage(parts[0].path.resolve().parent).free,
        _seconds(sources, stored, inputs, threads or default_threads()),
    )


# Memory


def _status(name: str) -> int | None:
    """A line of /proc/self/status, in bytes; Linux alone has it."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            found = next((line.split()[1] for line in file if line.startswith(f"{name}:")), None)
    except OSError:
        return None
    return None if found is None else int(found) * 1024


def _peak_until_now() -> int:
    """Reading a large vocabulary may take more than all that follows."""
    return _status("VmHWM") or _from_usage()


def _from_usage() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident() -> int:
    """What the interpreter, libraries and metadata take now; the peak where the system does not say."""
    return _status("VmRSS") or _peak_until_now()


# Time


def _seconds(sources: Sequence[Source], stored: Mapping[str, str], inputs: Iterable[Path], threads: int) -> float:
    to_make: defaultdict[Kind, int] = defaultdict(int)
    to_unpack: defaultdict[str, int] = defaultdict(int)
    n_bytes = 0
    for source in sources:
        spec, now = source.spec, TYPES.get(stored[source.spec.name], TYPES["F32"])
        n_bytes += spec.size_bytes + _stored_bytes(now, spec.shape)
        if source.read_blocks is None:
            to_make[spec.block_type.name, source.importance is not None] += prod(spec.shape)
            to_unpack[now.name] += prod(spec.shape)
    with ThreadPoolExecutor(threads) as pool:
        making = sum(count / _rate(pool, threads, _maker(kind)) for kind, count in to_make.items())
        unpacking = sum(count / _rate(pool, threads, _unpacker(TYPES[name])) for name, count in to_unpack.items())
    return making + unpacking + n_bytes / _read_rate(inputs)


def _stored_bytes(block_type: BlockType, shape: Sequence[int]) -> int:
    return block_type.tensor_bytes(shape) if shape[-1] % block_type.block == 0 else 0


def _maker(kind: Kind) -> Callable[[int], object]:
    name, weighed = kind
    rows = np.random.default_rng(0).standard_normal((SAMPLE_ROWS, SAMPLE_COLUMNS), np.float32)
    weights: Floats | None = np.ones(SAMPLE_COLUMNS, np.float32)
    if not (weighed or name in ABORTS_WITHOUT_IMATRIX):
        weights = None
    return lambda count: quantize_rows(rows[:count], TYPES[name], weights)


def _unpacker(block_type: BlockType) -> Callable[[int], object]:
    blocks = np.zeros((SAMPLE_ROWS, block_type.row_bytes(SAMPLE_COLUMNS)), np.uint8)
    return lambda count: dequantize_rows(blocks[:count], block_type, SAMPLE_COLUMNS)


def _rate(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object]) -> float:
    """Values a second, with all threads at it."""
    work(1)  # builds tables at first use
    count, seconds = 16, 0.0
    while True:
        started = time.perf_counter()
        for future in [pool.submit(work, count) for _ in range(threads)]:
            future.result()
        seconds = max(time.perf_counter() - started, 1e-6)
        if seconds >= SAMPLE_SECONDS or count >= SAMPLE_ROWS:
            return threads * count * SAMPLE_COLUMNS / seconds
        count = min(SAMPLE_ROWS, count * 4)


def _read_rate(files: Iterable[Path]) -> float:
    """Bytes a second from the largest of the files."""
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    if largest is None:
        return float("inf")
    started, count = time.perf_counter(), 0
    with open(largest, "rb", buffering=0) as file:
        file.seek(max(0, largest.stat().st_size - READ_SAMPLE_BYTES) // 2)
        while count < READ_SAMPLE_BYTES and (piece := os.read(file.fileno(), 1 << 20)):
            count += len(piece)
    return max(count, 1) / max(time.perf_counter() - started, 1e-6)
