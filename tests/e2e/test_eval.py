"""`edgelora eval` as a user types it: the table, the folder, JSON, exit codes, and a run that was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgelora.cli import cli
from edgelora.evaluation.metrics import METRICS
from tests.conftest import ROOT

EDGELORA = [sys.executable, "-m", "edgelora"]
ROWS = ROOT / "examples" / "data" / "support-eval.jsonl"
QUICK = ["--max-tokens", "8", "--threads", "1", "--ctx-size", "256", "--parallel", "4", "--resamples", "200"]


def run(*argv: object) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, argv)])


def test_a_table_a_folder_and_json(tiny_q8: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(ROWS, "--base", tiny_q8, "--adapter", adapter, "--limit", 4, "-o", out, *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == "perplexity (lower is better)"
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["base", "adapter"]
    assert "better" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json", "rows.jsonl", "work.sqlite"]
    again = run(ROWS, "--base", tiny_q8, "--adapter", adapter, "--limit", 4, "-o", out, "--json", *QUICK)
    assert json.loads(again.stdout) == json.loads((out / "results.json").read_text())
    assert "16 answers from before" in again.stderr


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--max", "perplexity=1"], 1, "adapter: perplexity is"),
        (["--max", "adapter:perplexity=1e9"], 0, ""),
        (["--min", "accuracy=0.5"], 2, "accuracy is not measured"),
        (["--metric", "bleu"], 2, "unknown metric 'bleu'"),
        (["--judge", "http://127.0.0.1:9/v1"], 2, "needs the name of a model"),
        (["--judge-model", "big"], 2, "--judge-model goes with --judge"),
        (["--judge-mode", "pairwise"], 2, "--judge-mode goes with --judge"),
        (["--perplexity", "x.txt"], 2, "one at a time"),
        (["--chunks", "3"], 2, "--chunks: for a text, and DATA has rows"),
        (["--adapter", "missing.gguf"], 3, "missing.gguf"),
        (["--function", "none.py:one"], 4, "none.py: no such file"),
    ],
)
def test_exit_codes(argv: list[str], code: int, said: str, tiny_q8: Path, adapter: Path) -> None:
    given = [] if "--adapter" in argv else ["--adapter", adapter]
    metric = [] if "--metric" in argv else ["--metric", "perplexity"]
    result = run(ROWS, "--base", tiny_q8, *given, *metric, "--limit", 3, *QUICK, *argv)
    assert (result.exit_code, said in result.output) == (code, True), result.output


def test_bad_rows_end_with_4(tiny_q8: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    result = run(rows, "--base", tiny_q8)
    assert (result.exit_code, "rows.jsonl:2: " in result.stderr) == (4, True)


def test_an_adapter_of_another_base_ends_with_3(other_base: Path, adapter: Path) -> None:
    result = run(ROWS, "--base", other_base, "--adapter", adapter, *QUICK)
    assert (result.exit_code, "adapter.gguf" in result.stderr) == (3, True)


def test_perplexity_of_a_text(tiny_q8: Path, adapter: Path, tmp_path: Path) -> None:
    from edgelora.calibration_text import read_calibration
    from edgelora.engine.perplexity import perplexity

    text = tmp_path / "text.txt"
    text.write_text(" ".join(json.loads(line)["messages"][1]["content"] for line in ROWS.read_text().splitlines()))
    common = [
        "--perplexity",
        text,
        "--base",
        tiny_q8,
        "--adapter",
        adapter,
        "--chunk-size",
        64,
        "--chunks",
        4,
        "--threads",
        1,
    ]
    result = run(*common, "--json")
    told = json.loads(result.stdout)["variants"]
    assert (
        told[0]["perplexity"] == perplexity(tiny_q8, read_calibration(text), chunk_size=64, chunks=4, threads=1).value
    )
    assert told[0]["measured"]["value"] == pytest.approx(told[0]["perplexity"])
    assert told[1]["measured"]["compared"]["reference"] == "base"
    assert told[1]["perplexity"] != told[0]["perplexity"]
    assert run(*common, "--max", "perplexity=1").exit_code == 1
    refused = run(*common, "--max-tokens", 3, "--judge-model", "big", "-o", tmp_path / "out")
    assert "--out, --judge-model, --max-tokens: for rows" in refused.stderr


def test_a_killed_run_goes_on(tiny_q8: Path, adapter: Path, tmp_path: Path) -> None:
    """kill -9 in the middle: what was worked out is there, and the results are those of a run that was left alone."""
    argv: list[Any] = ["eval", ROWS, "--base", tiny_q8, "--adapter", adapter, "--limit", 16, *QUICK, "-o"]
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [*EDGELORA, *map(str, argv), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    log = folder / "work.sqlite-wal"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 40_000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    resumed = CliRunner().invoke(cli, [*map(str, argv), str(folder)])
    assert "answers from before" in resumed.stderr
    alone = CliRunner().invoke(cli, [*map(str, argv), str(tmp_path / "alone")])
    assert resumed.exit_code == alone.exit_code == 0
    assert (folder / "results.json").read_text() == (tmp_path / "alone" / "results.json").read_text()


def test_help_names_every_metric() -> None:
    option = next(param for param in cli.commands["eval"].params if param.name == "metrics")
    named = option.help.partition(";")[0].replace(" or ", ", ")  # type: ignore[attr-defined]
    assert [name.partition("=")[0] for name in named.split(", ")] == list(METRICS)
