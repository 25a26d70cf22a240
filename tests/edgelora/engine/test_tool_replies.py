"""Replies of the real engine that may call tools: what is called, what fits, and whose log probabilities are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edgelora.engine.engine import Engine
from edgelora.engine.model import Model
from edgelora.engine.sampler import Sampler
from edgelora.engine.stream import Completion, Piece, Request
from edgelora.errors import SettingsError
from tests.edgelora.json_schemas import PERSON, breaks
from tests.edgelora.test_tools import CALL, HERMES_TEMPLATE, NOW, QUESTION, WEATHER

STRICT = {"type": "function", "function": {**NOW["function"], "strict": True}}


@pytest.fixture(scope="module")
def engine(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    template = tmp_path_factory.mktemp("template") / "hermes.jinja"
    template.write_text(HERMES_TEMPLATE, encoding="utf-8")
    with Engine(base, chat_template=str(template), n_ctx=512) as engine:
        yield engine


def answered(engine: Engine, **asked: Any) -> tuple[list[Piece], Completion]:
    """A reply's pieces, and the account of it."""
    sampling = {"max_tokens": 200, "seed": 1, **asked.pop("sampling", {})}
    stream = engine.submit(Request([QUESTION], sampling=sampling, **asked))
    pieces = [piece for piece in stream if isinstance(piece, Piece)]
    return pieces, stream.completion


def said(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str, **asked: Any) -> tuple[list[Piece], Completion]:
    """The same for a model that writes `text`."""
    with closing(Model(engine.base, vocab_only=True)) as model:
        tokenizer = model.tokenizer
        script = iter([*tokenizer.encode(text, special=False), min(tokenizer.end_tokens)])
    monkeypatch.setattr(Sampler, "draw", lambda *_: next(script))
    return answered(engine, **asked)


def test_a_reply_that_must_call_has_no_log_probabilities_of_content(engine: Engine) -> None:
    pieces, done = answered(engine, tools=[NOW], tool_choice="required", sampling={"logprobs": 1})
    assert (pieces, done.text, done.finish_reason) == ([], "", "tool_calls")
    assert [call.name for call in done.tool_calls]
    assert done.logprobs
    assert len(done.logprobs) == done.completion_tokens


def test_log_probabilities_of_text_around_calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"I look.\n{CALL}\nand so"
    pieces, done = said(engine, monkeypatch, text, tools=[WEATHER], sampling={"logprobs": 0})
    assert ("".join(pieces), len(done.tool_calls)) == ("I look.\nand so", 1)
    assert b"".join(token.text for piece in pieces for token in piece.logprobs).decode() == "I look.\nand so"
    pieces, done = said(engine, monkeypatch, text, sampling={"logprobs": 0})  # twin: without tools all of it is text
    assert b"".join(token.text for piece in pieces for token in piece.logprobs).decode() == text


def test_tools_beside_a_schema_give_a_call_or_json(engine: Engine) -> None:
    seen = set()
    for seed in range(8):
        sampling = {"schema": PERSON, "seed": seed, "temperature": 8.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        pieces, done = answered(engine, tools=[NOW], sampling=sampling)
        seen.add(done.finish_reason)
        if done.tool_calls:
            assert pieces == []
        elif done.finish_reason == "stop":
            assert breaks(json.loads("".join(pieces)), PERSON) == ""
    assert seen >= {"tool_calls", "stop"}


def test_a_reply_that_must_call_needs_no_schema(engine: Engine) -> None:
    _, done = answered(engine, tools=[NOW], tool_choice="required", sampling={"schema": PERSON})
    assert [call.name for call in done.tool_calls][:1] == ["now"]


def test_tools_beside_a_grammar_are_refused(engine: Engine) -> None:
    with pytest.raises(SettingsError, match="tools are given, and a grammar for the reply"):
        answered(engine, tools=[NOW], sampling={"grammar": 'root ::= "yes"'})


def test_a_strict_tool_leaves_the_text_free(engine: Engine) -> None:
    sampling = {"max_tokens": 24, "temperature": 0.0}
    free = answered(engine, tools=[NOW], sampling=sampling, deterministic=True)[1]
    kept = answered(engine, tools=[STRICT], sampling=sampling, deterministic=True)[1]
    assert free.text == kept.text != ""
