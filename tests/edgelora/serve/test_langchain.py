"""LangChain's client of OpenAI's API, on a live server."""

from __future__ import annotations

from typing import Any

import pytest

from tests.edgelora.serve.conftest import Served

pytest.importorskip("langchain_openai")
QUESTION = "Where does the miller live?"


def model(served: Served, **more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    settings = {"model": "red", "temperature": 0, "max_tokens": 12, "max_retries": 0, "timeout": 60, **more}
    return ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", **settings)


def test_it_asks_streams_and_batches(served: Served) -> None:
    want = served.chat(QUESTION, "red")["choices"][0]["message"]["content"]
    chat = model(served)
    answer = chat.invoke(QUESTION)
    assert answer.content == want
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == want
    assert [each.content for each in chat.batch([QUESTION, QUESTION])] == [want, want]
    blue = model(served, model="blue").invoke(QUESTION).content
    assert blue == served.chat(QUESTION, "blue")["choices"][0]["message"]["content"] != want


def test_it_gets_objects_that_fit_a_schema(served: Served) -> None:
    schema = {
        "title": "place",
        "type": "object",
        "properties": {"kind": {"type": "string", "enum": ["mill", "boat"]}, "count": {"type": "integer"}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    chat = model(served, max_tokens=200).with_structured_output(schema, method="json_schema")
    found = chat.invoke(QUESTION)
    assert found["kind"] in ("mill", "boat")
    assert isinstance(found["count"], int)


def test_its_extra_fields_arrive(served: Served) -> None:
    bare = served.chat(QUESTION, "base")["choices"][0]["message"]["content"]
    assert model(served, extra_body={"lora_scale": 0.0}).invoke(QUESTION).content == bare
