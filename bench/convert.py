"""A base to quantized GGUF: edgelora in one pass, beside llama.cpp's two programs, on the same files in the same run.

    python bench/convert.py                      the 1.1B shape: Q4_K_M, Q8_0, F16, three runs each
    python bench/convert.py --shape tiny         a minute's look at the benchmark itself
    python bench/convert.py --memory             peak memory on a 7B-shaped sparse file

The reference is `convert_hf_to_gguf.py --outtype bf16`, then `llama_model_quantize` of the installed library (what
llama-quantize calls) with the same number of threads; for F16 and Q8_0 it is also the converter alone, which can write
those itself. Wall time and peak resident memory are those of the processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.shapes import SHAPES, make_model  # noqa: E402

REFERENCE = Path(os.environ.get("EDGELORA_REFERENCE") or ROOT / "build" / "reference")
WORK = ROOT / "build" / "bench"
QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
FILE_TYPES = {"q4_k_m": 15, "q8_0": 7, "f16": 1}


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mb: float


def measured(command: Sequence[str], **environment: str) -> Run:
    """One process, start to end; Python's compiled modules are there, as for anybody who runs a program twice."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**own, **environment}
    ) as process:
        assert process.stderr
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}: {said.decode()[-2000:]}")
    return Run(time.monotonic() - started, usage.ru_maxrss / 1024)


def ours(model: Path, out: Path, quant: str, threads: int, **environment: str) -> Run:
    command = [sys.executable, "-m", "edgelora", "convert", str(model), "-o", str(out), "--quant", quant, "--force"]
    return measured([*command, "--threads", str(threads)], EDGELORA_HOME=str(WORK / "store"), **environment)


def theirs(model: Path, out: Path, quant: str, threads: int) -> tuple[list[Run], int]:
    """The converter and the quantizer; and the bytes of the file between them."""
    between = WORK / "between.gguf"
    script = str(REFERENCE / "convert_hf_to_gguf.py")
    first = measured([sys.executable, script, str(model), "--outfile", str(between), "--outtype", "bf16"])
    second = measured([sys.executable, "-c", QUANTIZE, str(between), str(out), str(FILE_TYPES[quant]), str(threads)])
    size = between.stat().st_size
    between.unlink()
    return [first, second], size


def theirs_alone(model: Path, out: Path, quant: str) -> Run:
    script = str(REFERENCE / "convert_hf_to_gguf.py")
    return measured([sys.executable, script, str(model), "--outfile", str(out), "--outtype", quant])


def tensor_digest(path: Path) -> str:
    from converters.reader import read_header

    header, digest = read_header(path), hashlib.sha256()
    with open(path, "rb") as file:
        for name in sorted(header.tensors):
            tensor = header.tensors[name]
            file.seek(tensor.offset)
            digest.update(f"{name} {tensor.type_name} {tensor.shape}".encode() + file.read(tensor.size_bytes))
    return digest.hexdigest()


def compare(model: Path, quant: str, runs: int, threads: int) -> dict[str, object]:
    a, b, mine, other, alone = WORK / "ours.gguf", WORK / "theirs.gguf", [], [], []
    between = 0
    ours(model, a, quant, threads)  # once unmeasured: the page cache, and the kernels' one compilation
    for _ in range(runs):  # in turns: what else the machine does then falls on both
        mine.append(ours(model, a, quant, threads))
        two, between = theirs(model, b, quant, threads)
        other.append(Run(sum(run.seconds for run in two), max(run.peak_mb for run in two)))
        if quant in ("f16", "q8_0"):
            alone.append(theirs_alone(model, WORK / "alone.gguf", quant))
    equal = tensor_digest(a) == tensor_digest(b)
    for path in (a, b, WORK / "alone.gguf"):
        path.unlink(missing_ok=True)
    own, reference = statistics.median(r.seconds for r in mine), statistics.median(r.seconds for r in other)
    return {
        "quant": quant, "seconds": [round(r.seconds, 1) for r in mine], "median": round(own, 1),
        "reference_seconds": [round(r.seconds, 1) for r in other], "reference_median": round(reference, 1),
        "ratio": round(own / reference, 3), "peak_mb": round(max(r.peak_mb for r in mine)),
        "reference_peak_mb": round(max(r.peak_mb for r in other)), "reference_temporary_bytes": between,
        "converter_alone_median": round(statistics.median(r.seconds for r in alone), 1) if alone else None,
        "ratio_to_converter_alone": round(own / statistics.median(r.seconds for r in alone), 3) if alone else None,
        "tensors_equal": equal,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--quant", nargs="+", default=list(FILE_TYPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", action="store_true", help="peak memory on a 7B-shaped sparse file")
    given = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    try:
        if given.memory:
            model = make_model(WORK / "7b", SHAPES["7b"], sparse=True)
            run = ours(model, WORK / "ours.gguf", "q4_k_m", given.threads)
            print(json.dumps({"shape": "7b, sparse", "quant": "q4_k_m", "peak_mb": round(run.peak_mb),
                              "seconds": round(run.seconds, 1)}))  # fmt: skip
            return
        model = make_model(WORK / given.shape, SHAPES[given.shape])
        for quant in given.quant:
            print(json.dumps(compare(model, quant, given.runs, given.threads)), flush=True)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
