"""Two real processes that train one adapter together, as torchrun starts them (gloo, on the CPU)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgelora.train import Recipe, train

from .conftest import read_metrics

pytestmark = pytest.mark.train

# Gradients of two halves are summed instead of one whole: float32 rounds them otherwise, and Adam's first steps divide
# by their size.
SAME_TRAJECTORY = 1e-4
SECONDS = 240
SETTINGS = {"rank": 4, "alpha": 8, "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 2, "logging_steps": 1}


def options(**settings: object) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def launch(data: Path, base: Path, folder: Path, *more: str, **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "edgelora", "train", str(data), "--base", str(base), "-o", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, *options(**{**SETTINGS, **settings}), *more], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def losses(folder: Path) -> Sequence[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_two_processes_learn_what_one_learns_with_the_same_rows_a_step(base: Path, data: Path, tmp_path: Path) -> None:
    shared = {"max_steps": 6, "save_steps": 3, "certificate_probes": 1}
    process = launch(data, base, tmp_path / "two", gradient_accumulation=1, **shared)
    train(data, str(base), tmp_path / "one", Recipe(**SETTINGS, **shared, gradient_accumulation=2))  # type: ignore[arg-type]
    answer, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert answer.splitlines() == [str(tmp_path / "two")]  # the first process alone talks
    assert said.count("the optimizer sees 4 rows") == 1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, abs=SAME_TRAJECTORY)
    assert len({round(loss, 3) for loss in one}) == 6  # it did learn
    written = {path.name for path in (tmp_path / "two").iterdir()}
    assert written == {path.name for path in (tmp_path / "one").iterdir()}
    states = {path.name for path in (tmp_path / "two/checkpoints/checkpoint-6").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}  # what an exact --resume needs of each


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_both(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    process = launch(data, base, tmp_path, max_steps=2)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert "not empty, and not a training run" in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_an_interrupt_stops_both_after_the_same_step_and_resuming_ends_as_without_it(
    base: Path, data: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 60, "save_steps": 1000, "gradient_accumulation": 1, "certificate_probes": 0}
    process, folder = launch(data, base, tmp_path / "broken", **settings), tmp_path / "broken"
    deadline = time.monotonic() + SECONDS
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert "is kept; go on with --resume" in said, said
    done = read_metrics(folder)[-1]["step"]
    assert 0 < done < 60
    again = launch(data, base, folder, "--resume", **settings)
    _, said = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, said
    whole = launch(data, base, tmp_path / "whole", **settings)
    _, said = whole.communicate(timeout=SECONDS)
    assert whole.returncode == 0, said
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), abs=SAME_TRAJECTORY)
