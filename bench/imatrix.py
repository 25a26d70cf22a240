"""Importance matrices and perplexity: ours, through the installed library, beside llama.cpp's own two programs.

    python bench/imatrix.py [TEXT] [--source LLAMA_CPP] [--chunks 8] [--base GGUF ...]

The programs are built once from the source package of llama-cpp-python into build/llama.cpp-tools (about 10 minutes on
2 cores). Without --base, it measures the bundled base in two quantizations, with and without an adapter, a small model
with experts, and a larger random one, whose times say more. Ends with 1 where a result is not the tool's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from converters.base import convert_base
from converters.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from converters.reader import read_header
from edgelora.calibration_text import read_calibration
from edgelora.engine.calibration import compute_imatrix
from edgelora.engine.perplexity import perplexity

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "llama.cpp-tools"
PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-imatrix", "llama-perplexity")
TINY_BASE = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
TEXT = ROOT / "build" / "calibration.txt"
BUILD_SECONDS, RUN_SECONDS, TRIES = 3600, 900, 5
TOLERANCE = 1e-4
"""Relative, of a column's mean: float32 sums of thousands of rows, should a compiler add them in another order."""
PERPLEXITY_TOLERANCE = 1e-3
"""Of the value itself: the tool prints four decimals, and takes exponentials in another float32 function."""
THREADS = os.cpu_count() or 1
ADAPTER_TENSORS = (".lora_a", ".lora_b")  # which llama-imatrix lists as if they were the base's

Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """One base to measure, perhaps with an adapter."""

    name: str
    base: Path
    adapter: Path | None = None


