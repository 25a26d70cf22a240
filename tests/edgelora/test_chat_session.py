"""A conversation with several adapters: who is compared, at which scale, and what the history gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora.chat.columns import side_by_side
from edgelora.chat.history import History
from edgelora.chat.session import Session
from edgelora.engine.engine import Engine
from edgelora.errors import DataFileError, SettingsError

GREEDY = {"temperature": 0, "max_tokens": 12}
QUESTION = "Tell me about Fennick."


@pytest.fixture
def session(engine: Engine) -> Session:
    return Session(engine, adapter="red", sampling=GREEDY)


def lone(engine: Engine, adapter: str | None, scale: float | None = None) -> str:
    return engine.chat(QUESTION, adapter=adapter, scale=scale, sampling=GREEDY).text


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("", ["none", "red", "blue"]),
        ("base,blue ", ["none", "blue"]),
        ("blue ", ["blue"]),
        ("red,red,blue ", ["red", "blue"]),
    ],
)
def test_compare_asks_whom_it_is_told(session: Session, argument: str, names: list[str]) -> None:
    lines = list(session.command(f"/compare {argument}{QUESTION}"))
    assert lines == [f"[{name}] {lone(session.engine, name)}" for name in names]
    assert session.messages == []


def test_compare_without_a_question_asks_the_last_one(session: Session) -> None:
    session.keep(QUESTION, "something")
    (line,) = session.command("/compare blue")
    assert line == f"[blue] {lone(session.engine, 'blue')}"
    assert len(session.messages) == 2


def test_a_scale_is_the_adapters_own_and_stays_when_another_answers(session: Session) -> None:
    list(session.command("/scale blue 0.5"))
    list(session.command("/adapter blue"))
    assert session.describe_adapter() == "blue at scale 0.5"
    assert session.ask(QUESTION).completion.text == lone(session.engine, "blue", 0.5)
    list(session.command("/adapter red"))
    assert session.describe_adapter() == "red"


@pytest.mark.parametrize(
    "line", ["/scale", "/scale much", "/scale green 1", "/scale red 1 2", "/scale nan", "/compare green,red x"]
)
def test_mistakes_change_nothing(session: Session, line: str) -> None:
    with pytest.raises(SettingsError):
        list(session.command(line))
    assert (session.scales, session.adapter) == ({}, "red")


def test_a_reset_begins_another_conversation_in_the_history(engine: Engine, tmp_path: Path) -> None:
    session = Session(engine, history=History(tmp_path))
    session.keep("one", "1")
    session.keep("two", "2")
    list(session.command("/reset"))
    session.keep("three", "3")
    assert [each.title for each in History(tmp_path).find()] == ["three", "one"]


def test_a_history_that_cannot_be_written_costs_nothing_but_itself(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "history.sqlite3").mkdir()
    session = Session(engine, history=History(tmp_path))
    with pytest.raises(DataFileError):
        session.keep("one", "1")
    session.keep("two", "2")
    assert len(session.messages) == 4


def test_columns_hold_whole_words_and_empty_lines() -> None:
    lines = list(side_by_side({"a": "one two three four five six", "b": "x\n\ny"}, 50))
    assert lines == [
        "[a]                       [b]",
        "one two three four five   x",
        "six",
        "                          y",
    ]
    assert list(side_by_side({"a": "one", "b": "two"}, 40)) == ["[a] one", "[b] two"]
