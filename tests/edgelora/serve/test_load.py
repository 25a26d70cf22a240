"""The load run, scaled down; and that it would notice what it is there to notice."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from typing import Any

import pytest

from bench import load
from bench.load_client import Answer, Client
from tests.conftest import ROOT

CLIENTS, SECONDS = 20, 10


def bench_load(*options: str) -> str:
    """What the program prints; it has to find nothing wrong."""
    command = [sys.executable, "-m", "bench.load", "--clients", str(CLIENTS), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_answer_of_a_load_belongs_to_its_adapter() -> None:
    printed = bench_load("--seconds", str(SECONDS), "--parallel", "4")
    assert "wrong answers: 0; lost: 0" in printed
    assert "'running': 0, 'waiting': 0" in printed


def test_a_full_queue_refuses_and_the_clients_come_again() -> None:
    printed = bench_load("--seconds", "4", "--parallel", "2", "--waiting", "1")
    assert "refusals: 0 with" not in printed


@pytest.fixture
def markers() -> dict[load.Pair, str]:
    return {("red", "a"): "The boat", ("blue", "a"): "Five"}


def run(markers: dict[load.Pair, str], answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch) -> load.Tally:
    """A short load on a client that answers as told, by the model's name."""

    class Told(Client):
        async def ask(self, body: bytes, **_: Any) -> Answer:
            await asyncio.sleep(0.01)
            return answers[json.loads(body)["model"]]

    monkeypatch.setattr(load, "KINDS", {"stream": 1})
    server = load.Server("", None, [])  # type: ignore[arg-type]
    monkeypatch.setattr(load.Server, "memory", lambda _self: {"front": 50.0 + random.random()})
    return asyncio.run(load.run_load(server, Told("http://nowhere", 0), markers, 4, 0.3))


def test_right_answers_are_counted(markers: dict[load.Pair, str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = {
        "red": Answer(200, "The boat went", 3, "stop"),
        "blue": Answer(200, "Fi", 1, "length"),
    }
    tally = run(markers, right, monkeypatch)
    assert not tally.wrong
    assert not tally.lost
    assert tally.counts["stream"] > 4
    assert len(tally.memory) == 4


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(200, "The boat went", 3, "stop"), "wrong"),  # another adapter's
        (Answer(200, "Fi", 1, "stop"), "wrong"),  # cut, and not for its length
        (Answer(200, "Five", 999, "stop"), "wrong"),  # longer than was asked for
        (Answer(500, "{}"), "wrong"),
        (Answer(problem="no answer"), "lost"),
    ],
)
def test_wrong_and_lost_answers_are_noticed(
    markers: dict[load.Pair, str], monkeypatch: pytest.MonkeyPatch, answer: Answer, kind: str
) -> None:
    tally = run(markers, {"red": Answer(200, "The boat", 2, "stop"), "blue": answer}, monkeypatch)
    assert getattr(tally, kind)
    assert not getattr(tally, {"wrong": "lost", "lost": "wrong"}[kind])


def test_memory_that_grows_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    tally = load.Tally(elapsed=1.0, memory=[{"front": 50.0}, {"front": 51.0 + load.GROWTH_MB}])
    assert load.report(tally) == [f"front grew by {load.GROWTH_MB + 1} MB"]
    assert "memory of front" in capsys.readouterr().out
