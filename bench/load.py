"""A load run of the server: many clients, sixteen adapters, and among the clients some that behave badly.

    python -m bench.load                                     200 clients, three minutes, the bundled base
    python -m bench.load --shape 1.1b --clients 40 --peer    the 1.1B shape; then plain requests, llama-server beside

Before the load each (adapter, prompt) is asked alone, with log probabilities. The start of that answer in which every
token won by more than `SURE` is its marker: rounding, which depends on what else is in the batch, cannot change it.
Only pairs whose marker begins no other adapter's answer to that prompt are asked, so that an answer which begins with
its marker came from its adapter. One that does not, one that never came, and memory that grew end the program with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bench import engine, peers
from bench.convert import ROOT, WORK
from bench.load_client import Answer, Client, body
from bench.shapes import SHAPES
from edgelora.engine.threads import threads_for

BUNDLED = "bundled"
BUNDLED_BASE = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
ADAPTERS, PROMPTS, MARKER_TOKENS, N_CTX = 16, 40, 4, 512
SURE = 0.1
"""Nats between the best token and the next that batching cannot overturn: it moves logits by some thousandths."""
GROWTH_MB = 64
"""What a process may grow by from a quarter of the run to its end. The engine's prompt cache has its size by then."""
START_SECONDS, END_SECONDS = 120, 60
ENDS = ("eos", "eot")
QUARTERS = (0.25, 0.5, 0.75, 1.0)
# What the clients do, and how often.
KINDS = {"stream": 62, "whole": 12, "cancel": 10, "slow": 6, "bad": 10}
BAD: tuple[tuple[bytes, int], ...] = (
    (b"{", 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "base", "prompt": 7}', 400),
    (b'{"model": "base", "prompt": "a", "max_tokens": -1}', 400),
    (b'{"model": "base", "prompt": "a", "temperature": "hot"}', 400),
    (json.dumps({"model": "base", "prompt": "a mill " * 2 * N_CTX}).encode(), 400),
)


