"""Batches killed with -9 at random moments, in real processes: what they end with is what an undisturbed one wrote."""

from __future__ import annotations

import csv
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelora.batch import BatchOptions, Defaults, run_batch
from edgelora.engine.engine import Engine
from tests.edgelora.batch_worker import some_rows, start_worker, write_rows

DEFAULTS = Defaults(sampling={"temperature": 0.8, "max_tokens": 8})


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(base, adapters, threads=1, parallel=4, reproducible=True) as engine:
        yield engine


def jsonl(path: Path, n: int) -> Path:
    """With bad rows, rows without id, the same row twice and an id used twice."""
    rows: list[Any] = [*some_rows(n), "{bad", *({"prompt": f"no id {i // 2}"} for i in range(20)), some_rows(1)[0]]
    return write_rows(path.with_suffix(".jsonl"), rows)


def openai(path: Path, n: int) -> Path:
    rows = [
        {
            "custom_id": f"q{row['id']}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": row["adapter"], "messages": [{"role": "user", "content": row["prompt"]}]},
        }
        for row in some_rows(n)
    ]
    return write_rows(path.with_suffix(".jsonl"), [*rows, {**rows[0], "url": "/v1/embeddings"}, rows[1]])


def columns(path: Path, n: int) -> Path:
    path = path.with_suffix(".csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "adapter"])
        writer.writeheader()
        writer.writerows(some_rows(n))
    return path


def parquet(path: Path, n: int) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(some_rows(n)), path)
    return path


INPUTS: dict[str, Callable[[Path, int], Path]] = {f.__name__: f for f in (jsonl, openai, columns, parquet)}


def kill(worker: subprocess.Popen[bytes], rng: random.Random) -> bool:
    """Wait for a random moment, before the first row, between two or within one; then kill -9."""
    assert worker.stdout is not None
    if rng.random() < 0.8:
        worker.stdout.read(rng.randint(1, 10))
        time.sleep(rng.random() * 0.01)
    else:
        time.sleep(rng.random() * 0.6)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    return worker.returncode == -signal.SIGKILL


def check(source: Path, order: str, n_kills: int, engine: Engine, base: Path, adapters: dict[str, Path]) -> None:
    whole, out = source.with_name("whole.jsonl"), source.with_name("out.jsonl")
    rng = random.Random(f"{source.name} {order}")
    summary = run_batch(engine, source, whole, defaults=DEFAULTS, options=BatchOptions(ordered=order == "ordered"))
    lines = sorted(whole.read_bytes().splitlines())
    n_killed, sizes = 0, set[int]()
    for _ in range(n_kills):
        n_killed += kill(start_worker(base, adapters, source, out, order), rng)
        kept = out.read_bytes() if out.exists() else b""
        sizes.add(len(kept))
        whole_lines = kept[: kept.rfind(b"\n") + 1].splitlines()
        assert set(whole_lines) <= set(lines)
        assert order == "any" or whole.read_bytes().startswith(kept)
    assert n_killed == n_kills  # or the input was too small for it
    assert len(sizes) > n_kills // 2  # killed at many different stages
    assert run_batch(engine, source, out, defaults=DEFAULTS).resumed < summary.rows
    assert sorted(out.read_bytes().splitlines()) == lines
    assert run_batch(engine, source, out, defaults=DEFAULTS).written == 0
    names = [json.loads(line).get("custom_id", json.loads(line).get("id")) for line in lines]
    assert len(lines) == summary.rows >= len(set(map(str, names)))


@pytest.mark.parametrize(("kind", "order"), [("jsonl", "any"), ("jsonl", "ordered"), ("openai", "any")])
def test_killed_it_ends_as_the_uninterrupted_run(
    kind: str, order: str, engine: Engine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    check(INPUTS[kind](tmp_path / "in", 300), order, 3, engine, base, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["any", "ordered"])
@pytest.mark.parametrize("kind", INPUTS)
def test_killed_twenty_times_it_ends_as_the_uninterrupted_run(
    kind: str, order: str, engine: Engine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    n = 1200 if order == "any" else 2400  # in order, a block of rows is written at once
    check(INPUTS[kind](tmp_path / "in", n), order, 20, engine, base, adapters)
