"""Reading datasets: every good row, and a problem for every bad one that names its line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from edgelora.errors import DataFileError
from edgelora.messages import read_conversations, read_rows

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_both_row_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", TALK, "", {"prompt": "p", "completion": "c"})
    chat, pair = read_conversations(path)
    assert [m["content"] for m in chat.messages] == ["a", "b"]
    assert chat.templated
    assert chat.source.endswith("d.jsonl:1")
    assert [m["role"] for m in pair.messages] == ["user", "assistant"]
    assert not pair.templated
    assert pair.source.endswith("d.jsonl:3")


def test_conversational_prompt_and_completion(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]}
    (conversation,) = read_conversations(write(tmp_path / "d.jsonl", row))
    assert [m["content"] for m in conversation.messages] == ["p", "c"]
    assert conversation.templated


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a JSON list, expected an object"),
        ({}, "found no fields"),
        ({"text": "x"}, "found `text`"),
        ({"prompt": "x"}, "expected `messages`, or `prompt` and `completion`"),
        ({"prompt": 3, "completion": "x"}, "`prompt` is a JSON number, expected a string"),
        ({"prompt": "x", "completion": "  "}, "`completion` is empty"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hi"}, "`messages` is a JSON string"),
        ({"messages": ["hi"]}, "message 1 is a JSON string"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot', expected one of system, user"),
        ({"messages": [{"role": "user", "content": None}]}, "`content` of type null"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [*TALK["messages"], {"role": "user", "content": "x"}]}, "the last message is the user's"),
        ({"messages": [*TALK["messages"], {"role": "system", "content": "x"}]}, "message 3 is a system message"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, row: object, told: str) -> None:
    path = write(tmp_path / "d.jsonl", TALK, row)
    with pytest.raises(DataFileError) as caught:
        read_conversations(path)
    assert f"{path}:2: " in caught.value.message
    assert told in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 4


def test_all_bad_rows_are_told_at_once_and_a_flood_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *["x"] * 30, TALK)
    with pytest.raises(DataFileError) as caught:
        read_conversations(path)
    assert f"{path}:8: " in caught.value.message
    assert f"{path}:9: " not in caught.value.message
    assert "and 22 more bad rows" in caught.value.message


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_no_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(text)
    with pytest.raises(DataFileError, match="no rows"):
        read_conversations(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataFileError) as caught:
            list(read_rows(path))
        assert str(path) in caught.value.message


def test_bytes_that_are_no_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\n\xff\xfe\n')
    good, bad = read_rows(path)
    assert good.data == {"prompt": "é"}
    assert bad.problem == "not UTF-8 text"


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('id,prompt,adapter\n1,"two\nlines",support\n2,x,\n3,y\n', encoding="utf-8")
    first, second, short = read_rows(path)
    assert first.data == {"id": "1", "prompt": "two\nlines", "adapter": "support"}
    assert second.data == {"id": "2", "prompt": "x"}
    assert "another length than the header" in short.problem


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"prompt": "x"}\n')

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert [row.data for row in read_rows("-")] == [{"prompt": "x"}]


def test_a_number_with_too_many_digits_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"seed": ' + "9" * 5000 + '}\n{"prompt": "x"}\n')
    bad, good = read_rows(path)
    assert "too many digits" in bad.problem
    assert good.data == {"prompt": "x"}


def test_csv_bad_bytes_spoil_their_row_only_and_fields_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt\n\xff\n" + b"x" * 200_000 + b"\n")
    bad, good = read_rows(path)
    assert bad.problem == "not UTF-8 text"
    assert len(good.data["prompt"]) == 200_000
