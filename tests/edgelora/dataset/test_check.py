"""What `edgelora data check` finds, in the library and on the screen; tokens are in tests/edgelora/train."""

from __future__ import annotations

import json
import random
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgelora.cli import cli
from edgelora.dataset import DataSource
from edgelora.dataset.check import DataCheck, Level, check_data
from edgelora.dataset.lengths import Bucket, histogram, spread
from edgelora.dataset.repeats import first_of, repeated, shared
from tests.conftest import SHARED

Row = dict[str, Any]
Write = Callable[..., DataSource]


def pair(prompt: str, completion: str = "Yes.") -> Row:
    return {"prompt": prompt, "completion": completion}


def talk(*turns: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(*rows: Row | str, name: str = "data.jsonl") -> DataSource:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return DataSource(str(path))

    return written


def told(found: DataCheck, level: Level) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {finding.text: (finding.count, finding.examples) for finding in found.of(level)}


def test_counts(write: Write) -> None:
    rows = (talk(("system", "s"), ("user", "a"), ("assistant", "b")), talk(("user", "c"), ("assistant", "d")))
    found = check_data([write(*rows)])
    assert [(file.rows, file.bad_rows, file.format) for file in found.files] == [(2, 0, "chat")]
    assert found.roles == {"system": 1, "user": 2, "assistant": 2}
    assert found.turns is not None
    assert (found.turns.smallest, found.turns.largest) == (2, 3)
    assert found.findings == ()
    assert found.passes(strict=True)
    assert found.tokens is None


def test_bad_rows_are_told_by_what_is_wrong_and_by_line(write: Write) -> None:
    bad = [pair("x", "") if line % 3 else "{" for line in range(12)]
    found = check_data([write(*bad, pair("x"))])
    assert told(found, "error") == {
        "rows refused: not JSON (Expecting property name enclosed in double quotes at column 1)": (
            4,
            ("line 1", "line 4", "line 7", "line 10"),
        ),
        "rows refused: `completion` is empty, so nothing to learn from": (
            8,
            tuple(f"line {line}" for line in (2, 3, 5, 6, 8, 9, 11, 12)),
        ),
    }
    assert not found.passes()


def test_different_problems_beyond_measure_are_counted_together(write: Write) -> None:
    found = check_data([write(*[talk((f"bot{n}", "x")) for n in range(130)])])
    assert sum(finding.count for finding in found.findings) == 130
    assert told(found, "error")["rows refused: other problems"][0] == 30


def test_no_rows_is_an_error_that_names_the_file(write: Write) -> None:
    found = check_data([write(pair("x")), write(name="empty.jsonl")])
    assert [finding.text.endswith("empty.jsonl") for finding in found.of("error")] == [True]


def test_repeats(write: Write) -> None:
    rows = [pair("One?"), pair("Two?"), pair("One?"), pair(" one?\n"), pair("Two?", "No."), pair("Three?")]
    found = check_data([write(*rows)])
    assert told(found, "warning") == {
        "rows that repeat an earlier one": (1, ("line 3 like line 1",)),
        "rows that repeat an earlier one but for case and spaces": (1, ("line 4 like line 1",)),
    }
    asked = "rows that ask what an earlier one asks, and answer otherwise"
    assert told(found, "note") == {asked: (1, ("line 5 like line 2",))}
    assert found.passes()
    assert not found.passes(strict=True)


def test_repeats_across_files_name_them(write: Write) -> None:
    found = check_data([write(pair("x"), name="a.jsonl"), write(pair("y"), pair("x"), name="b.jsonl")])
    assert told(found, "warning") == {"rows that repeat an earlier one": (1, ("b.jsonl:2 like a.jsonl:1",))}


def test_odd_turns(write: Write) -> None:
    user, reply = ("user", "a"), ("assistant", "b")
    rows = [
        talk(user, reply),
        talk(("user", " "), reply),
        talk(reply, user, reply),
        talk(user, user, reply),
        talk(user, reply, reply),
    ]
    assert told(check_data([write(*rows)]), "warning") == {
        "rows with an empty turn": (1, ("line 2",)),
        "rows that begin with the assistant": (1, ("line 3",)),
        "rows with two turns of the user's in a row": (1, ("line 4",)),
        "rows with two turns of the assistant's in a row": (1, ("line 5",)),
    }


def test_a_call_that_no_tool_answers(write: Write) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{}"}}]}
    ask, answer, say = ({"role": r, "content": "x"} for r in ("user", "tool", "assistant"))
    tool = {"type": "function", "function": {"name": "now"}}
    rows: list[Row] = [
        {"messages": [ask, call, {**answer, "tool_call_id": "1"}, say], "tools": [tool]},
        {"messages": [ask, call, ask, say]},
    ]
    found = check_data([write(*rows)])
    assert told(found, "warning") == {"rows with a call of a tool that no tool answers": (1, ("line 2",))}
    assert found.with_tools == 1


def test_what_the_model_does_not_see(write: Write) -> None:
    thought = {"role": "assistant", "content": "b", "reasoning_content": "Hm.", "name": "Ann", "audio": None}
    found = check_data([write({"messages": [{"role": "user", "content": "a"}, thought]})])
    assert told(found, "note") == {
        "rows with a field that the model does not see: messages[].reasoning_content": (1, ())
    }
    found = check_data([write({**pair("a"), "id": 1}, {**pair("b"), "id": 2, "note": "x"})])
    assert told(found, "note") == {
        "rows with a field that the model does not see: id": (2, ()),
        "rows with a field that the model does not see: note": (1, ()),
    }


def test_training_rows_in_the_evaluation_data(write: Write) -> None:
    train = write(pair("One?"), pair("Two?"), pair("Three?"))
    held_out = write(pair("ONE?"), pair("Four?"), pair("Two?", "No."), name="eval.jsonl")
    found = check_data([train], [held_out])
    text = "evaluation rows that are in the training data too, but for case and spaces at most"
    assert told(found, "warning") == {text: (1, ("line 1",))}
    text = "evaluation rows that ask what a training row asks, and answer otherwise"
    assert told(found, "note") == {text: (1, ("line 3",))}
    assert [file.rows for file in found.eval_files] == [3]
    assert check_data([train], [write(pair("Four?"), name="eval.jsonl")]).findings == ()


def test_plain_texts_have_no_prompt_to_share(write: Write) -> None:
    assert check_data([write({"text": "One."}, {"text": "Two."})]).findings == ()


def test_preference_pairs(write: Write) -> None:
    good, other = ({"prompt": "q", "chosen": "a", "rejected": text} for text in ("b", "c"))
    found = check_data([write(good, other, {"prompt": "q", "chosen": "a"}, pair("x"))])
    assert [(file.format, file.rows, file.bad_rows) for file in found.files] == [("preference pair", 2, 2)]
    assert "rows refused: no `rejected`; found `prompt`, `chosen`" in told(found, "error")
    assert "rows that repeat an earlier one" not in told(found, "warning")
    assert "rows that repeat an earlier one" in told(check_data([write(good, good)]), "warning")


# ---- Hashes and lengths.


def test_repeats_equal_a_plain_search() -> None:
    values = [random.Random(1).choice(range(0, 40)) for _ in range(100)]
    expected = [i for i, value in enumerate(values) if value and value in values[:i]]
    hashes = array("Q", values)
    assert list(repeated(hashes)) == expected
    assert [first_of(hashes, i) for i in expected] == [values.index(values[i]) for i in expected]
    assert list(shared(hashes, array("Q", [0, 7, 9]))) == [i for i, value in enumerate(values) if value in (7, 9)]


def test_lengths() -> None:
    lengths = array("I", [*range(1, 101), 5000])
    found = spread(lengths)
    assert (found.rows, found.total, found.smallest, found.median, found.largest) == (101, 10050, 1, 51, 5000)
    buckets = histogram(lengths)
    assert sum(bucket.rows for bucket in buckets) == 101
    assert (buckets[0], buckets[-1]) == (Bucket(0, 19, 19), Bucket(120, None, 1))
    assert histogram(array("I", [7])) == [Bucket(7, 7, 1)]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """8,000 rows of 600 bytes: 5 MB of text; hashes and counts take about 40 bytes of each."""
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for n in range(8_000):
            file.write(json.dumps(pair(f"{n} " + "x" * 280, "y" * 280)) + "\n")
    check_data([DataSource(str(path))])  # what is made once
    tracemalloc.start()
    found = check_data([DataSource(str(path))])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.files[0].rows == 8_000
    assert peak < 8_000 * 200


# ---- The command.


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["data", "check", *arguments])


