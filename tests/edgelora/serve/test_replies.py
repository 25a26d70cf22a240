"""Replies in OpenAI's shapes, held against the official client's own types: all fields there, and none of its own."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from edgelora.engine.stream import TokenLogprob
from edgelora.serve.bodies import read_chat, read_completion, read_embeddings
from edgelora.serve.problems import ApiError
from edgelora.serve.replies import (
    DONE,
    LEAST_LOGPROB,
    Finished,
    Shape,
    embeddings,
    finish_reason,
    model,
    models,
    shape_of,
    sse,
)

T = TypeVar("T", bound=BaseModel)
FINGERPRINT = "9f3a" + "0" * 60
CALL = {"name": "look_up", "arguments": '{"good":true}'}
EURO = "€".encode()


def account(reason: str = "stop", **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": 10, "cached_tokens": 4, "dropped_tokens": 0, "completion_tokens": 3}
    return {"finish_reason": reason, **counts, "tool_calls": [], **more}


def chat(**more: Any) -> Shape:
    body = {"model": "red", "messages": [{"role": "user", "content": "Is it waterproof?"}], **more}
    return shape_of(read_chat(body), FINGERPRINT)


def text(**more: Any) -> Shape:
    return shape_of(read_completion({"model": "red", "prompt": "Once", **more}), FINGERPRINT)


def read(kind: type[T], value: Mapping[str, Any]) -> T:
    """A value as the client has it; strictly typed, and without a field that the client does not know."""
    found = kind.model_validate(json.loads(json.dumps(value, allow_nan=False)), strict=True)
    assert list(strangers(found)) == []
    return found


def strangers(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for inner in vars(value).values():
            yield from strangers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strangers(inner)


def read_text_chunk(value: Mapping[str, Any]) -> Completion:
    """A chunk of a text has no finish_reason until the last one; the client's type, made for whole ones, wants it."""
    choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in value["choices"]]
    return read(Completion, {**value, "choices": choices})


def token(data: bytes, logprob: float = -0.5, *top: tuple[bytes, float]) -> TokenLogprob:
    return TokenLogprob(1, data, logprob, tuple(TokenLogprob(2, each, value) for each, value in top))


def test_a_whole_chat_completion() -> None:
    got = read(
        ChatCompletion, chat(n=2).whole([Finished("Yes.", [], account()), Finished("Ye", [], account("length"))])
    )
    assert got.id.startswith("chatcmpl-")
    assert abs(got.created - time.time()) < 60
    assert (got.model, got.system_fingerprint) == ("red", "fp_9f3a00000000")
    assert [(c.index, c.message.role, c.message.content, c.finish_reason) for c in got.choices] == [
        (0, "assistant", "Yes.", "stop"),
        (1, "assistant", "Ye", "length"),
    ]
    assert [(c.logprobs, c.message.tool_calls) for c in got.choices] == [(None, None)] * 2
    assert got.usage
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (10, 6, 16)
    assert got.usage.prompt_tokens_details
    assert got.usage.prompt_tokens_details.cached_tokens == 4


def test_a_chat_completion_that_calls_tools() -> None:
    called = account("tool_calls", tool_calls=[CALL, CALL])
    [choice] = read(ChatCompletion, chat().whole([Finished("", [], called)])).choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    calls = choice.message.tool_calls or []
    assert [call.type for call in calls] == ["function", "function"]
    assert [call.function.model_dump() for call in calls if call.type == "function"] == [CALL, CALL]
    assert len({call.id for call in calls}) == 2
    [choice] = read(ChatCompletion, chat().whole([Finished("Well.", [], called)])).choices
    assert choice.message.content == "Well."


def test_log_probabilities_are_those_of_the_content() -> None:
    called, spoken = account("tool_calls", tool_calls=[CALL]), token(b"Well.")
    shape = chat(logprobs=True, stream=True)
    whole = [
        read(ChatCompletion, shape.whole([Finished(text, tokens, reply)])).choices[0].logprobs
        for text, tokens, reply in (("", [], called), ("Well.", [spoken], called), ("", [], account()))
    ]
    assert [logprobs and len(logprobs.content or ()) for logprobs in whole] == [None, 1, 0]
    chunks = [*shape.opening(), *shape.closing(0, called)]
    assert {read(ChatCompletionChunk, chunk).choices[0].logprobs for chunk in chunks} == {None}


