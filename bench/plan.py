"""What `edgelora train --plan` reckons, beside what a run takes: peak memory, for shapes, methods and batches.

    python -m bench.plan              some fifteen runs of a few steps each, a fresh process for each
    python -m bench.plan --only tiny  the cases whose name has "tiny" in it

A run's peak is the most resident memory that its process had, less what it had when the libraries were loaded and
nothing else. Ends with 1 where a reckoning is off by more than `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.convert import ROOT, WORK
from bench.shapes import Shape, make_model

TOLERANCE = 0.15
STEPS = 3
BUNDLED = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
SHAPES = {
    "tiny": Shape(256, 512, 2, 4, 2),
    "125m": Shape(768, 2048, 12, 12, 4),
    "280m": Shape(1024, 2816, 18, 16, 8),
}
SMALL = {"batch_size": 4, "gradient_accumulation": 1, "max_length": 256}


@dataclass(frozen=True)
class Case:
    shape: str
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.shape, *(f"{name}={value}" for name, value in self.recipe.items())])


def cases() -> Iterator[Case]:
    yield Case("tiny", {"method": "lora", **SMALL})
    yield Case("tiny", {"method": "full", "batch_size": 8, "gradient_accumulation": 2, "max_length": 512})
    yield Case("bundled", {"method": "lora", "batch_size": 8, "gradient_accumulation": 2, "max_length": 512})
    yield Case("bundled", {"method": "full", "batch_size": 16, "gradient_accumulation": 1, "max_length": 256})
    for method in ("lora", "dora", "qlora", "qdora", "full"):
        yield Case("125m", {"method": method, **SMALL})
    yield Case("125m", {"method": "lora", **SMALL, "gradient_checkpointing": True})
    yield Case("125m", {"method": "full", **SMALL, "gradient_accumulation": 2, "gradient_checkpointing": True})
    yield Case("125m", {"method": "lora", "batch_size": 1, "gradient_accumulation": 4, "max_length": 1024})
    yield Case("280m", {"method": "qlora", "batch_size": 2, "gradient_accumulation": 1, "max_length": 512})
    yield Case("280m", {"method": "lora", "batch_size": 1, "gradient_accumulation": 2, "max_length": 128})


def base_of(shape: str) -> Path:
    if shape == "bundled":
        return BUNDLED
    folder = WORK / f"plan-{shape}"
    return folder if (folder / "config.json").is_file() else make_model(folder, SHAPES[shape])


def write_rows(path: Path) -> Path:
    """Of many lengths, most longer than any case keeps."""
    words = ("the", "lamp", "is", "red", "and", "green", "when", "night", "comes", "over", "hill", "river")
    with open(path, "w", encoding="utf-8") as file:
        for row in range(64):
            said = " ".join(words[(row * 7 + place) % len(words)] for place in range(150 + 37 * row))
            file.write(json.dumps({"prompt": "Say it.", "completion": said}) + "\n")
    return path


def run_once(case: Case, data: Path) -> int:
    """Bytes of a run's peak, in a process of its own."""
    spec = json.dumps({"base": str(base_of(case.shape)), "recipe": case.recipe, "data": str(data)})
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.plan", "--run", spec], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(f"{case.name}: {done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


def train_here(spec: dict[str, Any]) -> int:
    from edgelora.train import Recipe, train
    from edgelora.train.peak_memory import peak_memory

    import_libraries()
    recipe = Recipe(**spec["recipe"], max_steps=STEPS)
    with tempfile.TemporaryDirectory() as folder, peak_memory("cpu") as peak:
        train(Path(spec["data"]), spec["base"], Path(folder) / "run", recipe)
    return peak.value


def import_libraries() -> None:
    """All that a run imports."""
    from edgelora.train import certificate, measured_steps, result, sft, trainer  # noqa: F401
    from edgelora.train.library_log import library_log

    with library_log():
        pass


def reckoned(case: Case, data: Path) -> int:
    from edgelora.train import Recipe
    from edgelora.train.plan import plan

    return plan(data, str(base_of(case.shape)), Recipe(**case.recipe, max_steps=STEPS), measure=False).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(train_here(json.loads(options.run)))
        return
    worst = 0.0
    print("| run | reckoned, MB | measured, MB | ratio |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder) / "rows.jsonl")
        for case in cases():
            if options.only not in case.name:
                continue
            ours, theirs = reckoned(case, data), run_once(case, data)
            worst = max(worst, abs(ours / theirs - 1))
            print(f"| {case.name} | {ours / 1e6:.0f} | {theirs / 1e6:.0f} | {ours / theirs:.2f} |", flush=True)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
