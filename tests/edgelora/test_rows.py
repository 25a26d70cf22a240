"""Files of rows: every good row, and a problem for every bad one."""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import DataFileError
from edgelora.rows import JSON_PIECE, read_rows


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


def test_a_column_that_is_there_twice_is_told(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,prompt,,\na,b,c,,\n")
    (bad,) = read_rows(path)
    assert (bad.line, bad.problem.partition(":")[0]) == (1, "the header has `prompt` more than once")
    path.write_text('"prompt"x,completion\na,b\nc,d\n')
    (bad,) = read_rows(path)
    assert bad.problem.startswith("not CSV")
    path.write_text("prompt,completion,,\na,b,,\n")  # as spreadsheets leave them
    assert [row.data for row in read_rows(path)] == [{"prompt": "a", "completion": "b"}]


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


ITEMS: list[Any] = [{"text": "one \u00e9 \U0001f642"}, {"n": [1, {"deep": "]}"}]}, 7, {}, {"text": "x" * 300}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 3, 64, JSON_PIECE])
def test_an_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, indent: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelora.rows.JSON_PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_text("\ufeff\n" + json.dumps(ITEMS, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = list(read_rows(path))
    assert [row.data for row in rows] == [item if isinstance(item, dict) else {} for item in ITEMS]
    assert [row.problem for row in rows] == ["", "", "a JSON number, expected an object", "", ""]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"a": 1}, {"a": 2', "at line 1"),
        ('[{"a": 1},\n\n {"a": nope}]', "Expecting value at line 3"),
        ('[{"a": 1} {"a": 2}]', "expected ',' at line 1"),
        ('[{"a": 1}]\n[]', "something after the end of the array, at line 2"),
        ('[{"a": 1}', "it ends in the middle"),
        ('[{"a": 1}, {"a": "x\n', "Invalid control character at line"),
    ],
)
def test_a_broken_array_says_where_and_what_was_whole_is_kept(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    good, bad = read_rows(path)
    assert good.data == {"a": 1}
    assert told in bad.problem


def test_json_that_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[ ]")
    assert list(read_rows(path)) == []
    path.write_text('"text"')
    assert ["expected '['" in row.problem for row in read_rows(path)] == [True]
    path.write_text('{"a": 1}\n{"a": 2}\n')  # JSONL under another name
    assert [row.data["a"] for row in read_rows(path)] == [1, 2]


def test_a_large_array_is_never_whole_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "word " * 200}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeffOne line.\n\n  Another.\n\n", encoding="utf-8")
    assert [row.data for row in read_rows(path)] == [{"text": "One line.\n\n  Another."}]
    path.write_text("\n \n")
    assert list(read_rows(path)) == []
    path.write_bytes(b"\xff")
    assert [row.problem for row in read_rows(path)] == ["not UTF-8 text (byte 0)"]
