"""`--schema` and `--grammar` on the real command line: replies that fit, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.test_bad_input import refused, run
from tests.edgelora.json_schemas import PERSON, breaks

WILD = ("--temperature", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0")


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    return path


def test_chat_answers_in_the_schema(tiny_q8: Path, schema: Path) -> None:
    result = run("chat", "Who?", "--base", tiny_q8, "--schema", schema, "--seed", "1", *WILD)
    assert (result.returncode, breaks(json.loads(result.stdout), PERSON)) == (0, ""), result.stderr
    twin = run("chat", "Who?", "--base", tiny_q8, "--max-tokens", "40", "--seed", "1", *WILD)
    assert "age" not in twin.stdout


def test_batch_answers_every_row_in_the_schema_but_those_that_have_their_own(tiny_q8: Path, schema: Path) -> None:
    rows, replies = schema.with_name("rows.jsonl"), schema.with_name("replies.jsonl")
    own = {"type": "integer", "minimum": 3, "maximum": 7}
    rows.write_text("".join(json.dumps({"prompt": f"Who is {n}?"}) + "\n" for n in range(5)))
    with rows.open("a") as file:
        file.write(json.dumps({"prompt": "How many?", "schema": own}) + "\n")
    result = run("batch", rows, "-o", replies, "--base", tiny_q8, "--schema", schema, *WILD)
    assert result.returncode == 0, result.stderr
    answers = {row["line"]: json.loads(row["text"]) for row in map(json.loads, replies.read_text().splitlines())}
    assert 3 <= answers.pop(6) <= 7
    assert [breaks(answer, PERSON) for answer in answers.values()] == [""] * 5


@pytest.mark.parametrize(
    ("option", "text", "code", "told"),
    [
        ("--schema", "{", 4, "not JSON"),
        ("--schema", "[]", 4, "this is list"),
        ("--schema", '{"properties": {"a": {"not": {}}}}', 2, "unsupported keyword not at #/properties/a"),
        ("--grammar", 'root ::= a\na ::= b "c"\n', 2, "line 2, column 7: rule b is not defined"),
    ],
)
def test_a_file_that_cannot_be_used(
    tiny_q8: Path, tmp_path: Path, option: str, text: str, code: int, told: str
) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    refused(run("chat", "hi", "--base", tiny_q8, option, path), code, told)
    refused(run("chat", "hi", "--base", tiny_q8, option, tmp_path / "missing"), 4, "missing")