def test_the_chunks_of_a_chat() -> None:
    shape = chat(n=2, stream=True, stream_options={"include_usage": True})
    chunks = [
        *shape.opening(),
        *shape.piece(0, "Ye"),
        *shape.piece(1, "No"),
        *shape.piece(0, "s"),
        *shape.closing(0, account()),
        *shape.closing(1, account("length")),
        *shape.usage([account(), account(completion_tokens=5)]),
    ]
    got = [read(ChatCompletionChunk, chunk) for chunk in chunks]
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in got}) == 1
    told = [(c.index, c.delta.role, c.delta.content, c.finish_reason) for chunk in got for c in chunk.choices]
    assert told == [
        (0, "assistant", "", None),
        (1, "assistant", "", None),
        (0, None, "Ye", None),
        (1, None, "No", None),
        (0, None, "s", None),
        (0, None, None, "stop"),
        (1, None, None, "length"),
    ]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert got[-1].choices == []
    assert got[-1].usage
    assert (got[-1].usage.prompt_tokens, got[-1].usage.total_tokens) == (10, 18)


def test_figures_come_only_where_they_were_asked_for() -> None:
    shape = chat(stream=True)
    assert list(shape.usage([account()])) == []
    assert not any("usage" in chunk for chunk in (*shape.opening(), *shape.closing(0, account())))


def test_chunks_that_call_tools() -> None:
    called = account("tool_calls", tool_calls=[CALL, CALL])
    first, last = (read(ChatCompletionChunk, chunk) for chunk in chat(stream=True).closing(0, called))
    calls = first.choices[0].delta.tool_calls or []
    assert [(call.index, call.type) for call in calls] == [(0, "function"), (1, "function")]
    assert [call.function and call.function.model_dump() for call in calls] == [CALL, CALL]
    assert (first.choices[0].finish_reason, last.choices[0].finish_reason) == (None, "tool_calls")


def test_log_probabilities_of_a_chat() -> None:
    tokens = [token(b"Yes", -0.25, (b"Yes", -0.25), (b"No", -2)), token(EURO[:1], -math.inf), token(EURO[1:], math.nan)]
    shape = chat(logprobs=True, top_logprobs=2)
    got = read(ChatCompletion, shape.whole([Finished("Yes€", tokens, account())]))
    assert got.choices[0].logprobs
    first, second, third = got.choices[0].logprobs.content or []
    assert (first.token, first.logprob, first.bytes) == ("Yes", -0.25, list(b"Yes"))
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("Yes", -0.25, list(b"Yes")),
        ("No", -2, list(b"No")),
    ]
    assert bytes([*(second.bytes or ()), *(third.bytes or ())]) == EURO
    assert (second.logprob, third.logprob) == (LEAST_LOGPROB, LEAST_LOGPROB)
    [chunk] = (read(ChatCompletionChunk, chunk) for chunk in shape.piece(0, "Yes", tokens[:1]))
    assert chunk.choices[0].logprobs
    assert [each.token for each in chunk.choices[0].logprobs.content or []] == ["Yes"]
    assert chat().whole([Finished("Yes", tokens, account())])["choices"][0]["logprobs"] is None


def test_a_whole_text() -> None:
    finished = [Finished(each, [], account(completion_tokens=2)) for each in "abcd"]
    got = read(Completion, text(prompt=["Once", "Upon"], n=2, echo=True).whole(finished))
    assert got.id.startswith("cmpl-")
    assert [(c.index, c.text, c.finish_reason) for c in got.choices] == [
        (0, "Oncea", "stop"),
        (1, "Onceb", "stop"),
        (2, "Uponc", "stop"),
        (3, "Upond", "stop"),
    ]
    assert got.usage
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (20, 8)


def test_the_chunks_of_a_text() -> None:
    shape = text(echo=True, n=2, stream=True, stream_options={"include_usage": True})
    chunks = [
        *shape.opening(),
        *shape.piece(1, " upon"),
        *shape.closing(1, account("length")),
        *shape.closing(0, account()),
        *shape.usage([account(), account()]),
    ]
    got = [read_text_chunk(chunk) for chunk in chunks]
    assert len({chunk.id for chunk in got}) == 1
    assert [(c.index, c.text) for chunk in got for c in chunk.choices] == [
        (0, "Once"),
        (1, "Once"),
        (1, " upon"),
        (1, ""),
        (0, ""),
    ]
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]] == [None, None, None, "length", "stop"]
    assert (got[-1].choices, got[-1].usage and got[-1].usage.completion_tokens) == ([], 6)
    assert list(text(stream=True).opening()) == []