def test_the_screen(write: Write) -> None:
    path = write(pair("One?"), pair("Two?"), pair("One?"), {"prompt": 1, "completion": "x"}).name
    result = run(path)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0].split() == [path, "3", "rows", "prompt/completion", "1", "refused"]
    problem = lines.index("error    rows refused: `prompt` is a JSON number, expected a string")
    assert lines[problem + 1] == "         1: line 4"
    repeat = lines.index("warning  rows that repeat an earlier one")
    assert lines[repeat + 1] == "         1: line 3 like line 1"
    assert "A run would refuse this data." in result.output


def test_exit_codes(write: Write) -> None:
    good, twice = write(pair("x"), name="good.jsonl").name, write(pair("x"), pair("x"), name="twice.jsonl").name
    assert run(good, "--strict").exit_code == 0
    assert run(twice).exit_code == 0
    assert run(twice, "--strict").exit_code == 1
    assert run(f"{good}@half").exit_code == 2
    assert run("nowhere.jsonl").exit_code == 4
    assert run().exit_code == 2
    assert run(good, "--row", "1").exit_code == 2
    assert run(good, "--chat-template", "chatml").exit_code == 2


def test_json(write: Write) -> None:
    path = write(pair("x"), pair("x")).name
    found = json.loads(run(f"{path}@0.5", "--json").output)
    assert found["ok"] is True
    assert found["files"] == [{"name": path, "format": "prompt/completion", "rows": 2, "bad_rows": 0, "weight": 0.5}]
    assert found["warnings"] == [
        {"count": 1, "text": "rows that repeat an earlier one", "examples": ["line 2 like line 1"]}
    ]
    assert found["errors"] == []


