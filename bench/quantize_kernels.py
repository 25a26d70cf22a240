"""How fast our quantization kernels are beside llama.cpp's, type by type, on one thread and on two.

    python bench/quantize_kernels.py [TYPE ...] [--megabytes 8] [--runs 5]

Speeds are megabytes of float32 weights a second. The two encode the same rows in turns, and each figure is the median
of its runs; the bytes have to be equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from converters import native
from converters.block_types import TYPES, BlockType
from converters.ggml_base import encoder

KERNELS = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "Q8_0", "F16", "BF16")
WITH_IMPORTANCE = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
N_COLS = 2048
THREADS = (1, 2)
WEIGHT_SCALE = 0.02  # the standard deviation of a language model's weights, about

Encode = Callable[[np.ndarray, np.ndarray], None]


def encoders(kind: BlockType, importance: np.ndarray | None) -> tuple[Encode, Encode]:
    ggml, weights = encoder(kind.number), importance.ctypes.data if importance is not None else None
    kernel = native.quantizer(kind, ggml)
    if kernel is None:
        sys.exit(f"{kind.name}: no native kernel on this machine (is there a C compiler?)")

    def theirs(rows: np.ndarray, out: np.ndarray) -> None:
        ggml.ggml_quantize_chunk(kind.number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)

    def ours(rows: np.ndarray, out: np.ndarray) -> None:
        kernel(rows.ctypes.data, out.ctypes.data, *rows.shape, weights)

    return theirs, ours


def seconds(encode: Encode, rows: np.ndarray, out: np.ndarray, threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        list(pool.map(encode, np.array_split(rows, threads), np.array_split(out, threads)))
        return time.perf_counter() - begin


def measure(name: str, importance: np.ndarray | None, rows: np.ndarray, runs: int) -> str:
    kind = TYPES[name]
    outs = [np.zeros((len(rows), kind.row_bytes(N_COLS)), np.uint8) for _ in range(2)]
    cells = []
    for threads in THREADS:
        times: tuple[list[float], list[float]] = ([], [])
        pair = encoders(kind, importance)
        for _ in range(runs):
            for encode, out, taken in zip(pair, outs, times, strict=True):
                taken.append(seconds(encode, rows, out, threads))
        theirs, ours = (rows.nbytes / 1e6 / statistics.median(taken) for taken in times)
        cells.append(f"{theirs:8.0f} {ours:8.0f} {ours / theirs:6.1f}x")
    same = "equal" if outs[0].tobytes() == outs[1].tobytes() else "DIFFERENT"
    return f"{name:7} {'yes' if importance is not None else 'no':10} {'   '.join(cells)}   {same}"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"default: {' '.join(KERNELS)}")
    parser.add_argument("--megabytes", type=int, default=8, help="of float32 rows")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(argv)
    random = np.random.default_rng(0)
    shape = (options.megabytes * 1_000_000 // 4 // N_COLS, N_COLS)
    rows = random.standard_normal(shape, np.float32) * np.float32(WEIGHT_SCALE)
    importance = random.random(N_COLS, np.float32) ** np.float32(4)
    print(f"{'':18}" + "   ".join(f"{f'{threads} thread(s), MB/s':^25}" for threads in THREADS))
    print(f"{'type':7} {'importance':10} " + "   ".join([f"{'llama':>8} {'ours':>8} {'ratio':>7}"] * len(THREADS)))
    for weights, names in ((None, KERNELS), (importance, WITH_IMPORTANCE)):
        for name in names:
            if not options.types or name in {wanted.upper() for wanted in options.types}:
                print(measure(name, weights, rows, options.runs), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