@dataclass
class Tally:
    """What became of everything that was asked."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    elapsed: float = 0.0

    def note(self, kind: str, answer: Answer, expected: int = 200) -> None:
        self.counts[kind] += 1
        self.counts["refusals"] += answer.refused
        self.statuses[answer.status] += 1
        self.tokens += answer.tokens
        if answer.problem:
            self.lost.append(f"{kind}: {answer.problem}")
        elif answer.status == 429:
            self.counts["given up"] += 1
        elif answer.status != expected:
            self.wrong.append(f"{kind}: status {answer.status} where {expected} was due: {answer.text[:200]}")
        elif kind in ("stream", "whole"):
            self.seconds.append(answer.seconds)
            if kind == "stream":
                self.first.append(answer.first)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.elapsed

    @property
    def growth(self) -> dict[str, float]:
        """MB from a quarter of the run to its end."""
        if len(self.memory) < 2:
            return {}
        return {name: self.memory[-1][name] - self.memory[0][name] for name in self.memory[0]}


Pair = tuple[str, str]


async def find_markers(client: Client, names: Sequence[str]) -> dict[Pair, str]:
    """What a reply of (adapter, prompt) certainly begins with, where no other adapter's does.

    Prompts are tried until every adapter has a marker for one of them.
    """
    found = dict[Pair, str]()
    for seed in range(PROMPTS):
        prompt = engine.prompt(8, seed)
        choices = {name: await client.whole(name, prompt, MARKER_TOKENS, logprobs=2) for name in names}
        for name, choice in choices.items():
            marker = _sure_start(choice)
            others = (choices[other]["text"] for other in names if other != name)
            if marker and not any(text.startswith(marker) for text in others):
                found[name, prompt] = marker
        if {name for name, _ in found} == set(names):
            break
    return found


def _sure_start(choice: dict[str, Any]) -> str:
    logprobs, text = choice["logprobs"], str(choice["text"])
    for offset, top in zip(logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        best, *others = sorted(top.values(), reverse=True)
        if not others or best - others[0] < SURE:
            text = text[: offset - logprobs["text_offset"][0]]
            break
    return text.partition("\ufffd")[0]


async def run_load(server: Server, client: Client, markers: dict[Pair, str], clients: int, seconds: float) -> Tally:
    """`clients` of every kind for `seconds`, and then until the last of them has its answer."""
    tally, rng = Tally(), client.rng
    prompts: dict[str, list[str]] = {}
    for name, prompt in markers:
        prompts.setdefault(name, []).append(prompt)
    until = time.perf_counter() + seconds

    async def one() -> None:
        await asyncio.sleep(rng.uniform(0, min(2.0, seconds / 4)))
        while time.perf_counter() < until:
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            if kind == "bad":
                content, expected = rng.choice(BAD)
                tally.note(kind, await client.ask(content, until=until), expected)
                continue
            name = rng.choice(list(prompts))  # first the adapter: each is asked as often, however many markers it has
            pair, max_tokens = (name, rng.choice(prompts[name])), rng.randint(4, 48)
            more: dict[str, Any] = {"stream": False, "stream_options": None} if kind == "whole" else {}
            leave_after = rng.uniform(0.001, 0.3) if kind == "cancel" else 0.0
            answer = await client.ask(
                body(*pair, max_tokens, **more), slow=kind == "slow", leave_after=leave_after, until=until
            )
            tally.note(kind, answer)
            marker, cut = markers[pair], kind == "cancel" or answer.reason == "length"
            belongs = answer.text.startswith(marker) or (cut and marker.startswith(answer.text))
            if answer.status == 200 and not answer.problem and (not belongs or answer.tokens > max_tokens):
                tally.wrong.append(f"{pair}: {answer.text!r} ({answer.tokens} of {max_tokens}) is not {marker!r}...")

    async def watch() -> None:
        began = time.perf_counter()
        for part in QUARTERS:
            await asyncio.sleep(max(0.0, began + part * seconds - time.perf_counter()))
            tally.memory.append(server.memory())

    await _together(tally, [*(one() for _ in range(clients)), watch()])
    return tally


async def run_plain(client: Client, choose: Callable[[], bytes], clients: int, seconds: float) -> Tally:
    """Streams alone, read as they come."""
    tally = Tally()
    until = time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < until:
            tally.note("stream", await client.ask(choose(), until=until))

    await _together(tally, [one() for _ in range(clients)])
    return tally


async def _together(tally: Tally, work: Sequence[Awaitable[None]]) -> None:
    began = time.perf_counter()
    await asyncio.gather(*work)
    tally.elapsed = time.perf_counter() - began


@dataclass
class Server:
    """A running `edgelora serve`."""

    url: str
    process: subprocess.Popen[bytes]
    command: list[str]

    def memory(self) -> dict[str, float]:
        """Resident MB of its two processes."""
        front = psutil.Process(self.process.pid)
        (worker,) = [child for child in front.children() if "edgelora.serve.worker" in child.cmdline()]
        return {"front": front.memory_info().rss / 1e6, "engine": worker.memory_info().rss / 1e6}


@contextmanager
def edgelora_server(base: Path, folder: Path, *, threads: int, parallel: int, waiting: int) -> Iterator[Server]:
    """On a free port; it has to end by itself afterwards."""
    command = [
        sys.executable, "-m", "edgelora", "serve", "--base", str(base), "--adapter-dir", str(folder), "--port", "0",
        "--threads", str(threads), "--parallel", str(parallel), "--ctx-size", str(N_CTX),
        "--max-waiting", str(waiting),
    ]  # fmt: skip
    with tempfile.NamedTemporaryFile("w+b", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, cwd=ROOT)
        try:
            yield Server(_address(process, Path(log.name)), process, command)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(END_SECONDS):
                raise RuntimeError(f"edgelora serve ended with {code}: {Path(log.name).read_text()[-2000:]}")
        finally:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"serves at (http://\S+)", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"edgelora serve did not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    return found[1]


def files(shape: str) -> tuple[Path, Path]:
    """A base, and a folder with its adapters."""
    if shape == BUNDLED:
        from converters.base import convert_base

        base = WORK / "load" / "base.gguf"
        base.parent.mkdir(parents=True, exist_ok=True)
        if not base.exists():
            convert_base(BUNDLED_BASE, base, quant="q8_0")
        made = [
            engine.adapter(base.parent / f"mixed-{i}.gguf", base, engine.RANKS[i % len(engine.RANKS)], i)
            for i in range(ADAPTERS)
        ]
    else:
        base, _, made = engine.files(shape, SHAPES[shape], "q4_k_m")
    folder = base.parent / "adapters"
    folder.mkdir(exist_ok=True)
    for number, path in enumerate(made):
        link = folder / f"tenant-{number:02}.gguf"
        if not link.exists():
            os.link(path, link)
    return base, folder


def percentiles(name: str, seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return f"{name}: too few answers"
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{name}: p50 {cuts[49]:.2f} s, p95 {cuts[94]:.2f} s, p99 {cuts[98]:.2f} s"


def report(tally: Tally) -> list[str]:
    """Print the figures; what is wrong with them is given back."""
    counts, answered = tally.counts, sum(tally.statuses.values()) - tally.counts["given up"]
    print(f"requests: {answered} answered in {tally.elapsed:.0f} s, {answered / tally.elapsed:.1f}/s")
    print(f"  of them {', '.join(f'{kind} {counts[kind]}' for kind in KINDS)}")
    print(f"tokens in answers that were read to their end: {tally.tokens}, {tally.tokens_per_second:.0f}/s")
    print(percentiles("time to first token (streams)", tally.first))
    print(percentiles("latency (streams and whole answers)", tally.seconds))
    print(f"refusals: {counts['refusals']} with Retry-After, {counts['given up']} still refused at the end")
    print(f"last status of each: {', '.join(f'{status}: {n}' for status, n in sorted(tally.statuses.items()))}")
    for name, growth in tally.growth.items():
        sizes = ", ".join(f"{each[name]:.0f}" for each in tally.memory)
        print(f"memory of {name} at 25/50/75/100 %: {sizes} MB; growth {growth:+.0f} MB (bound {GROWTH_MB})")
    print(f"wrong answers: {len(tally.wrong)}; lost: {len(tally.lost)}")
    grown = [f"{name} grew by {by:.0f} MB" for name, by in tally.growth.items() if by > GROWTH_MB]
    return [*tally.wrong, *tally.lost, *grown]


async def load(server: Server, given: argparse.Namespace) -> list[str]:
    """Markers, the load, and the server at rest afterwards."""
    async with Client(server.url, given.seed) as client:
        listed = (await client.get("/v1/models"))["data"]
        names = [model["id"] for model in listed if model["id"] != "base"]
        markers = await find_markers(client, names)
        missing = set(names) - {name for name, _ in markers}
        print(f"{len(markers)} pairs of adapter and prompt that can be told from all others")
        if missing or len(names) != ADAPTERS:
            return [f"{len(names)} adapters, and without a marker: {', '.join(sorted(missing)) or 'none'}"]
        tally = await run_load(server, client, markers, given.clients, given.seconds)
        problems = report(tally)
        await asyncio.sleep(1)
        status = await client.get("/status")
        print(f"at rest: {status}", flush=True)
        if status["running"] or status["waiting"] or status["restarts"]:
            problems.append(f"the server is not at rest: {status}")
        return problems


def beside_llama_server(base: Path, folder: Path, given: argparse.Namespace) -> list[str]:
    """Plain streams over prompts that no cache has seen, with as many slots and threads on both sides.

    No reply may end before its length: one side counts the token that ends it, and the other does not.
    """
    from converters.reader import read_header

    metadata = read_header(base).metadata
    endless = {
        str(metadata[f"tokenizer.ggml.{name}_token_id"]): -100
        for name in ENDS
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    problems = list[str]()
    adapters, size = sorted(folder.glob("*.gguf")), {"threads": given.threads, "parallel": given.parallel}

    def measured(url: str, form: Callable[[str, int, int], bytes], used: int) -> Tally:
        async def run() -> Tally:
            async with Client(url, given.seed, keep=False) as client:
                rng, seeds = client.rng, iter(range(1000, sys.maxsize))

                def choose() -> bytes:
                    return form(engine.prompt(rng.randint(8, 48), next(seeds)), rng.randint(8, 48), rng.randrange(used))

                return await run_plain(client, choose, given.clients, given.peer_seconds)

        return asyncio.run(run())

    for used, bar in ((1, 1.0), (ADAPTERS, 1.5)):
        with edgelora_server(base, folder, waiting=given.clients, **size) as server:
            ours = measured(server.url, lambda text, n, i: body(adapters[i].stem, text, n, logit_bias=endless), used)
        with peers.llama_server(base, adapters[:used], n_ctx=N_CTX, **size) as peer:
            url = f"http://127.0.0.1:{peer.port}"
            theirs = measured(
                url, lambda text, n, i: body("base", text, n, lora=[{"id": i, "scale": 1.0}], ignore_eos=True), used
            )
        ratio = ours.tokens_per_second / theirs.tokens_per_second
        print(f"\nplain streams, {used} adapter{'s' * (used > 1)}: {ratio:.2f} of llama-server (bar: >= {bar})")
        for name, tally in (("edgelora", ours), ("llama-server", theirs)):
            requests = len(tally.seconds) / tally.elapsed
            each = tally.tokens / max(1, len(tally.seconds))
            print(
                f"  {name}: {tally.tokens_per_second:.0f} tokens/s, {requests:.1f} requests/s, {each:.1f} tokens each"
            )
            print(f"    {percentiles('time to first token', tally.first)}")
            problems += [f"{name}: {each}" for each in (*tally.wrong, *tally.lost)]
        sys.stdout.flush()
        if ratio < bar:
            problems.append(f"{used} adapters: {ratio:.2f} of llama-server, short of {bar}")
    return problems


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[BUNDLED, *SHAPES], default=BUNDLED)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--parallel", type=int, default=16, help="replies that are written at the same time")
    parser.add_argument("--waiting", type=int, default=64, help="the server's --max-waiting")
    parser.add_argument("--threads", type=int, help="for decoding; by the base's size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", action="store_true", help="plain requests on llama-server too, afterwards")
    parser.add_argument("--peer-seconds", type=float, default=30, help="each of its four runs")
    return parser.parse_args(arguments)


def main() -> None:
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the servers end with this program
    base, folder = files(given.shape)
    given.threads = given.threads or threads_for(base.stat().st_size)
    packages = ("llama-cpp-python", "uvicorn", "fastapi", "httpx")
    print(f"edgelora {version('edgelora')}, Python {platform.python_version()}, {os.cpu_count()} cores; ", end="")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    with edgelora_server(base, folder, threads=given.threads, parallel=given.parallel, waiting=given.waiting) as server:
        print(f"{given.clients} clients for {given.seconds:.0f} s on: {' '.join(server.command[1:])}", flush=True)
        problems = asyncio.run(load(server, given))
    if given.peer:
        peers.build("llama-server")
        problems += beside_llama_server(base, folder, given)
    for problem in problems[:20]:
        print(f"wrong: {problem}", file=sys.stderr)
    print(f"\n{len(problems) or 'no'} problems.")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
