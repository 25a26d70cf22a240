"""A conversation that is too long: refused, or without its middle where that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from edgelora.engine.engine import Engine
from edgelora.engine.overflow import MARK, shortened
from edgelora.errors import ContextOverflowError, SettingsError
from edgelora.messages import Message


def talk(*contents: str, system: str = "") -> list[Message]:
    roles = ("user", "assistant")
    said: list[Message] = [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


def at_most(length: int):  # type: ignore[no-untyped-def]
    def fits(messages: Sequence[Message]) -> bool:
        return sum(len(each["content"]) for each in messages) <= length

    return fits


def contents(messages: Sequence[Message] | None) -> list[str]:
    assert messages is not None
    return [each["content"] for each in messages]


def test_the_oldest_exchanges_go_and_the_system_message_stays() -> None:
    whole = talk("q1", "a1", "q2", "a2", "q3", system="be kind")
    assert contents(shortened(whole, at_most(13))) == ["be kind", "q2", "a2", "q3"]
    assert contents(shortened(whole, at_most(12))) == ["be kind", "q3"]
    assert contents(shortened(whole, at_most(100))) == contents(whole)


def test_what_stays_begins_with_a_question() -> None:
    assert contents(shortened(talk("q1", "a1", "q2"), at_most(4))) == ["q2"]


def test_the_middle_of_the_longest_message_goes_last() -> None:
    whole = talk("q1", "a1", "x" * 10 + "y" * 80 + "z" * 10)
    (kept,) = contents(shortened(whole, at_most(30)))
    assert len(kept) == 30
    assert kept.startswith("x" * 10) and kept.endswith("z" * 10) and MARK in kept  # noqa: PT018


def test_nothing_fits() -> None:
    assert shortened(talk("question"), at_most(3)) is None


def test_an_engine_refuses_unless_it_is_asked_to_cut(base: Path) -> None:
    long = talk("word " * 20, "yes", "word " * 20, "no", "and now?")
    with Engine(base, n_ctx=64, threads=1) as engine, pytest.raises(ContextOverflowError) as caught:
        engine.chat(long)
    assert "truncate-middle" in caught.value.hint
    with Engine(base, n_ctx=64, threads=1, on_overflow="truncate-middle") as engine:
        whole = engine.count_tokens(long)
        done = engine.chat(long, sampling={"max_tokens": 8})
        assert done.prompt_tokens + done.dropped_tokens == whole
        assert done.prompt_tokens <= 64 - 8
        assert done.dropped_tokens > 20
        assert engine.chat("hi", sampling={"max_tokens": 1}).dropped_tokens == 0
        single = engine.chat("word " * 200, sampling={"max_tokens": 8})
        assert 40 < single.prompt_tokens <= 56


def test_an_unknown_way_is_refused(base: Path) -> None:
    with pytest.raises(SettingsError, match="on_overflow is 'shift', expected error or truncate-middle"):
        Engine(base, on_overflow="shift")
