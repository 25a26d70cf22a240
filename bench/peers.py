"""llama.cpp's own programs, built from the source package of llama-cpp-python, and a client for its server."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.convert import REFERENCE, ROOT

PEERS = ROOT / "build" / "peers"
# Without matrix tiles: GCC 12 compiles their set-up wrong, and a server built with them dies at its first prompt.
NO_TILES = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if os.uname().machine == "x86_64" else ""
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=ON",
    f"-DCMAKE_C_FLAGS={NO_TILES}", f"-DCMAKE_CXX_FLAGS={NO_TILES}",
)  # fmt: skip
START_SECONDS, REQUEST_SECONDS = 120, 900


def build(*programs: str) -> None:
    """Build what is not there yet: ten minutes on two cores."""
    if all((PEERS / "bin" / name).exists() for name in programs):
        return
    print(f"building {', '.join(programs)} into {PEERS} ...", file=sys.stderr, flush=True)
    PEERS.mkdir(parents=True, exist_ok=True)
    for command in (
        ["cmake", "-S", str(REFERENCE), "-B", str(PEERS), *OPTIONS],
        ["cmake", "--build", str(PEERS), "--parallel", str(os.cpu_count()), "--target", *programs],
    ):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def llama_bench(base: Path, threads: int, n_prompt: int, n_decode: int) -> tuple[float, float]:
    """Tokens a second: (prefill, decode), each the mean of three runs."""
    command = [str(PEERS / "bin" / "llama-bench"), "-m", str(base), "-t", str(threads), "-o", "json", "-r", "3"]
    done = subprocess.run(
        [*command, "-p", str(n_prompt), "-n", str(n_decode)], capture_output=True, text=True, check=True
    )
    by_kind = {row["n_prompt"] > 0: row["avg_ts"] for row in json.loads(done.stdout)}
    return by_kind[True], by_kind[False]


@dataclass(frozen=True)
class Reply:
    """Seconds from the request to its end, and the tokens that it took."""

    seconds: float
    prompt_tokens: int
    completion_tokens: int


class Server:
    """A running llama-server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def complete(self, prompt: str, n_decode: int, adapter: int | None = None) -> Reply:
        """One completion, greedy, of just `n_decode` tokens; `adapter` is the number of a `--lora`."""
        body = {
            "prompt": prompt, "n_predict": n_decode, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
            "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}],
        }  # fmt: skip
        start = time.perf_counter()
        answer = self._post("/completion", body)
        return Reply(time.perf_counter() - start, answer["tokens_evaluated"], answer["tokens_predicted"])

    def together(self, requests: Sequence[tuple[str, int, int | None]]) -> list[Reply]:
        """Several completions, all sent at once."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda request: self.complete(*request), requests))

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            if response.status != 200:
                raise RuntimeError(f"llama-server: {response.status} {text[:500]!r}")
            return json.loads(text)
        finally:
            connection.close()


@contextmanager
def llama_server(
    base: Path, adapters: Sequence[Path], *, threads: int, parallel: int, n_ctx: int, port: int = 18080
) -> Iterator[Server]:
    """A server with `parallel` slots of `n_ctx` tokens, ended afterwards."""
    command = [
        str(PEERS / "bin" / "llama-server"), "-m", str(base), "-t", str(threads), "-np", str(parallel),
        "-c", str(parallel * n_ctx), "--host", "127.0.0.1", "--port", str(port), "--lora-init-without-apply",
    ]  # fmt: skip
    for adapter in adapters:
        command += ["--lora", str(adapter)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        yield Server(port)
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(10 * START_SECONDS):
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise RuntimeError(f"llama-server did not answer within {START_SECONDS} s")
