"""Rows to conversations: the formats, each way in which a row can be wrong, files, weights, the hub's datasets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from edgelora.dataset import FORMATS, DataSource, conversation_of, format_of, read_conversations
from edgelora.dataset.check import check_data
from edgelora.dataset.source import data_sha256, weighted
from edgelora.errors import DataFileError, SettingsError
from edgelora.messages import Conversation
from edgelora.rows import Row

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read_one(data: dict[str, Any]) -> Conversation:
    found = conversation_of(Row(1, data), "d.jsonl:1")
    assert isinstance(found, Conversation), found
    return found


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


ASKED = [("user", "a"), ("assistant", "b")]
FOUR = [("system", "s"), ("user", "q"), ("assistant", "r"), *ASKED]
SHARE = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@pytest.mark.parametrize(
    ("data", "name", "expected", "templated"),
    [
        (TALK, "chat", ASKED, True),
        ({"messages": json.dumps(TALK["messages"])}, "chat", ASKED, True),
        (SHARE, "ShareGPT", ASKED, True),
        ({"conversations": TALK["messages"]}, "ShareGPT", ASKED, True),
        ({**SHARE, "system": "s"}, "ShareGPT", [("system", "s"), *ASKED], True),
        ({"instruction": "a", "output": "b"}, "Alpaca", ASKED, True),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "Alpaca", ASKED, True),
        ({"instruction": "a", "input": "x", "output": "b"}, "Alpaca", [("user", "a\n\nx"), ("assistant", "b")], True),
        ({"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]}, "Alpaca", FOUR, True),
        ({"prompt": "a", "completion": "b"}, "prompt/completion", ASKED, False),
        ({"prompt": "a", "response": "b"}, "prompt/completion", ASKED, False),
        ({"question": "a", "answer": "b"}, "prompt/completion", ASKED, False),
        ({"text": "b", "id": 3}, "plain text", [("assistant", "b")], False),
    ],
)
def test_formats(data: dict[str, Any], name: str, expected: list[tuple[str, str]], templated: bool) -> None:
    found = read_one(data)
    format_ = format_of(data)
    assert format_ is not None
    assert (format_.name, said(found), found.templated) == (name, expected, templated)
    assert found.plain == (name == "plain text")


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
        ({"title": "x"}, "found `title`"),
        ({"prompt": "x"}, "no `completion`; found `prompt`"),
        ({"answer": "x"}, "or `prompt` and `completion`, or `text`; found `answer`"),
        ({"text": "x", "category": "y"}, "`text` beside `category`"),
        ({"text": " "}, "`text` is empty"),
        ({"text": 1}, "`text` is a JSON number"),
        ({"instruction": "x"}, "`instruction` without `output`"),
        ({"instruction": "x", "output": " "}, "`output` is empty"),
        ({"instruction": 1, "output": "x"}, "`instruction` is a JSON number"),
        ({"instruction": "x", "output": 0}, "`output` is a JSON number"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "`history` is no list"),
        ({"conversations": "x"}, "`conversations` is a JSON string"),
        ({"conversations": []}, "`conversations` is empty"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1 is from 'narrator', expected one of system"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "write a conversation with tools as `messages`"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "turn 1 is from ['human'], expected one of system"),
        ({"conversations": [{"from": "human"}]}, "message 1 has `content` of type null"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "a preference pair"),
        ({"prompt": 3, "completion": "x"}, "`prompt` is a JSON number, expected a string"),
        ({"prompt": "x", "completion": "  "}, "`completion` is empty"),
        ({"prompt": "x", "completion": "broken \ud83d"}, "half of a character"),
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
    path = write(tmp_path / "d.jsonl", "", row)
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


def test_a_file_has_one_format(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", TALK, "", {"prompt": "p", "completion": "c"}, TALK, SHARE)
    with pytest.raises(DataFileError) as caught:
        read_conversations(path)
    third, fifth = caught.value.message.splitlines()
    assert third.startswith(f"{path}:3: a row of the format prompt/completion (`prompt` and `completion`), where row 1")
    assert fifth.startswith(f"{path}:5: a row of the format ShareGPT")
    assert len(read_conversations(write(tmp_path / "d.jsonl", TALK, "", TALK))) == 2  # the twin


def test_containers_hold_the_same(tmp_path: Path) -> None:
    pairs = [{"prompt": "p", "completion": "c"}, {"prompt": "q\nr", "completion": "d, e"}]
    write(tmp_path / "d.jsonl", *pairs)
    (tmp_path / "d.json").write_text(json.dumps(pairs, indent=1))
    (tmp_path / "d.csv").write_text('prompt,completion\np,c\n"q\nr","d, e"\n')
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "d.parquet")
    read = [
        [said(c) for c in read_conversations(tmp_path / f"d.{kind}")] for kind in ("jsonl", "json", "csv", "parquet")
    ]
    assert read[0] == [[("user", "p"), ("assistant", "c")], [("user", "q\nr"), ("assistant", "d, e")]]
    assert all(one == read[0] for one in read)


@pytest.mark.parametrize(
    ("text", "name", "weight", "split"),
    [
        ("a.jsonl", "a.jsonl", 1, ""),
        ("a.jsonl@0.5", "a.jsonl", 0.5, ""),
        ("owner/name@2", "owner/name", 2, ""),
        ("owner/name:test", "owner/name", 1, "test"),
        ("owner/name:train[:10%]@.25", "owner/name", 0.25, "train[:10%]"),
        ("a@b/c.jsonl", "a@b/c.jsonl", 1, ""),
        ("C:/data/a.jsonl", "C:/data/a.jsonl", 1, ""),
    ],
)
def test_how_data_is_named(text: str, name: str, weight: float, split: str) -> None:
    assert DataSource.parse(text) == DataSource(name, weight, split)


@pytest.mark.parametrize("text", ["a.jsonl@", "a.jsonl@x", "a.jsonl@-1", "a.jsonl@0", "", "a.jsonl@nan", "a.jsonl@inf"])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError):
        DataSource.parse(text)


def test_a_file_that_is_there_is_taken_as_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@2").write_text("")
    assert DataSource.parse("a@2") == DataSource("a@2")
    (tmp_path / "data").mkdir()
    assert not DataSource.parse("data/train").is_dataset  # in a folder that is here, and missing
    assert not DataSource.parse("other/train.jsonl").is_dataset
    assert DataSource.parse("other/train").is_dataset
    assert DataSource.parse("data").is_dataset
    (tmp_path / "data/rows.jsonl").write_text("")
    with pytest.raises(DataFileError, match=r"data/rows.jsonl:test: "):  # a file has no splits to name
        read_conversations("data/rows.jsonl:test")


def test_a_weight_draws_without_replacement_and_repeats_beyond_one() -> None:
    rows = list(range(100))
    half = weighted(rows, 0.5, "1/0")
    assert len(half) == len(set(half)) == 50
    assert half == sorted(half) == weighted(rows, 0.5, "1/0")
    assert half != weighted(rows, 0.5, "2/0")
    seen = Counter(weighted(rows, 2.3, "1/0"))
    assert Counter(seen.values()) == {2: 70, 3: 30}
    assert weighted(rows, 1, "1/0") == rows


def test_a_weight_that_leaves_nothing_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(4)]
    few, more = write(tmp_path / "few.jsonl", *rows), write(tmp_path / "more.jsonl", *rows)
    sources = [DataSource(str(few), 0.1), DataSource(str(more))]
    with pytest.raises(DataFileError, match=r"few.jsonl: a weight of 0.1 leaves none of its 4 rows; @0.25 leaves one$"):
        read_conversations(sources)
    assert [finding.text.partition(": ")[2] for finding in check_data(sources).of("error")] == [
        "a weight of 0.1 leaves none of its 4 rows; @0.25 leaves one"
    ]
    assert len(read_conversations(DataSource(str(few), 0.25))) == 1


def test_texts_that_are_json_lists_are_texts(tmp_path: Path) -> None:
    (found,) = read_conversations(write(tmp_path / "d.jsonl", {"prompt": "[3, 1]", "completion": "[1, 3]"}))
    assert [message["content"] for message in found.messages] == ["[3, 1]", "[1, 3]"]


def test_several_files_each_in_its_share_and_format(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", *[{"prompt": f"p{n}", "completion": "c"} for n in range(10)])
    two = write(tmp_path / "two.jsonl", TALK)
    sources = [DataSource(str(one), 0.3), DataSource(str(two), 2)]
    found = read_conversations(sources, seed=5)
    assert [c.source.rpartition("/")[2].partition(":")[0] for c in found] == ["one.jsonl"] * 3 + ["two.jsonl"] * 2
    assert found == read_conversations(sources, seed=5)
    assert found != read_conversations(sources, seed=6)
    write(tmp_path / "two.jsonl", {"prompt": 3, "completion": ""})
    write(tmp_path / "one.jsonl", "x")
    with pytest.raises(DataFileError) as caught:
        read_conversations(sources)
    assert [line.split(": ")[0] for line in caught.value.message.splitlines()] == [f"{one}:1", f"{two}:1"]


def test_the_digest_is_the_files_and_of_several_with_their_weights(tmp_path: Path) -> None:
    import hashlib

    one, two = (write(tmp_path / name, TALK, {"n": name}) for name in ("one", "two"))
    alone = data_sha256([DataSource(str(one))])
    assert alone == hashlib.sha256(one.read_bytes()).hexdigest()
    mixes = [[(one, 1.0), (two, 1.0)], [(two, 1.0), (one, 1.0)], [(one, 0.5), (two, 1.0)], [(one, 0.5)]]
    digests = {data_sha256([DataSource(str(path), weight) for path, weight in mix]) for mix in mixes}
    assert len({alone, *digests}) == 5


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.train
def test_a_folder_is_read_as_a_dataset_of_the_hub_is(offline: Path) -> None:
    folder = offline / "mine"
    folder.mkdir()
    rows = [
        {"messages": TALK["messages"], "note": None},
        {"messages": [*TALK["messages"], *TALK["messages"]], "note": 1},
    ]
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", {"messages": TALK["messages"], "note": 2})
    found = read_conversations(DataSource.parse(str(folder)))
    assert [len(c.messages) for c in found] == [2, 4]
    assert found[1].source == f"{folder}:2"
    assert [c.source for c in read_conversations(DataSource.parse(f"{folder}:test"))] == [f"{folder}:test:1"]
    with pytest.raises(DataFileError, match="dev") as caught:
        read_conversations(DataSource.parse(f"{folder}:dev"))
    assert str(folder) in caught.value.message
    before = data_sha256([DataSource(str(folder))])
    assert before == data_sha256([DataSource(str(folder))])
    write(folder / "train.jsonl", *rows[1:])
    assert data_sha256([DataSource(str(folder))]) != before
    write(folder / "test.jsonl", {"other": "columns"})
    with pytest.raises(DataFileError, match=r"cast|column"):
        read_conversations(DataSource(str(folder)))


@pytest.mark.train
def test_what_is_on_disk_as_datasets_saves_it(offline: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"prompt": "p", "completion": "c"}])
    made.save_to_disk(offline / "one")
    datasets.DatasetDict({"test": made}).save_to_disk(offline / "split")
    for text in (f"{offline}/one", f"{offline}/split:test"):
        assert [said(c) for c in read_conversations(DataSource.parse(text))] == [[("user", "p"), ("assistant", "c")]]
    with pytest.raises(DataFileError, match="no split 'train'"):
        read_conversations(DataSource.parse(f"{offline}/split"))


@pytest.mark.train
def test_a_name_that_is_neither_here_nor_on_the_hub(offline: Path) -> None:
    with pytest.raises(DataFileError, match=r"nobody/nothing \(train\): not a file here, nor a dataset of the hub"):
        read_conversations(DataSource.parse("nobody/nothing"))


def test_shapes_of_all_formats_are_told() -> None:
    with pytest.raises(DataFileError) as caught:
        read_conversations(Path("/dev/null"))
    assert "no rows" in caught.value.message
    assert all(format_.shape in caught.value.hint for format_ in FORMATS if format_.name != "preference pair")
