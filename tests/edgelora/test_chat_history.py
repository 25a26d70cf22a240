"""The history of conversations: one file, found by words, readable by its owner alone."""

from __future__ import annotations

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from edgelora.chat.history import History
from edgelora.errors import DataFileError, SettingsError
from edgelora.messages import Message


def said(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def kept(history: History, question: str, answer: str, adapter: str = "none") -> int:
    number = history.begin("fennick", question)
    history.add(number, said(question, answer), adapter)
    return number


def test_nothing_is_made_before_something_is_kept(tmp_path: Path) -> None:
    history = History(tmp_path / "store")
    assert history.find() == []
    with pytest.raises(SettingsError, match="no conversation 1"):
        history.read(1)
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_comes_back_in_its_order_with_who_answered(tmp_path: Path) -> None:
    history = History(tmp_path)
    number = kept(history, "one", "first", "red")
    history.add(number, said("two", "second"), "blue")
    assert history.read(number) == [
        ("user", "one", "red"), ("assistant", "first", "red"), ("user", "two", "blue"), ("assistant", "second", "blue"),
    ]  # fmt: skip
    (found,) = history.find()
    assert (found.base, found.title, found.messages, set(found.adapters)) == ("fennick", "one", 4, {"red", "blue"})


def test_every_word_has_to_be_found_and_wildcards_are_letters(tmp_path: Path) -> None:
    history = History(tmp_path)
    bread, boats = kept(history, "bread for 100% of us", "certainly"), kept(history, "boats", "of bread, too")
    assert [each.id for each in history.find("bread")] == [boats, bread]
    assert [each.id for each in history.find("bread US")] == [bread]
    assert [each.id for each in history.find("100%")] == [bread]
    assert history.find("b_eads") == history.find("%x%") == []


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    history = History(tmp_path)
    kept(history, "a", "b")
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600


def test_a_file_that_is_no_history_is_left_alone(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.path.write_text("my notes, not a database, and long enough to be taken for one" * 20)
    before = history.path.read_bytes()
    for use in (lambda: history.begin("x", "y"), history.find):
        with pytest.raises(DataFileError, match=r"history cannot be used.*") as caught:
            use()
        assert "--no-log" in caught.value.hint
    assert history.path.read_bytes() == before


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    history = History(tmp_path)
    kept(history, "a", "b")
    with sqlite3.connect(history.path) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(DataFileError, match="newer edgelora: version 99"):
        history.find()


def test_a_lone_surrogate_and_odd_characters_are_kept_as_far_as_they_can_be(tmp_path: Path) -> None:
    history = History(tmp_path)
    number = kept(history, "caf\u00e9 \udcff \u0000", "\U0001f980")
    assert history.read(number)[0][1] == "caf\u00e9 ? \u0000"


def test_two_chats_at_once_both_are_kept(tmp_path: Path) -> None:
    def talk(name: str) -> None:
        history = History(tmp_path)
        for turn in range(10):
            kept(history, f"{name} {turn}", "yes")

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(History(tmp_path).find(limit=100)) == 20
