"""Thousands of broken bodies and broken adapter files against a live server: clear errors, and nothing else moves."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edgelora.engine.engine import Engine
from edgelora.serve.keys import Key, add_key
from tests.edgelora.serve.conftest import Served, serving
from tests.edgelora.serve.right_answers import PROBE, RightAnswers

QUESTION = "Where does the miller live?"
SECONDS = 30.0
"""The longest that one answer may take."""
OUTAGES = {503, 507}
BODIES, FILES = 10_000, 2_000
CONNECTIONS = 4
FOLDER_BATCH = 100

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "red",
        "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": QUESTION}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 3,
        "n": 1,
        "seed": 3,
        "stop": ["\n\n"],
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": -1},
        "frequency_penalty": 0.1,
        "stream": False,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "lora_scale": 0.7,
        "adapters": {"red": 0.7, "blue": 0.3},
        "user": "somebody",
    },
    "/v1/completions": {
        "model": "blue",
        "prompt": ["Once", "upon"],
        "max_tokens": 3,
        "temperature": 0,
        "echo": False,
        "logprobs": 1,
        "stop": "x",
        "n": 1,
    },
    "/v1/embeddings": {"model": "base", "input": ["a text", "another"], "encoding_format": "float"},
    "/v1/load_lora_adapter": {"lora_name": "third", "lora_path": "none.gguf", "scale": 1.0, "if_generation": 0},
    "/v1/unload_lora_adapter": {"lora_name": "third", "if_generation": 3},
}


def told(figures: str) -> None:
    """What `pytest -s` shows."""
    sys.stdout.write(figures + "\n")


# Bodies


def made_one_way(rng: random.Random, ways: list[Callable[[], Any]]) -> Any:
    return rng.choice(ways)()


def oddities(rng: random.Random) -> Any:
    """A value that no client means."""
    return made_one_way(
        rng,
        [
            lambda: None,
            lambda: rng.choice([True, False]),
            lambda: rng.choice([0, -1, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**400]),
            lambda: rng.choice([1e308, -1e308, 5e-324, -0.0, 0.1]),
            lambda: rng.choice(
                ["", "\0", "\ud800", "\udfff\ud800", "../../etc/passwd", "\r\nX-A: b", "%s%n", "🎉" * 9]
            ),
            lambda: "a" * rng.choice([300, 70_000, 400_000]),
            lambda: rng.choice([[], {}, [[]], [None], {"": ""}, [{}], {"\ud800": 1}]),
            lambda: nested(rng.choice([5, 90, 600]), rng.choice(["list", "mapping"])),
            lambda: [rng.randrange(-5, 400) for _ in range(rng.choice([1, 40, 3_000]))],
            lambda: {f"{rng.randrange(1 << 20)}": rng.uniform(-200, 200) for _ in range(rng.choice([1, 400]))},
            lambda: {"type": "json_schema", "json_schema": {"name": "x", "schema": oddities(rng)}},
        ],
    )


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


def mutated(value: Any, rng: random.Random) -> Any:
    """The same body with something in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {other: kept for other, kept in value.items() if other != name}
        if kind < 0.2:
            return {**value, rng.choice(["", "\ud800", "prompt", "tools", "x" * 500, name.upper()]): oddities(rng)}
        return {**value, name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return oddities(rng)


def damaged(data: bytes, rng: random.Random) -> Any:
    """The bytes of a body, no longer JSON or no longer UTF-8, or JSON that Python alone takes for such."""
    at = rng.randrange(len(data))
    return made_one_way(
        rng,
        [
            lambda: data[:at],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0"]) + data[at:],
            lambda: data.replace(b": 3", rng.choice([b": NaN", b": Infinity", b": -Infinity", b": 1e999", b": 03"]), 1),
            lambda: data.replace(b": 3", b": " + b"9" * 5_000, 1),
            lambda: b"[" * rng.choice([10, 100_000]),
            lambda: b'{"a":' * 50_000,
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode().encode("utf-16"),
            lambda: data + data,
            lambda: b"",
        ],
    )


@dataclass(frozen=True)
class Thrown:
    """A request as it goes over the wire.

    Attributes:
        is_whole: what its headers announce comes.
    """

    path: str
    body: bytes
    data: bytes
    is_whole: bool


def request_of(rng: random.Random, secret: str) -> Thrown:
    path = rng.choice(list(VALID))
    body = VALID[path]
    if path == "/v1/chat/completions" and rng.random() < 0.6:  # a scale and a blend exclude each other
        body = {name: value for name, value in body.items() if name not in ("adapters", "stream_options")}
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        body = mutated(body, rng)
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        data = damaged(data, rng)
    headers = {"Host": "localhost", "Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    framing, is_whole = rng.random(), True
    if framing < 0.08:
        cuts = [data[at : at + 1_000] for at in range(0, len(data), 1_000)]
        sent = b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in cuts) + b"0\r\n\r\n"
        headers["Transfer-Encoding"] = "chunked"
    elif framing < 0.16:
        sent = data
        wrong = [len(data) + 7, max(0, len(data) - 7), -1, "x", "9" * 19, "9" * 25, "9" * 5_000, "1e3", ""]
        headers["Content-Length"], is_whole = str(rng.choice(wrong)), False
    elif framing < 0.18:
        sent = rng.choice([b"zz\r\n" + data, b"ffffffffffffffff\r\n" + data, b"5\r\nab"])
        headers["Transfer-Encoding"], is_whole = "chunked", False
    else:
        sent = data
        headers["Content-Length"] = str(len(data))
    if rng.random() < 0.03:
        headers["X-Request-Id"] = "x" * rng.choice([1, 64, 65, 5_000])
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return Thrown(path, data, f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + sent, is_whole)


@dataclass
class Wire:
    """A connection that is kept as long as the server keeps it."""

    address: tuple[str, int]
    kept: socket.socket | None = field(default=None)

    def ask(self, data: bytes, is_whole: bool) -> tuple[int, str, bytes]:
        """Status, media type and body; status 0 where the server hung up without an answer, as it may on half a
        request."""
        reused, connection = self.kept is not None, self.kept or socket.create_connection(self.address, SECONDS)
        self.kept, keeps = None, False
        try:
            try:
                connection.sendall(data)
                if not is_whole:  # it waits for the rest, which does not come
                    connection.settimeout(0.05)
                    connection.recv(1, socket.MSG_PEEK)
                    connection.settimeout(SECONDS)
            except TimeoutError:
                return 0, "", b""
            except ConnectionError:  # it has heard enough, and answered
                connection.settimeout(SECONDS)
            response = http.client.HTTPResponse(connection)
            response.begin()
            answer = response.status, response.headers.get_content_type(), response.read()
            keeps = is_whole and not response.will_close
            return answer
        except (http.client.HTTPException, ConnectionError):
            if is_whole and reused:  # it was closed meanwhile: ask once more, on another
                return self.ask(data, is_whole)
            return 0, "", b""
        finally:
            if keeps:
                self.kept = connection
            else:
                connection.close()


def check_error(status: int, kind: str, body: bytes) -> None:
    """An error is OpenAI's shape, without a path of this machine or a trace."""
    assert kind == "application/json", body[:300]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "/tmp" not in error["message"], error
    assert "Traceback" not in error["message"], error


@dataclass
class Fuzzed:
    """A server with its admin's secret, and what it says when all is well."""

    served: Served
    secret: str
    right: RightAnswers
    known: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.served.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def said(self) -> dict[str, str]:
        return {
            name: self.served.chat(QUESTION, name)["choices"][0]["message"]["content"]
            for name in ("red", "blue", "base")
        }

    def is_unmoved(self) -> None:
        """It says what it said, on the engine that it began with."""
        assert self.served.process.poll() is None, self.served.log.read_text()[-3000:]
        assert self.said() == self.known
        assert self.served.state()["restarts"] == 0, self.served.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def fuzzed(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder = tmp_path_factory.mktemp("fuzz") / "adapters"
    folder.mkdir()
    for name, path in adapters.items():
        shutil.copy(path, folder / f"{name}.gguf")
    keys = folder.parent / "keys.toml"
    secret = add_key(keys, Key("boss", frozenset({"*"}), admin=True))
    with (
        Engine(base, adapters, threads=1, n_ctx=512) as engine,
        serving(base, folder, "--max-body", "1", "--max-upload", "4", keys=keys) as served,
    ):
        made = Fuzzed(replace(served, headers={"Authorization": f"Bearer {secret}"}), secret, RightAnswers(engine))
        made.known = made.said()
        assert len(set(made.known.values())) == 3
        yield made


def throw_bodies(fuzzed: Fuzzed, seeds: range) -> Counter[str]:
    """Over several connections at once; every answer is looked at."""
    statuses, wire, slowest = Counter[str](), Wire(fuzzed.address), 0.0
    answered = list[tuple[Thrown, str, bytes]]()
    for seed in seeds:
        thrown, began = request_of(random.Random(seed), fuzzed.secret), time.monotonic()
        status, kind, body = wire.ask(thrown.data, thrown.is_whole)
        slowest = max(slowest, time.monotonic() - began)
        statuses[str(status)] += 1
        where = f"seed {seed}: {status} {body[:300]!r}\n{thrown.data[:600]!r}"
        assert status < 500 or status in OUTAGES, where
        assert status or not thrown.is_whole or len(thrown.data) > 1 << 20, where
        if status >= 400 and kind != "text/plain":  # what is no HTTP at all is answered by the parser of HTTP
            check_error(status, kind, body)
        elif status >= 400:
            assert body == b"Invalid HTTP request received.", where
        elif status == 200:
            answered.append((thrown, kind, body))
    if wire.kept:
        wire.kept.close()
    for thrown, kind, body in answered:
        statuses["right" if fuzzed.right.check(thrown.path, thrown.body, kind, body) else "without a seed"] += 1
    assert slowest < SECONDS
    return statuses


def on_connections(work: Callable[[range], Counter[str]], seeds: range) -> Counter[str]:
    """The seeds shared among as many connections as there may be."""
    began = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = sum(pool.map(work, [seeds[at::CONNECTIONS] for at in range(CONNECTIONS)]), Counter[str]())
    told(f"{len(seeds)} in {time.monotonic() - began:.1f} s: {dict(sorted(found.items()))}")
    return found


def test_ten_thousand_broken_bodies_are_refused_and_move_nothing(fuzzed: Fuzzed) -> None:
    statuses = on_connections(lambda seeds: throw_bodies(fuzzed, seeds), range(BODIES))
    assert statuses["400"] > BODIES // 3
    assert statuses["right"] > BODIES // 100  # some mutations leave a request that can be answered
    fuzzed.is_unmoved()


# Adapter files


def tensor_start(data: bytes) -> int:
    """Roughly where the header of an adapter's file ends: its tensors take most of it."""
    return max(data.rfind(b".lora_b"), data.rfind(b".lora_a")) + 64


def broken_file(data: bytes, rng: random.Random) -> Any:
    """An adapter's file with something wrong in it, or something different."""
    end, made = tensor_start(data), bytearray(data)

    def flip(low: int, high: int, times: int) -> bytes:
        for _ in range(times):
            made[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        return bytes(made)

    def number(at: int, size: int) -> bytes:
        value = rng.choice([0, 1, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1, 1 << 63])
        made[at : at + size] = struct.pack("<Q", value)[:size]
        return bytes(made)

    def swap() -> bytes:
        first, second = sorted(rng.sample(range(24, end - 8), 2))
        made[first : first + 8], made[second : second + 8] = made[second : second + 8], made[first : first + 8]
        return bytes(made)

    return made_one_way(
        rng,
        [
            lambda: flip(0, 24, 1),
            lambda: flip(24, end, rng.choice([1, 1, 8, 64])),
            lambda: flip(24, end, rng.choice([1, 2])),
            lambda: flip(end, len(data), rng.choice([1, 8, 500])),
            lambda: data[: rng.randrange(len(data))],
            lambda: data[: rng.randrange(end)],
            lambda: number(rng.choice([4, 8, 16]), 8),
            lambda: number(rng.randrange(24, end - 8), rng.choice([4, 8])),
            swap,
            lambda: data[:end] + bytes(rng.randrange(256) for _ in range(64)) * ((len(data) - end) // 64),
            lambda: data[:end] + struct.pack("<f", float("nan")) * ((len(data) - end) // 4),
            lambda: data + data[: rng.randrange(1, 4096)],
            lambda: rng.randbytes(rng.choice([0, 1, 3, 24, 5_000])),
        ],
    )


def put(connection: http.client.HTTPConnection, fuzzed: Fuzzed, path: str, data: bytes) -> tuple[int, bytes]:
    headers = {"Host": "localhost", "Authorization": f"Bearer {fuzzed.secret}"}
    connection.request("PUT", path, data, headers)
    response = connection.getresponse()
    return response.status, response.read()


def upload(fuzzed: Fuzzed, source: bytes, seeds: range, name: str, folder: Path) -> Counter[str]:
    outcomes, file = Counter[str](), folder / f"{name}.gguf"
    with closing(http.client.HTTPConnection(*fuzzed.address, timeout=SECONDS)) as connection:
        for seed in seeds:
            data = broken_file(source, random.Random(seed))
            status, body = put(connection, fuzzed, f"/v1/adapters/{name}", data)
            outcomes[f"upload {status}"] += 1
            assert status in (201, 400), f"seed {seed}: {status} {body[:300]!r}"
            if status != 201:
                check_error(status, "application/json", body)
                continue
            file.write_bytes(data)
            outcomes[probe(fuzzed, name, file)] += 1
    return outcomes


def probe(fuzzed: Fuzzed, name: str, file: Path) -> str:
    """What came in can be asked, says what it says alone, and harms nobody."""
    answer = fuzzed.served.post("/v1/completions", {"model": name, **PROBE})
    right = fuzzed.right.probe(file)
    if right is None:
        assert answer.status_code == 500, f"{name}: {answer.text}"
        check_error(answer.status_code, "application/json", answer.content)
        return "no numbers"
    assert answer.status_code == 200, f"{name}: {answer.text}"
    assert answer.json()["choices"][0]["text"] == right, name
    return "right"


def drop(fuzzed: Fuzzed, data: bytes, seeds: list[int]) -> Counter[str]:
    names = {f"bad{seed}": broken_file(data, random.Random(seed)) for seed in seeds}
    for name, content in names.items():
        partial = fuzzed.served.folder / f".{name}.new"
        partial.write_bytes(content)
        os.replace(partial, fuzzed.served.folder / f"{name}.gguf")

    def all_seen() -> dict[str, dict[str, Any]]:
        found = fuzzed.served.models(everything=True)
        return found if names.keys() <= found.keys() else {}

    listed = fuzzed.served.until(all_seen)
    outcomes = Counter[str]()
    for name in names:
        about = listed[name]["edgelora"]
        outcomes[f"folder {about['state']}"] += 1
        assert about["state"] in ("ready", "refused"), f"{name}: {about}"
        if about["state"] == "refused":
            assert about["problem"], name
            assert str(fuzzed.served.folder) not in about["problem"]
        else:
            outcomes[probe(fuzzed, name, fuzzed.served.folder / f"{name}.gguf")] += 1
        (fuzzed.served.folder / f"{name}.gguf").unlink()
    fuzzed.served.until(lambda: not names.keys() & fuzzed.served.models(everything=True).keys())
    assert fuzzed.served.state()["restarts"] == 0, f"one of {sorted(names)} killed the engine"
    return outcomes


def test_two_thousand_broken_files_stay_out_and_move_nothing(
    fuzzed: Fuzzed, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Half of them are uploads, half are dropped into the folder in batches."""
    source = adapters["red"].read_bytes()

    def uploads(seeds: range) -> Counter[str]:
        return upload(fuzzed, source, seeds, f"odd{seeds.start % CONNECTIONS}", tmp_path)

    outcomes = on_connections(uploads, range(FILES // 2))
    for start in range(FILES // 2, FILES, FOLDER_BATCH):
        outcomes.update(drop(fuzzed, source, list(range(start, start + FOLDER_BATCH))))
    told(f"{FILES} files: {dict(sorted(outcomes.items()))}")
    assert outcomes["upload 400"] > FILES // 4
    assert outcomes["folder refused"] > FILES // 4
    assert outcomes["right"] > FILES // 100
    fuzzed.is_unmoved()
