"""`edgelora batch` on the real command line: formats, templates, what it says at the end, and what it goes on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EDGELORA = str(Path(sys.executable).with_name("edgelora"))
SHORT = ("--max-tokens", "8", "--temperature", "0")


def run(*arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [EDGELORA, "batch", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, stdin=subprocess.DEVNULL)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text("id,review\n" + "".join(f"{n},It broke {n} times.\n" for n in range(40)))
    return path


def test_a_template_a_sample_and_a_report(tiny_q8: Path, adapter: Path, reviews: Path, tmp_path: Path) -> None:
    options = ("-o", "out.jsonl", "--base", tiny_q8, "--adapter", adapter, "--prompt", "Good or bad? {review}", *SHORT)
    result = run(reviews, *options, "--sample", 12, "--report", "report.html", cwd=tmp_path)
    assert "out.jsonl: 12 rows written in" in result.stderr
    header, line = [line.split() for line in result.stderr.splitlines() if line.startswith("  a")]
    assert header == ["adapter", "rows", "errors", "prompt", "tokens", "completion", "tokens", "tokens/s"]
    assert line[:3] == ["adapter", "12", "0"]
    assert len(written(tmp_path / "out.jsonl")) == 12
    assert "<svg" in (tmp_path / "report.html").read_text()
    again = run(reviews, *options, "--ordered", cwd=tmp_path)
    assert "28 rows written in" in again.stderr
    assert "12 done before" in again.stderr
    assert {row["id"] for row in written(tmp_path / "out.jsonl")} == {str(n) for n in range(40)}


def test_a_batch_goes_on_with_as_many_rows_in_each_decode(tiny_q8: Path, reviews: Path, tmp_path: Path) -> None:
    options = (reviews, "-o", "out.jsonl", "--base", tiny_q8, "--prompt", "{review}", *SHORT)
    run(*options, "--limit", 5, "--parallel", 3, cwd=tmp_path)
    assert "5 done before" in run(*options, "--limit", 10, cwd=tmp_path).stderr
    assert {str(row["key"]).rpartition(".")[2] for row in written(tmp_path / "out.jsonl")} == {"3"}
    refused = run(*options, "--limit", 10, "--parallel", 4, cwd=tmp_path, code=4)
    assert "decoded 3 rows at a time and not 4 (--parallel)" in refused.stderr


def test_openais_batch_format(tiny_q8: Path, adapter: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    rows = [
        {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "messages": messages}}
        for n, body in enumerate(({"model": "adapter", "max_tokens": 3}, {"model": "none"}, {"model": "gpt-4o"}))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("in.jsonl", "-o", "out.jsonl", "--base", tiny_q8, "--adapter", adapter, "--ordered", *SHORT)
    result = run(*options, "--strict", cwd=tmp_path, code=1)
    assert "1 rows ended in an error" in result.stderr
    assert [(row["custom_id"], row["error"] is None) for row in written(tmp_path / "out.jsonl")] == [
        ("q0", True),
        ("q1", True),
        ("q2", False),
    ]
    assert "0 rows written" in run(*options, cwd=tmp_path).stderr


def test_a_schema_holds_for_every_row(tiny_q8: Path, reviews: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = (
        "--prompt",
        "{review}",
        "--schema",
        "schema.json",
        "--temperature",
        "0",
        "--max-tokens",
        60,
        "--limit",
        6,
    )
    run(reviews, "-o", "out.jsonl", "--base", tiny_q8, *options, cwd=tmp_path)
    for row in written(tmp_path / "out.jsonl"):
        assert set(json.loads(str(row["text"]))) == {"good"}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--prompt", "{reveiw}"), 2, "names {reveiw}; the columns are id, review"),
        (("--prompt", "{review"), 2, "a single {"),
        (("--prompt", "{review}", "--report", "missing/report.html"), 4, "there is no folder"),
        (("--limit", "0"), 2, "--limit"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_row(
    options: tuple[str, ...], code: int, message: str, tiny_q8: Path, reviews: Path, tmp_path: Path
) -> None:
    assert message in run(reviews, "-o", "out.jsonl", "--base", tiny_q8, *options, cwd=tmp_path, code=code).stderr
    assert not (tmp_path / "out.jsonl").exists()
