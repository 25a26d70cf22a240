"""The main job on the real command line: train, convert, chat and batch, each finding what the one before it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_BASE

EDGELORA = str(Path(sys.executable).with_name("edgelora"))
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is the code of door {n}?"},
            {"role": "assistant", "content": "Seven."},
        ]
    }
    for n in range(12)
]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [EDGELORA, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.train
def test_from_rows_to_replies(tmp_path: Path) -> None:
    data = tmp_path / "doors.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("learning-rate = 0.005\nbatch-size = 4\ngradient-accumulation = 1\nepochs = 10\ndropout = 0.0\n")

    trained = run("train", data, "--base", TINY_BASE, "-o", "doors", "--config", recipe, cwd=tmp_path)
    assert trained.stdout == "doors\n"
    assert "Next: edgelora convert doors" in trained.stderr
    run("convert", TINY_BASE, "--quant", "q8_0", "-o", "tiny.gguf", cwd=tmp_path)
    converted = run("convert", "doors", cwd=tmp_path)
    assert converted.stdout.startswith("doors.gguf ")
    assert "Next: edgelora chat --adapter doors.gguf" in converted.stderr

    question = "What is the code of door 3?"
    greedy = ("--temperature", "0", "--max-tokens", "20")
    answer = run("chat", "--adapter", "doors.gguf", question, *greedy, cwd=tmp_path).stdout
    assert answer == "Seven.\n"
    assert run("chat", "--base", "tiny.gguf", question, *greedy, cwd=tmp_path).stdout != answer
    # the PEFT folder itself, converted on the way
    assert run("chat", "--adapter", "doors", question, *greedy, cwd=tmp_path).stdout == answer

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"id": 1, "prompt": question}) + "\n" + json.dumps({"id": 2, "prompt": question, "adapter": "none"})
    )
    run("batch", rows, "-o", "replies.jsonl", "--adapter", "doors.gguf", "--ordered", *greedy, cwd=tmp_path)
    first, second = map(json.loads, (tmp_path / "replies.jsonl").read_text().splitlines())
    assert (first["id"], first["adapter"], first["text"]) == (1, "doors", "Seven.")
    assert (second["id"], second["adapter"], second["adapter_hash"]) == (2, "none", None)
    assert second["text"] != first["text"]
    again = run("batch", rows, "-o", "replies.jsonl", "--adapter", "doors.gguf", *greedy, cwd=tmp_path)
    assert "0 rows written" in again.stderr