def test_unknown_rows_are_told_what_rows_may_be(write: Write) -> None:
    result = run(write({"title": "x"}).name)
    assert result.exit_code == 1
    assert "A row has one of: `messages` (chat)" in result.output


@pytest.mark.parametrize(
    ("name", "rows", "format_"),
    [
        ("gsm8k/test.jsonl", 1319, "prompt/completion"),
        ("rasbt-instruction/instruction-data.json", 1100, "Alpaca"),
        ("sgd/dev.jsonl", 2098, "chat"),
        ("wikitext2/test.txt", 1, "plain text"),
    ],
)
def test_public_data(name: str, rows: int, format_: str) -> None:
    path = SHARED / "datasets" / name
    if not path.is_file():
        pytest.skip(f"needs ../shared/data/datasets/{name}")
    found = json.loads(run(str(path), "--json").output)
    assert found["ok"]
    assert [(file["rows"], file["format"]) for file in found["files"]] == [(rows, format_)]


def test_text_with_labels_is_not_mistaken_for_plain_text() -> None:
    path = SHARED / "datasets" / "banking77" / "test.csv"
    if not path.is_file():
        pytest.skip("needs ../shared/data/datasets/banking77")
    result = run(str(path))
    assert result.exit_code == 1
    assert "rows refused: `text` beside `category`" in result.output
    assert "3,080: line 2, line 3, " in result.output