def test_log_probabilities_of_a_text() -> None:
    tokens = [
        token(b"ab", -1, (b"ab", -1), (EURO[:1], -2)),
        token(EURO[:1]),
        token(EURO[1:]),
        token(b"c", -3, (b"d", -1)),
    ]
    want = {
        "tokens": ["ab", r"bytes:\xe2", r"bytes:\x82\xac", "c"],
        "token_logprobs": [-1, -0.5, -0.5, -3],
        "top_logprobs": [
            {"ab": -1, r"bytes:\xe2": -2},
            {r"bytes:\xe2": -0.5},
            {r"bytes:\x82\xac": -0.5},
            {"c": -3, "d": -1},
        ],
        "text_offset": [0, 2, 2, 3],
    }
    got = read(Completion, text(logprobs=2).whole([Finished("ab€c", tokens, account())]))
    assert got.choices[0].logprobs
    assert got.choices[0].logprobs.model_dump() == want
    shape = text(logprobs=2, n=2, stream=True)
    chunks = [*shape.piece(1, "ab", tokens[:2]), *shape.piece(0, "c", tokens[3:]), *shape.piece(1, "€c", tokens[2:])]
    parts = [read_text_chunk(chunk).choices[0].logprobs for chunk in chunks]
    assert [part and part.text_offset for part in parts] == [[0, 2], [0], [2, 3]]


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_reasons_that_clients_know(reason: str) -> None:
    assert finish_reason(account(reason)) == reason


@pytest.mark.parametrize("make", [chat, text])
def test_a_reply_whose_time_was_over_is_a_timeout(make: Any) -> None:
    for answer in (
        lambda: make().whole([Finished("Ye", [], account()), Finished("Ye", [], account("deadline"))]),
        lambda: list(make(stream=True).closing(0, account("deadline"))),
    ):
        with pytest.raises(ApiError) as caught:
            answer()
        assert (caught.value.status, caught.value.code) == (408, "timeout")
    with pytest.raises(ValueError, match="cancelled"):
        finish_reason(account("cancelled"))


def test_what_was_left_out_of_a_conversation_is_told() -> None:
    usage = chat().whole([Finished("Yes.", [], account(dropped_tokens=7))])["usage"]
    assert usage["dropped_tokens"] == 7


def test_an_event_is_one_line_to_every_client_and_what_went_in() -> None:
    event = {"text": "a\r\nb\u2028c\x85d\u2029\x0b\x1c\\u2028 €😀 \ud800"}
    data = sse(event)
    assert data.endswith(b"\n\n")
    line, *rest = data.decode("utf-8").splitlines()
    assert rest == [""]
    assert json.loads(line.removeprefix("data: ")) == event
    assert "€😀".encode() in data
    assert DONE == b"data: [DONE]\n\n"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(encoding: str) -> None:
    vectors = [[0.5, -1.25, 3.0], [0.0, 1e-3, 7.0]]
    asked = read_embeddings({"model": "red", "input": ["a", "b"], "encoding_format": encoding})
    got = embeddings(asked, vectors, 5)
    if encoding == "base64":
        for each in got["data"]:
            each["embedding"] = list(struct.unpack("<3f", base64.b64decode(each["embedding"])))
    answer = read(CreateEmbeddingResponse, got)
    assert [each.index for each in answer.data] == [0, 1]
    assert [each.embedding for each in answer.data] == [pytest.approx(vector) for vector in vectors]
    assert (answer.model, answer.usage.prompt_tokens, answer.usage.total_tokens) == ("red", 5, 5)


def test_models() -> None:
    listed = models([model("red", 1_700_000_000, root="red.gguf", parent="base", more={"scale": 1.0})])
    [entry] = listed["data"]
    found = Model.model_validate(entry, strict=True)
    assert (found.id, found.created, found.object, found.owned_by) == ("red", 1_700_000_000, "model", "edgelora")
    assert found.model_extra == {"root": "red.gguf", "parent": "base", "edgelora": {"scale": 1.0}}
    assert listed["object"] == "list"
