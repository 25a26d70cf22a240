"""A batch in a process of its own, which can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_rows(n: int = 9) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"Tell me about {i}.", "adapter": ("none", "red", "blue")[i % 3]} for i in range(n)]


WORKER = """
import sys
from pathlib import Path
from edgelora.batch import BatchOptions, Defaults, run_batch
from edgelora.engine.engine import Engine
base, red, blue, rows, out, order = sys.argv[1:]
with Engine(base, {"red": red, "blue": blue}, threads=1, parallel=4, reproducible=True) as engine:
    how = BatchOptions(ordered=order == "ordered")
    defaults = Defaults(sampling={"temperature": 0.8, "max_tokens": 8})
    run_batch(engine, rows, out, defaults=defaults, options=how, on_row=lambda *_: print(".", end="", flush=True))
"""


def start_worker(
    base: Path, adapters: dict[str, Path], rows: Path, out: Path, order: str = "ordered"
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, base, adapters["red"], adapters["blue"], rows, out, order]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