def tools(source: Path | None) -> dict[str, Path]:
    """The programs by name, built if they are not there."""
    found = {name: BUILD / "bin" / name for name in TOOLS}
    if all(path.is_file() for path in found.values()):
        return found
    print(f"building {' and '.join(TOOLS)} in {BUILD} ...", file=sys.stderr)
    options = ("LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF")
    configure = ["cmake", "-S", str(source or download()), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    run([*configure, *(f"-D{option}" for option in options)], BUILD_SECONDS)
    run(["cmake", "--build", str(BUILD), "--target", *TOOLS, "-j", str(THREADS)], BUILD_SECONDS)
    return found


def download() -> Path:
    """llama.cpp's sources, out of the source package."""
    folder = ROOT / "build"
    sources = sorted(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not sources:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        run([*command, "-d", str(folder), PACKAGE], RUN_SECONDS)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        sources = sorted(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return sources[-1]


def run(command: Sequence[str], seconds: int) -> tuple[str, float]:
    """What a program says, and its seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr, time.perf_counter() - start


# The models


def cases(folder: Path) -> list[Case]:
    made = []
    for quant in ("f32", "q4_k_m"):
        convert_base(TINY_BASE, folder / f"{quant}.gguf", quant=quant)
        made.append(Case(f"fennick-2.6m {quant}", folder / f"{quant}.gguf"))
    base = made[0].base
    return [
        *made,
        Case("fennick-2.6m f32 + adapter", base, adapter(folder / "adapter.gguf", base)),
        Case("experts, random", random_model(folder / "experts.gguf", base, d=64, ff=96, layers=2, experts=8)),
        Case("105M, random", random_model(folder / "large.gguf", base, d=768, ff=3072, layers=12)),
    ]


def adapter(path: Path, base: Path, rank: int = 8) -> Path:
    """A random LoRA on every linear of a layer."""
    rng, writer = np.random.default_rng(1), gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, tensor in read_header(base).tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            n_out, n_in = tensor.shape
            writer.add_tensor(f"{name}.lora_a", rng.standard_normal((rank, n_in), np.float32) * n_in**-0.5)
            writer.add_tensor(f"{name}.lora_b", rng.standard_normal((n_out, rank), np.float32) * 0.1)
    return finished(writer, path)


def random_model(path: Path, vocabulary: Path, *, d: int, ff: int, layers: int, experts: int = 0) -> Path:
    """A Llama of random weights with the tokenizer of `vocabulary`; with `experts`, a Mixtral, two of them used."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    fields = {k: f for k, f in gguf.GGUFReader(vocabulary).fields.items() if k.startswith("tokenizer.ggml.")}
    for key, field in fields.items():
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], item)
    sizes: dict[str, Any] = {
        "block_count": layers,
        "context_length": 512,
        "embedding_length": d,
        "feed_forward_length": ff,
        "attention.head_count": d // 16,
        "attention.head_count_kv": d // 32,
        "rope.dimension_count": 16,
        **({"expert_count": experts, "expert_used_count": 2} if experts else {}),
    }
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    n_vocab = len(fields["tokenizer.ggml.tokens"].contents())
    add_tensors(writer, rng, {"token_embd": (n_vocab, d), "output": (n_vocab, d), "output_norm": (d,)})
    each, end = ((experts,), "_exps") if experts else ((), "")
    shapes = {
        **{"attn_q": (d, d), "attn_k": (d // 2, d), "attn_v": (d // 2, d), "attn_output": (d, d)},
        **{f"ffn_gate{end}": (*each, ff, d), f"ffn_up{end}": (*each, ff, d), f"ffn_down{end}": (*each, d, ff)},
        **{"attn_norm": (d,), "ffn_norm": (d,)},
        **({"ffn_gate_inp": (experts, d)} if experts else {}),
    }
    for layer in range(layers):
        add_tensors(writer, rng, {f"blk.{layer}.{name}": shape for name, shape in shapes.items()})
    return finished(writer, path)


def add_tensors(writer: gguf.GGUFWriter, rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        array = np.ones(shape, np.float32) if is_norm else rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5
        writer.add_tensor(f"{name}.weight", array)


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# The measurements


def difference(ours: ImportanceMatrix, theirs: ImportanceMatrix) -> float:
    """The largest relative difference of a column's mean; infinite where the weights or counts are not the same."""
    names = [name for name in theirs.entries if not name.endswith(ADAPTER_TENSORS)]
    if names != list(ours.entries):
        return float("inf")
    worst = 0.0
    for name in names:
        a, b = ours.entries[name], theirs.entries[name]
        if not np.array_equal(a.counts, b.counts):
            return float("inf")
        floor = np.float32(np.finfo(np.float32).tiny)
        worst = max(worst, float((np.abs(a.means() - b.means()) / np.maximum(b.means(), floor)).max()))
    return worst


@dataclass(frozen=True)
class Bench:
    """What every case is measured with; `folder` takes the files."""

    programs: dict[str, Path]
    text: Path
    chunks: int
    chunk_size: int
    folder: Path

    def command(self, program: str, case: Case, *more: str) -> list[str]:
        sizes = ["-c", str(self.chunk_size), "--chunks", str(self.chunks), "-t", str(THREADS)]
        lora = ["--lora", str(case.adapter)] if case.adapter else []
        return [str(self.programs[program]), "-m", str(case.base), "-f", str(self.text), *sizes, *lora, *more]

    def ours(self, measure: Callable[..., Result], case: Case) -> tuple[Result, float]:
        start = time.perf_counter()
        found = measure(
            case.base,
            read_calibration(self.text),
            chunk_size=self.chunk_size,
            chunks=self.chunks,
            threads=THREADS,
            adapter=case.adapter,
        )
        return found, time.perf_counter() - start

    def imatrix(self, case: Case) -> bool:
        theirs, ours = self.folder / "theirs.gguf", self.folder / "ours.gguf"
        _, their_seconds = run(self.command("llama-imatrix", case, "-o", str(theirs), "--no-ppl"), RUN_SECONDS)
        found, our_seconds = self.ours(compute_imatrix, case)
        write_imatrix(ours, found, force=True)
        apart = difference(found, read_imatrix(theirs))
        is_same = ours.read_bytes() == theirs.read_bytes()
        report(
            f"{case.name:28} imatrix",
            (their_seconds, our_seconds),
            f"max relative difference {apart:.1e} over {len(found.entries)} weights{', same bytes' * is_same}",
        )
        return apart < TOLERANCE

    def final_estimate(self, case: Case) -> tuple[re.Match[str], float]:
        """What llama-perplexity says last. Its log is written by a thread that its exit does not always wait for."""
        for _ in range(TRIES):
            output, seconds = run(self.command("llama-perplexity", case), RUN_SECONDS)
            if found := re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output):
                return found, seconds
        raise SystemExit(output[-3000:])

    def perplexity(self, case: Case) -> bool:
        theirs, their_seconds = self.final_estimate(case)
        found, our_seconds = self.ours(perplexity, case)
        report(f"{'':28} perplexity", (their_seconds, our_seconds), f"{theirs[1]} +/- {theirs[2]}, ours {found}")
        return abs(found.value - float(theirs[1])) < PERPLEXITY_TOLERANCE


def report(what: str, seconds: tuple[float, float], result: str) -> None:
    print(f"{what:40} {seconds[0]:7.2f} s {seconds[1]:7.2f} s   {result}", flush=True)


def default_text() -> Path:
    """The project's own documents and data: some text that is always there."""
    parts = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples" / "data").glob("*.jsonl"))]
    TEXT.parent.mkdir(exist_ok=True)
    TEXT.write_text("\n".join(part.read_text(encoding="utf-8") for part in parts), encoding="utf-8")
    return TEXT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="calibration text (the project's own documents)")
    parser.add_argument("--source", type=Path, help="llama.cpp's sources (downloaded with pip)")
    parser.add_argument("--base", type=Path, action="append", default=[], help="a GGUF base; may be repeated")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk-size", type=int, default=512)
    given = parser.parse_args()
    programs = tools(given.source)
    text = given.text or default_text()
    print(f"{given.chunks} windows of {given.chunk_size} tokens; {THREADS} threads; seconds: llama.cpp's, ours")
    with tempfile.TemporaryDirectory() as name:
        chosen = [Case(path.stem, path) for path in given.base] or cases(Path(name))
        bench = Bench(programs, text, given.chunks, given.chunk_size, Path(name))
        equal = [measure(case) for case in chosen for measure in (bench.imatrix, bench.perplexity)]
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
