"""examples/banking77/run.py on a small table of its own: splits, the verdict, and a run that goes on where it ended."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "examples" / "banking77" / "run.py"
CATEGORIES = {
    "card_arrival": "Where is card {}?",
    "top_up_failed": "Why did top up {} fail?",
    "age_limit": "Is {} old?",
}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = util.spec_from_file_location("banking77_run", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, numbers in (("train", range(100)), ("test", range(100, 110))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("text", "category"))
            table.writerows((text.format(n), category) for category, text in CATEGORIES.items() for n in numbers)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_validation_is_a_tenth_of_the_training_split_and_not_trained_on(
    example: ModuleType, data: Path, tmp_path: Path
) -> None:
    example.prepare(data, tmp_path / "out")
    train, validation, test = (rows(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (270, 30, 30)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation + test}
    assert {row["completion"] for row in train} == {"card arrival", "top up failed", "age limit"}


@pytest.mark.parametrize(("gguf", "passed"), [(70.4, True), (69.6, True), (70.6, False), (69.4, False)])
def test_torch_and_f16_may_be_half_a_point_apart(
    example: ModuleType, gguf: float, passed: bool, tmp_path: Path
) -> None:
    run = example.Run(tmp_path, tmp_path, "base", "lora")
    assert example.Result(run, None, 70.0, (gguf, 0.0, 0.0)).passed is passed


@pytest.mark.slow
@pytest.mark.train
def test_it_learns_measures_and_goes_on(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(data), "--method", "full", "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "out" / "results" / "fennick-2.6m-full-test" / "results.json").read_text())
    assert [variant["metrics"]["accuracy"]["rows"] for variant in results["variants"]] == [30, 30, 30]
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "already finished" in again.stderr
    assert "90 answers from before" in again.stderr
    assert [line for line in again.stdout.splitlines() if "full" in line and "ok" in line] == [
        line for line in first.stdout.splitlines() if "full" in line and "ok" in line
    ]
