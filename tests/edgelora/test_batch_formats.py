"""OpenAI's batch files and Parquet: read, answered in their shape, resumed by content, refused by name."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora.batch import BatchOptions, BatchSummary, Defaults, run_batch
from edgelora.errors import DataFileError, MissingExtraError, SettingsError
from edgelora.openai_body import plain_fields
from edgelora.rows import read_rows
from tests.edgelora.fake_engine import FakeEngine

MESSAGES = [{"role": "user", "content": "Is it waterproof?"}]


def asked(custom_id: Any = "q1", *, body: Any = None, **more: Any) -> dict[str, Any]:
    body = {"model": "red", "messages": MESSAGES} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **more}


def run(folder: Path, rows: list[Any], **options: Any) -> tuple[BatchSummary, list[dict[str, Any]]]:
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = BatchOptions(**{"ordered": True, **options})
    summary = run_batch(FakeEngine(folder), source, out, options=how)  # type: ignore[arg-type]
    return summary, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_request_is_answered_in_openais_shape(tmp_path: Path) -> None:
    summary, [row] = run(tmp_path, [asked()])
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("q1", None, 200)
    assert row["id"].startswith("batch_req_")
    body = row["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "red")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "red: Is it waterproof?"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 22, "total_tokens": 32}
    assert {name: figures.rows for name, figures in summary.by_adapter.items()} == {"red": 1}


def test_the_model_names_the_adapter_or_the_base(tmp_path: Path) -> None:
    models = ["red", "blue", "none", "base", "fake", None]
    rows = [asked(f"q{i}", body={"model": name, "messages": MESSAGES}) for i, name in enumerate(models)]
    _, answered = run(tmp_path, rows)
    texts = [row["response"]["body"]["choices"][0]["message"]["content"].partition(":")[0] for row in answered]
    assert texts == ["red", "blue", "none", "none", "none", "none"]
    assert [row["response"]["body"]["model"] for row in answered] == ["red", "blue", "none", "base", "fake", "none"]


def test_settings_and_harmless_fields_are_followed(tmp_path: Path) -> None:
    seen = []
    engine = FakeEngine(tmp_path, before_end=lambda stream: seen.append(stream.request))
    body = {
        "model": "red",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "waterproof?"}]},
        ],
        "max_completion_tokens": 7,
        "temperature": 0,
        "stop": ["."],
        "user": "u7",
        "n": 1,
        "stream": False,
        "response_format": {"type": "text"},
        "top_p": None,
    }
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(asked(body=body)))
    assert run_batch(engine, source, tmp_path / "out.jsonl").errors == 0  # type: ignore[arg-type]
    [request] = seen
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it waterproof?"},
    ]
    assert {name: request.sampling[name] for name in ("max_tokens", "temperature", "stop")} == {
        "max_tokens": 7,
        "temperature": 0,
        "stop": ["."],
    }
    assert "top_p" not in request.sampling


SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}}


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_object"}, {}),
        ({"type": "text"}, None),
        (None, None),
    ],
)
def test_a_response_format_is_a_schema(response_format: Any, schema: Any) -> None:
    assert plain_fields({"response_format": response_format}).get("schema") == schema


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another endpoint": (asked(url="/v1/embeddings"), 400, "url is '/v1/embeddings'"),
    "another method": (asked(method="GET"), 400, "method is 'GET'"),
    "an unknown field": (asked(priority=3), 400, "priority"),
    "no body": (asked(body=[]), 400, "body is no object"),
    "an id that is no text": (asked(7), 400, "custom_id is 7, expected text"),
    "several answers": (asked(body={"messages": MESSAGES, "n": 2}), 400, "n is 2, only 1 can be followed here"),
    "a format without its schema": (
        asked(body={"messages": MESSAGES, "response_format": {"type": "json_schema"}}),
        400,
        "response_format is",
    ),
    "several problems": (asked(body={"n": 2, "best_of": 3}), 400, "n is 2, only 1 can be followed here; unknown field"),
    "a number of logprobs": (asked(body={"messages": MESSAGES, "logprobs": 3}), 400, "logprobs is 3, expected true"),
    "candidates without logprobs": (asked(body={"messages": MESSAGES, "top_logprobs": 2}), 400, "top_logprobs is 2"),
    "tools": (asked(body={"messages": MESSAGES, "tools": [{}]}), 400, "tools is"),
    "a setting we do not know": (
        asked(body={"messages": MESSAGES, "reasoning_effort": "low"}),
        400,
        "reasoning_effort",
    ),
    "a picture": (
        asked(body={"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        400,
        "`content` of type list",
    ),
    "no messages": (asked(body={"model": "red"}), 400, "expected either"),
    "an unknown model": (
        asked(body={"model": "gpt-4o", "messages": MESSAGES}),
        404,
        "unknown adapter 'gpt-4o': neither a loaded name (blue, red)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_cannot_be_followed_is_an_error_of_its_row(case: str, tmp_path: Path) -> None:
    bad, status, message = REFUSED[case]
    summary, [first, row, last] = run(tmp_path, [asked("before"), bad, asked("after")])
    assert summary.errors == 1
    assert (first["error"], last["error"]) == (None, None)
    assert row["custom_id"] == bad["custom_id"]
    assert row["response"]["status_code"] == status
    assert message in row["error"]["message"] == row["response"]["body"]["error"]["message"]
    again, _ = run(tmp_path, [asked("before"), bad, asked("after")])
    assert (again.written, again.all_errors) == (0, 1)


def test_requests_are_resumed_by_content(tmp_path: Path) -> None:
    rows = [asked(f"q{i}") for i in range(6)]
    first, before = run(tmp_path, rows[:4])
    more, after = run(tmp_path, rows)
    assert (first.written, more.resumed, more.written) == (4, 4, 2)
    assert after[:4] == before
    rows[2] = asked("q2", body={"model": "blue", "messages": MESSAGES})
    with pytest.raises(DataFileError, match="id 'q2', whose row was edited"):
        run(tmp_path, rows)
    redone, last = run(tmp_path, rows, redo=True)
    assert redone.written == 1
    assert [row["custom_id"] for row in last] == ["q0", "q1", "q3", "q4", "q5", "q2"]


def test_an_id_used_twice_and_one_that_is_missing(tmp_path: Path) -> None:
    rows = [asked("a"), asked("a"), asked("a"), asked(None), "[1]"]
    summary, answered = run(tmp_path, rows)
    assert [row["error"] and row["error"].get("line") for row in answered] == [None, 2, 3, 4, 5]
    assert "was used on line 1 already" in answered[1]["error"]["message"]
    assert run(tmp_path, rows)[0].written == 0
    retried, answered = run(tmp_path, rows, retry_errors=True)
    assert (retried.written, retried.all_errors, len(answered)) == (4, 4, summary.rows)


def test_a_torn_line_of_this_shape_is_repaired(tmp_path: Path) -> None:
    rows = [asked(f"q{i}") for i in range(3)]
    run(tmp_path, rows)
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    for size in (1, 20, 60, 100, len(whole.splitlines()[0]) - 1, len(whole) - 1):
        out.write_bytes(whole[:size])
        run(tmp_path, rows)
        assert out.read_bytes() == whole


def test_an_output_in_the_other_shape_is_not_mixed_with(tmp_path: Path) -> None:
    run(tmp_path, [{"id": "q1", "prompt": "x"}])
    with pytest.raises(DataFileError, match="do not belong to this batch"):
        run(tmp_path, [asked("q1")])


def test_a_prompt_template_has_no_use_here(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(asked()))
    with pytest.raises(SettingsError, match="have their own messages"):
        run_batch(FakeEngine(tmp_path), source, "-", defaults=Defaults(prompt="{body}"))  # type: ignore[arg-type]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


def test_parquet_rows_are_those_of_the_same_jsonl(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": f"Tell me about {i}.", "adapter": "red" if i % 2 else None} for i in range(700)]
    source = write_parquet(tmp_path / "in.parquet", rows)
    read = list(read_rows(source))
    assert [row.data for row in read] == [{k: v for k, v in row.items() if v is not None} for row in rows]
    assert [row.line for row in read] == list(range(1, 701))
    out = tmp_path / "out.jsonl"
    summary = run_batch(FakeEngine(tmp_path), source, out)  # type: ignore[arg-type]
    assert (summary.written, summary.errors) == (700, 0)
    assert run_batch(FakeEngine(tmp_path), source, out).resumed == 700  # type: ignore[arg-type]


def test_parquet_cells_are_as_json_has_them(tmp_path: Path) -> None:
    day = datetime.date(2026, 3, 1)
    row = {"text": "x", "day": day, "tags": ["a", "b"], "nested": {"n": 1}, "empty": None, "score": 0.5, "ok": True}
    [read] = read_rows(write_parquet(tmp_path / "in.parquet", [row]))
    assert read.data == {
        "text": "x",
        "day": "2026-03-01",
        "tags": ["a", "b"],
        "nested": {"n": 1},
        "score": 0.5,
        "ok": True,
    }
    assert read.columns == tuple(row)
    out = tmp_path / "out.jsonl"
    defaults = Defaults(prompt="{day} {tags} {empty}")
    run_batch(FakeEngine(tmp_path), tmp_path / "in.parquet", out, defaults=defaults)  # type: ignore[arg-type]
    assert json.loads(out.read_text())["text"] == 'none: 2026-03-01 ["a", "b"] '


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_refused(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(DataFileError, match=r"in\.parquet: not Parquet that can be read"):
        list(read_rows(tmp_path / "in.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match="needs pyarrow") as caught:
        list(read_rows(tmp_path / "in.parquet"))
    assert "edgelora[parquet]" in caught.value.hint
