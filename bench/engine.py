"""Many adapters at once: edgelora's engine beside llama-bench and llama-server, on the same files in the same run.

    python -m bench.engine                  the 1.1B shape at Q4_K_M, 16 adapters on all linear layers
    python -m bench.engine --shape tiny     a minute's look at the benchmark itself

Every comparison is made `--runs` times, one side after the other, with the same number of threads, prompts and tokens.
Medians are printed, in tokens/s unless the row says otherwise, with the spread of the single runs (largest / smallest).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench import peers
from bench.convert import WORK
from bench.shapes import SHAPES, Shape, make_model
from edgelora.engine.engine import Completion, Engine, Request
from edgelora.engine.threads import usable_cores

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
RANKS = (8, 16, 32, 64)
N_CTX, STREAMS, PROMPT = 1024, 8, 256
WORDS = ("the", "miller", "told", "a", "storm", "of", "bread", "and", "boats", "to", "one", "old", "fisherman", "river")


@dataclass
class Row:
    """One comparison: what is wanted of our figure divided by theirs, and the figures of each run."""

    what: str
    bar: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    at_least: float = 0.0
    at_most: float = 0.0

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def holds(self) -> bool:
        return self.ratio >= self.at_least if self.at_least else self.ratio <= self.at_most

    def line(self) -> str:
        figures = [f"{statistics.median(runs):9.2f} ({max(runs) / min(runs):.2f})" for runs in (self.ours, self.theirs)]
        return (
            f"| {self.what} | {' | '.join(figures)} | {self.ratio:.2f} | {self.bar} | {'' if self.holds else 'short'} |"
        )


def adapter(path: Path, base: Path, rank: int, seed: int) -> Path:
    """A random LoRA of llama.cpp's form on every linear layer, F16."""
    import gguf

    from converters.reader import read_header

    if path.exists():
        return path
    rng, header = np.random.default_rng(seed), read_header(base)
    writer = gguf.GGUFWriter(path, header.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    for name, tensor in header.tensors.items():
        if name.split(".")[-2] in LINEAR and name.endswith(".weight"):
            n_out, n_in = tensor.shape
            a = rng.standard_normal((rank, n_in), np.float32) * np.float32(n_in**-0.5)
            writer.add_tensor(f"{name}.lora_a", a.astype(np.float16))
            b = rng.standard_normal((n_out, rank), np.float32) * np.float32(0.02)
            writer.add_tensor(f"{name}.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def files(shape_name: str, shape: Shape, quant: str) -> tuple[Path, list[Path], list[Path]]:
    """The base, adapters of rank 16, and adapters of mixed rank."""
    from converters.base import convert_base

    folder = WORK / f"engine-{shape_name}"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"base-{quant}.gguf"
    if not base.exists():
        convert_base(make_model(folder / "model", shape), base, quant=quant)
    same = [adapter(folder / f"r16-{i}.gguf", base, 16, i) for i in range(STREAMS)]
    mixed = [adapter(folder / f"mixed-{i}.gguf", base, RANKS[i % len(RANKS)], 100 + i) for i in range(16)]
    return base, same, mixed


def prompt(n_words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


def request(text: str, n_decode: int, name: str | None = None) -> Request:
    sampling = {"temperature": 0, "max_tokens": n_decode}
    return Request(text, name, sampling=sampling)


def together(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[Completion]]:
    """All at once: seconds until the last one is done, and what came."""
    start = time.perf_counter()
    streams = [engine.submit(each) for each in requests]
    done = [stream.completion for stream in streams]
    return time.perf_counter() - start, done


class Bench:
    """One run of the table."""

    def __init__(self, base: Path, same: list[Path], mixed: list[Path], threads: int, runs: int, scale: int) -> None:
        self.base, self.same, self.mixed, self.threads, self.runs, self.scale = base, same, mixed, threads, runs, scale
        self._seed = 0

    def engine(self, adapters: Sequence[Path], **options: Any) -> Engine:
        options = {"parallel": STREAMS, "n_ctx": N_CTX, **options}
        return Engine(self.base, list(adapters), threads=self.threads, chat_template="plain", **options)

    def server(self, adapters: Sequence[Path], parallel: int = STREAMS) -> Any:
        return peers.llama_server(self.base, adapters, threads=self.threads, parallel=parallel, n_ctx=N_CTX)

    def fresh(self, n_words: int) -> str:
        """A prompt that no cache has seen."""
        self._seed += 1
        return prompt(n_words, self._seed)

    def fresh_tokens(self, engine: Engine, count: int) -> str:
        """A prompt of just so many tokens: kernels take rows by fours, so one more costs as much as a token alone."""
        words = self.fresh(count).split()
        while engine.count_tokens(" ".join(words)) > count:
            words.pop()
        while engine.count_tokens(" ".join(words)) < count:
            words.append("a")
        return " ".join(words)

    def against_llama_bench(self) -> Iterator[Row]:
        decode = Row("one stream, no adapter: decode", ">= 0.97 of llama-bench", at_least=0.97)
        prefill = Row("one stream, no adapter: prefill", ">= 0.95 of llama-bench", at_least=0.95)
        with self.engine(self.same[:1]) as engine:
            for _ in range(self.runs):
                text = self.fresh_tokens(engine, PROMPT)
                theirs = peers.llama_bench(self.base, self.threads, PROMPT, self.scale)
                prefill.theirs.append(theirs[0])
                decode.theirs.append(theirs[1])
                done = engine.chat(self.fresh(16), sampling={"temperature": 0, "max_tokens": self.scale})
                decode.ours.append(done.tokens_per_second)
                start = time.perf_counter()
                done = engine.chat(text, sampling={"temperature": 0, "max_tokens": 1})
                prefill.ours.append((done.prompt_tokens - done.cached_tokens) / (time.perf_counter() - start))
        yield from (decode, prefill)

    def against_llama_server(self) -> Iterator[Row]:
        one = Row("one stream, one adapter", ">= 1.0 of llama-server", at_least=1.0)
        shared = Row("8 streams, one adapter", ">= 1.0 of llama-server", at_least=1.0)
        eight = Row("8 streams, 8 adapters", ">= 1.6 of llama-server", at_least=1.6)
        alike = Row("8 streams: 8 adapters beside one", ">= 0.80 of our own with one", at_least=0.80)
        with self.engine(self.same) as engine, self.server(self.same) as server:
            names = engine.adapters
            for _ in range(self.runs):
                for row, streams, adapters in ((one, 1, 1), (shared, STREAMS, 1), (eight, STREAMS, STREAMS)):
                    prompts = [self.fresh(24) for _ in range(streams)]
                    chosen = [i % adapters for i in range(streams)]
                    seconds, done = together(
                        engine, [request(text, self.scale, names[i]) for text, i in zip(prompts, chosen, strict=True)]
                    )
                    row.ours.append(sum(each.completion_tokens for each in done) / seconds)
                    start = time.perf_counter()
                    replies = server.together([(text, self.scale, i) for text, i in zip(prompts, chosen, strict=True)])
                    elapsed = time.perf_counter() - start
                    row.theirs.append(sum(each.completion_tokens for each in replies) / elapsed)
        alike.ours, alike.theirs = eight.ours, shared.ours
        yield from (one, shared, eight, alike)

    def mixed_load(self) -> Iterator[Row]:
        load = Row("64 requests, 16 adapters of mixed rank", ">= 1.6 of llama-server", at_least=1.6)
        waits = Row("the same: longest from request to end beside the mean (s)", "<= 2.0", at_most=2.0)
        rng = np.random.default_rng(7)
        with self.engine(self.mixed, parallel=4 * STREAMS) as engine, self.server(self.mixed, 4 * STREAMS) as server:
            names = engine.adapters
            for _ in range(max(1, self.runs // 2)):
                lengths = [(int(rng.integers(8, 96)), int(rng.integers(4, self.scale))) for _ in range(64)]
                prompts = [self.fresh(n_words) for n_words, _ in lengths]
                numbers = [int(i) for i in rng.integers(0, len(self.mixed), 64)]
                work = list(zip(prompts, (n for _, n in lengths), numbers, strict=True))
                seconds, done = together(engine, [request(text, n, names[i]) for text, n, i in work])
                load.ours.append(sum(each.completion_tokens for each in done) / seconds)
                start = time.perf_counter()
                replies = server.together(work)
                load.theirs.append(sum(each.completion_tokens for each in replies) / (time.perf_counter() - start))
                ends = [_seconds(each) for each in done]
                waits.ours.append(max(ends))
                waits.theirs.append(max(statistics.mean(ends), 1e-9))
        yield from (load, waits)

    def switching(self) -> Iterator[Row]:
        switched = Row("a token after a switch beside one without (ms)", "<= 1 ms more", at_most=1)
        first = Row("first use of a 25 MB adapter on disk beside 100 ms", "<= 1", at_most=1)
        again = Row("500-token prompt, second request: first token (ms)", "<= 0.10 of the first", at_most=0.1)
        with self.engine(self.same[:2]) as engine:
            for run in range(self.runs):
                start = time.perf_counter()
                engine.load_adapter("fresh", self.mixed[4 * (run % 4) + 1])  # rank 16
                first.ours.append(1e3 * (time.perf_counter() - start))
                first.theirs.append(100.0)
                text = self.fresh(430)
                for runs, question in ((again.theirs, "one"), (again.ours, "two")):
                    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
                    runs.append(self._first_token(engine, messages, 0))
            text = self.fresh(8)
            for name in (0, 1):
                self._first_token(engine, text, name)  # from now on a reply takes one token
            for _ in range(4 * self.runs):
                self._first_token(engine, text, 0)
                switched.theirs.append(self._first_token(engine, text, 0))
                switched.ours.append(self._first_token(engine, text, 1))
        switched.at_most = 1 + 1 / statistics.median(switched.theirs)
        yield from (switched, first, again)

    def _first_token(self, engine: Engine, messages: Any, name: int) -> float:
        done = engine.chat(messages, adapter=engine.adapters[name], sampling={"max_tokens": 1})
        return 1e3 * done.seconds_to_first_token

    def memory(self) -> Iterator[Row]:
        """In a process of its own: what this one freed before would be used again, and count for nothing."""
        row = Row("memory of further adapters beside their files (MB)", "<= 1.2", at_most=1.2)
        command = [sys.executable, "-m", "bench.engine_memory", str(self.base), *map(str, self.same)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row.ours.append(float(done.stdout) / 1e6)
        row.theirs.append(sum(path.stat().st_size for path in self.same[1:]) / 1e6)
        yield row

    def busy(self) -> Iterator[Row]:
        row = Row("decode with an adapter, another process on a core", ">= 0.5 of quiet", at_least=0.5)
        with self.engine(self.same[:1]) as engine:
            for _ in range(self.runs):
                row.theirs.append(self._speed(engine))
                with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
                    try:
                        time.sleep(1)
                        row.ours.append(self._speed(engine))
                    finally:
                        other.kill()
        yield row

    def _speed(self, engine: Engine) -> float:
        return engine.submit(request(self.fresh(16), 2 * self.scale, engine.adapters[0])).completion.tokens_per_second


def _seconds(done: Completion) -> float:
    """From a request to its reply's end."""
    decoding = (done.completion_tokens - 1) / done.tokens_per_second if done.tokens_per_second else 0.0
    return done.seconds_to_first_token + decoding


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "llama-bench": Bench.against_llama_bench,
    "llama-server": Bench.against_llama_server,
    "load": Bench.mixed_load,
    "switch": Bench.switching,
    "memory": Bench.memory,
    "busy": Bench.busy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="decoded in each reply")
    parser.add_argument("--only", choices=PARTS, action="append", help="some of the rows")
    given = parser.parse_args()
    peers.build("llama-server", "llama-bench")
    base, same, mixed = files(given.shape, SHAPES[given.shape], given.quant)
    bench = Bench(base, same, mixed, given.threads, given.runs, given.tokens)
    print(f"{base.name}, {given.threads} threads, {given.runs} runs; figures: median (largest / smallest)\n")
    print("| what | edgelora | beside | ratio | bar | |\n|---|---|---|---|---|---|", flush=True)
    short = 0
    for name in given.only or PARTS:
        for row in PARTS[name](bench):
            print(row.line(), flush=True)
            short += not row.holds
    print(f"\n{short or 'no'} rows fall short.")


if __name__ == "__main__":
    main()
