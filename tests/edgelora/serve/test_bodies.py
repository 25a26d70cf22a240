"""OpenAI's bodies: read whole, refused by field, and never an error of another kind, however odd the JSON."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgelora.engine.stream import Request
from edgelora.sampling import Sampling
from edgelora.serve import bodies, fields, protocol
from edgelora.serve.bodies import Asked, AskedEmbeddings, read_chat, read_completion, read_embeddings
from edgelora.serve.problems import ApiError

MESSAGES = [{"role": "user", "content": "Is it waterproof?"}]
SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"good": true}'}}


def chat(**more: Any) -> Asked:
    return read_chat({"model": "red", "messages": MESSAGES, **more})


def completion(**more: Any) -> Asked:
    return read_completion({"model": "red", "prompt": "Once", **more})


def embeddings(**more: Any) -> AskedEmbeddings:
    return read_embeddings({"model": "red", "input": "Once", **more})


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "review", "schema": schema, **more}}


def test_a_plain_body_changes_nothing_of_the_adapters_own() -> None:
    asked = chat()
    assert asked == Asked("chat", "red", (MESSAGES,))
    assert asked.requests("red") == [Request(MESSAGES, "red", sampling={})]  # type: ignore[arg-type]


def test_every_setting_of_chat_is_followed() -> None:
    asked = chat(
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repeat_penalty=1.1,
        repeat_last_n=9,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"17": -100, "4": 1.5},
        stop=["\n", "END"],
        logprobs=True,
        top_logprobs=3,
        seed=5,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        response_format=schema_format(SCHEMA, strict=True),
        modalities=["text"],
        tools=[TOOL],
        tool_choice="auto",
        parallel_tool_calls=False,
        timeout=2,
        lora_scale=0.5,
        user="u7",
    )
    assert asked.sampling == {
        "max_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "repeat_last_n": 9,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "logit_bias": {17: -100, 4: 1.5},
        "stop": ("\n", "END"),
        "logprobs": 3,
        "schema": SCHEMA,
    }
    assert (asked.seed, asked.scale, asked.deadline) == (5, 0.5, 2.0)
    assert (asked.stream, asked.include_usage) == (True, True)
    assert (asked.tools, asked.tool_choice, asked.parallel_tool_calls) == ([TOOL], "auto", False)
    assert asked.ignored == ()


def test_nulls_are_fields_that_were_not_given() -> None:
    names = ("temperature", "stop", "n", "stream", "tools", "response_format", "seed", "adapters", "functions", "what")
    assert chat(**dict.fromkeys(names)) == chat()
    with pytest.raises(ApiError, match="messages is missing"):
        chat(messages=None)


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {}),
        (schema_format(SCHEMA), SCHEMA),
        (schema_format(SCHEMA, strict=False), SCHEMA),
    ],
)
def test_a_schema_is_kept_strict_or_not(response_format: Any, schema: Any) -> None:
    assert chat(response_format=response_format).sampling.get("schema") == schema


@pytest.mark.parametrize(("stop", "stops"), [("a", ("a",)), (["a", "b", "c", "d", "e"], tuple("abcde")), ([], ())])
def test_stop_is_a_text_or_some(stop: Any, stops: Any) -> None:
    assert chat(stop=stop).sampling["stop"] == stops


def test_max_tokens_has_two_names() -> None:
    assert chat(max_tokens=3).sampling == chat(max_completion_tokens=3).sampling == {"max_tokens": 3}
    assert chat(max_tokens=3, max_completion_tokens=3).sampling == {"max_tokens": 3}
    with pytest.raises(ApiError, match="max_tokens is 3 where max_completion_tokens is 4"):
        chat(max_tokens=3, max_completion_tokens=4)


def test_logprobs_of_chat_are_a_flag_and_a_number() -> None:
    assert chat(logprobs=True).sampling == {"logprobs": 0}
    assert chat(logprobs=False).sampling == chat(top_logprobs=0).sampling == {}


def test_messages_are_what_a_template_reads() -> None:
    asked = chat(
        messages=[
            {"role": "developer", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "good?"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
            {"role": "tool", "content": "yes", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "It is.", "tool_calls": []},
        ]
    )
    assert asked.prompts == (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it good?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "yes", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "It is."},
        ],
    )


def test_a_seed_makes_every_choice_another_one_and_the_same_again() -> None:
    assert [request.sampling for request in chat(n=3, seed=2**32 - 2).requests("red")] == [
        {"seed": 2**32 - 2},
        {"seed": 2**32 - 1},
        {"seed": 0},
    ]
    assert [request.sampling for request in chat(n=2).requests("red")] == [{}, {}]
    assert chat(seed=-1).requests(None)[0].sampling == {"seed": 2**32 - 1}
    assert chat(seed=2**63 - 1).requests(None)[0].sampling == {"seed": 2**32 - 1}


def test_choices_are_numbered_prompt_by_prompt() -> None:
    asked = completion(prompt=["a", [1, 2]], n=2, seed=7, lora_scale=2, timeout=0.5)
    requests = asked.requests({"red": 0.5}, tenant="ann")
    assert [(request.messages, request.sampling) for request in requests] == [
        ("a", {"max_tokens": 16, "seed": 7}),
        ("a", {"max_tokens": 16, "seed": 8}),
        ([1, 2], {"max_tokens": 16, "seed": 7}),
        ([1, 2], {"max_tokens": 16, "seed": 8}),
    ]
    assert {(r.raw, r.scale, r.deadline, r.tenant, str(r.adapter)) for r in requests} == {
        (True, 2.0, 0.5, "ann", "{'red': 0.5}")
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", ("",)),
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([0, 5], ([0, 5],)),
        ([[0], [5, 6]], ([0], [5, 6])),
    ],
)
def test_a_prompt_is_text_or_tokens_or_some(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_every_setting_of_completions_is_followed() -> None:
    asked = completion(max_tokens=2, logprobs=0, best_of=2, n=2, stop="x", grammar='root ::= "a"', frequency_penalty=1)
    assert asked.sampling == {
        "max_tokens": 2,
        "logprobs": 0,
        "stop": ("x",),
        "grammar": 'root ::= "a"',
        "frequency_penalty": 1,
    }
    assert completion(echo=True).echo


def test_a_blend_is_of_the_base_or_of_its_own() -> None:
    asked = chat(adapters={"red": 0.7, "blue": 1}, lora_scale=0.5)
    assert (asked.blend, asked.scale) == ({"red": 0.7, "blue": 1.0}, 0.5)
    for fitting in (None, "red", "blue"):
        asked.check_blend(fitting)
    with pytest.raises(ApiError, match="expected the base or one of adapters") as caught:
        asked.check_blend("green")
    assert (caught.value.status, caught.value.param) == (400, "model")
    chat().check_blend("green")


def test_embeddings_are_of_texts_or_tokens() -> None:
    assert embeddings(input=["a", [1]], encoding_format="base64", user="u", what=1) == AskedEmbeddings(
        "red", ("a", [1]), "base64", ("what",)
    )
    assert embeddings(input=[1, 2]).inputs == ([1, 2],)


def test_unknown_fields_are_ignored_and_listed_fit_for_a_header() -> None:
    odd = {"reasoning_effort": "low", "a,b\r\nX-Evil: 1": 1, "\ud800": 1, "ü": [[]], "x" * 500: float("nan")}
    asked = chat(**odd)
    assert asked.ignored == (
        *("reasoning_effort", "a%2Cb%0D%0AX-Evil%3A%201", "%3F", "%C3%BC"),
        "x" * fields.MAX_NAME,
    )
    assert len(chat(**{f"f{i}": 1 for i in range(1000)}).ignored) == fields.MAX_IGNORED


deep: Any = "x"
for _ in range(100_000):
    deep = [deep]

WRONG: list[tuple[Callable[..., Any], dict[str, Any], str, str]] = [
    (chat, {"model": None}, "model", "missing_required_parameter"),
    (chat, {"model": 7}, "model", "invalid_type"),
    (chat, {"model": ""}, "model", "invalid_value"),
    (chat, {"messages": []}, "messages", "invalid_value"),
    (chat, {"messages": "hello"}, "messages", "invalid_type"),
    (chat, {"messages": ["hello"]}, "messages[0]", "invalid_type"),
    (chat, {"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    (chat, {"messages": [*MESSAGES, {"role": "boss", "content": "x"}]}, "messages[1].role", "invalid_value"),
    (chat, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
    (chat, {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    (chat, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
    (chat, {"messages": [*MESSAGES, {"role": "system", "content": "x"}]}, "messages", "invalid_value"),
    (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
    (
        chat,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages[0].content[1].type",
        "unsupported_value",
    ),
    (
        chat,
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].function.arguments",
        "missing_required_parameter",
    ),
    (chat, {"messages": [{"role": "assistant", "tool_calls": 0}]}, "messages[0].tool_calls", "invalid_type"),
    (
        chat,
        {"messages": [{"role": "assistant", "content": "x", "function_call": {}}]},
        "messages[0].function_call",
        "unsupported_parameter",
    ),
    (chat, {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages", "invalid_value"),
    (chat, {"messages": deep}, "messages", "invalid_value"),
    (chat, {"temperature": "hot"}, "temperature", "invalid_value"),
    (chat, {"temperature": True}, "temperature", "invalid_value"),
    (chat, {"temperature": float("inf")}, "temperature", "invalid_value"),
    (chat, {"temperature": 10**5000}, "temperature", "invalid_value"),
    (chat, {"top_p": 2}, "top_p", "invalid_value"),
    (chat, {"logit_bias": {"cat": 1}}, "logit_bias", "invalid_value"),
    (chat, {"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    (chat, {"logit_bias": [5]}, "logit_bias", "invalid_value"),
    (chat, {"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    (chat, {"grammar": "root ::= ("}, "grammar", "invalid_value"),
    (chat, {"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "grammar", "invalid_value"),
    (chat, {"stop": 3}, "stop", "invalid_type"),
    (chat, {"stop": ["a", None]}, "stop[1]", "invalid_type"),
    (chat, {"stop": ""}, "stop", "invalid_value"),
    (chat, {"stop": ["a"] * (bodies.MAX_STOPS + 1)}, "stop", "invalid_value"),
    (chat, {"stop": "a" * (bodies.MAX_STOP_LENGTH + 1)}, "stop", "invalid_value"),
    (chat, {"max_tokens": 0}, "max_tokens", "invalid_value"),
    (chat, {"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
    (chat, {"n": 0}, "n", "invalid_value"),
    (chat, {"n": bodies.MAX_N + 1}, "n", "invalid_value"),
    (chat, {"n": True}, "n", "invalid_type"),
    (chat, {"seed": 1.0}, "seed", "invalid_type"),
    (chat, {"seed": 2**64}, "seed", "invalid_value"),
    (chat, {"logprobs": 3}, "logprobs", "invalid_type"),
    (chat, {"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    (chat, {"logprobs": True, "top_logprobs": False}, "top_logprobs", "invalid_type"),
    (chat, {"stream": "yes"}, "stream", "invalid_type"),
    (chat, {"stream_options": {}}, "stream_options", "invalid_value"),
    (chat, {"stream": True, "stream_options": True}, "stream_options", "invalid_type"),
    (chat, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    (chat, {"response_format": "json"}, "response_format", "invalid_type"),
    (chat, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (chat, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
    (
        chat,
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        "response_format.json_schema.schema",
        "missing_required_parameter",
    ),
    (chat, {"response_format": schema_format({}, strict=1)}, "response_format.json_schema.strict", "invalid_type"),
    (chat, {"response_format": schema_format({"not": {}})}, "response_format", "invalid_value"),
    (
        chat,  # Python reads no number of so many digits
        {"response_format": schema_format({"anyOf": [{"$ref": f"#/anyOf/{'9' * 5000}"}]})},
        "response_format",
        "invalid_value",
    ),
    (chat, {"functions": []}, "functions", "unsupported_parameter"),
    (chat, {"function_call": "auto"}, "function_call", "unsupported_parameter"),
    (chat, {"modalities": ["text", "audio"]}, "modalities[1]", "invalid_value"),
    (chat, {"tools": [float("nan")]}, "tools", "invalid_value"),
    (chat, {"tools": [{"\ud800": 1}]}, "tools", "invalid_value"),
    (chat, {"lora_scale": "1"}, "lora_scale", "invalid_type"),
    (chat, {"lora_scale": 101}, "lora_scale", "invalid_value"),
    (chat, {"adapters": {}}, "adapters", "invalid_value"),
    (chat, {"adapters": ["red"]}, "adapters", "invalid_type"),
    (chat, {"adapters": {"red": None}}, "adapters.red", "invalid_type"),
    (chat, {"adapters": dict.fromkeys(map(str, range(bodies.MAX_BLEND + 1)), 1)}, "adapters", "invalid_value"),
    (chat, {"timeout": 0}, "timeout", "invalid_value"),
    (completion, {"prompt": None}, "prompt", "missing_required_parameter"),
    (completion, {"prompt": []}, "prompt", "invalid_value"),
    (completion, {"prompt": [[]]}, "prompt[0]", "invalid_value"),
    (completion, {"prompt": ["a", 1]}, "prompt[1]", "invalid_type"),
    (completion, {"prompt": [1, -1]}, "prompt[1]", "invalid_value"),
    (completion, {"prompt": [1, True]}, "prompt[0]", "invalid_type"),
    (completion, {"prompt": {}}, "prompt", "invalid_type"),
    (completion, {"prompt": ["a"] * 100, "n": 2}, "n", "invalid_value"),
    (completion, {"suffix": "x"}, "suffix", "unsupported_parameter"),
    (completion, {"best_of": 3}, "best_of", "unsupported_value"),
    (completion, {"best_of": 2, "n": 3}, "best_of", "unsupported_value"),
    (completion, {"logprobs": True}, "logprobs", "invalid_type"),
    (completion, {"logprobs": 1, "echo": True}, "logprobs", "unsupported_value"),
    (completion, {"prompt": [1], "echo": True}, "echo", "unsupported_value"),
    (embeddings, {"input": None}, "input", "missing_required_parameter"),
    (embeddings, {"input": ["a", ""]}, "input", "invalid_value"),
    (embeddings, {"input": ["a"] * (bodies.MAX_INPUTS + 1)}, "input", "invalid_value"),
    (embeddings, {"encoding_format": "int8"}, "encoding_format", "invalid_value"),
    (embeddings, {"dimensions": 64}, "dimensions", "unsupported_parameter"),
    (embeddings, {"lora_scale": 1}, "lora_scale", "unsupported_parameter"),
]


@pytest.mark.parametrize(
    ("read", "more", "param", "code"), WRONG, ids=[f"{index}-{each[2]}" for index, each in enumerate(WRONG)]
)
def test_what_is_wrong_is_a_400_that_names_its_field(
    read: Callable[..., Any], more: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as caught:
        read(**more)
    error = caught.value
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)
    assert error.message.startswith(f"{param} ")


@pytest.mark.parametrize("body", [None, [], "x", 7, 1.5, True, deep])
@pytest.mark.parametrize("read", [read_chat, read_completion, read_embeddings])
def test_a_body_that_is_no_object(read: Callable[[object], Any], body: object) -> None:
    with pytest.raises(ApiError, match="the body is"):
        read(body)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ApiError, match=r"temperature is 'hot'.*stop is a number|stop is 3.*model is missing"):
        read_chat({"messages": MESSAGES, "temperature": "hot", "stop": 3})


def test_a_message_holds_a_part_of_what_was_sent() -> None:
    with pytest.raises(ApiError) as caught:
        chat(temperature="x" * 10**6, stop=["y" * 10**6], adapters={"z" * 10**6: "a"}, stream="b" * 10**6)
    assert len(json.dumps(caught.value.body)) < 6 * fields.MAX_SHOWN + 500


FULL: list[tuple[Callable[[object], Any], dict[str, Any]]] = [
    (
        read_chat,
        {
            "model": "base:red",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Is it waterproof?"}], "name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "yes", "tool_call_id": "call_1"},
            ],
            "max_completion_tokens": 40,
            "temperature": 0.5,
            "logit_bias": {"17": -100},
            "stop": ["\n", "END"],
            "logprobs": True,
            "top_logprobs": 3,
            "seed": 5,
            "n": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "response_format": schema_format(
                {
                    "type": "object",
                    "properties": {
                        "a": {"type": ["string", "null"], "maxLength": 9},
                        "b": {"$ref": "#/$defs/n"},
                        "c": {"enum": ["x", 1]},
                    },
                    "required": ["a"],
                    "additionalProperties": False,
                    "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 12}},
                }
            ),
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "look_up"}},
            "adapters": {"red": 0.7, "blue": 0.3},
            "lora_scale": 1,
            "timeout": 3,
            "metadata": {"a": "b"},
        },
    ),
    (
        read_completion,
        {
            "model": "red",
            "prompt": [[1, 2, 3], "Once upon"],
            "max_tokens": 5,
            "logprobs": 2,
            "best_of": 1,
            "n": 1,
            "top_k": 5,
            "grammar": 'root ::= "a" | [b-d]{1,3} (root)?',
            "presence_penalty": 1,
            "stop": "x",
            "echo": False,
        },
    ),
    (read_embeddings, {"model": "red", "input": ["a", [1, 2]], "encoding_format": "base64", "user": "u"}),
]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**32, 2**63, -(2**70), 10**400, 10**5000, 1.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "0", "٣", "\0", "\ud800", "a\udfff", "x" * 5000, "9" * 5000),
    *([], {}, [[]], [{}], [None], {"": None}, {"\ud800": 1}, {"type": "object"}, {"type": "text"}, {"a": [1, "a"]}),
    *("function", "json_schema", "#", "#/$defs/n", "root ::= root", 'root ::= ("a"?)*', "[", "assistant", "text"),
    *(deep, {"a": deep}, [1] * 3000, ["a"] * 3000, {str(i): i for i in range(300)}, list(range(-5, 5))),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a body, with every key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    names = sorted(
        {*Sampling.field_names(), *FULL[0][1], *FULL[1][1], *FULL[2][1], "functions", "suffix", "modalities"}
    )
    # Places first: an odd value may be too deep to walk through.
    spots = chance.sample(list(places(body)), k=chance.choice((1, 1, 1, 2, 5)))
    values = [copy.deepcopy(container[key]) for container, key in spots]
    kinds = [chance.choice(("odd", "odd", "odd", "drop", "twice", "wrap", "swap", "add")) for _ in spots]
    for (container, key), kind in zip(spots, kinds, strict=True):
        try:
            value = container[key]
        except (IndexError, KeyError):
            continue
        if kind == "odd":
            container[key] = chance.choice(ODD)
        elif kind == "drop":
            del container[key]
        elif kind == "twice" and isinstance(container, list):
            container.insert(key, copy.deepcopy(chance.choice(values)))
        elif kind == "wrap":
            container[key] = chance.choice(([value], {"type": value}, [value, value], str(key)))
        elif kind == "swap":
            container[key] = copy.deepcopy(chance.choice(values))
        else:
            body[chance.choice(names)] = chance.choice(ODD)
    return body


def test_no_body_whatever_is_more_than_refused() -> None:
    """5,000 mutations of full bodies: what is read can be sent to the engine, what is not is a 400 of a few words."""
    chance, read, problems = random.Random(6), 0, list[ApiError]()
    began = time.perf_counter()
    for number in range(5000):
        reader, body = FULL[number % len(FULL)]
        body = mutated(body, chance)
        try:
            asked = reader(body)
        except ApiError as error:
            problems.append(error)
            continue
        read += 1
        assert ",".join(asked.ignored).isascii()
        if isinstance(asked, AskedEmbeddings):
            assert json.dumps(asked.inputs, ensure_ascii=False, allow_nan=False).encode()
            continue
        for request in asked.requests(asked.blend or asked.model):
            Sampling.from_mapping(request.sampling)
            line = protocol.line(protocol.request_fields(request))
            line.decode()  # no half characters
            sent = protocol.request_of(protocol.parsed(line))
            assert (sent.adapter, sent.scale, sent.deadline, sent.raw) == (
                *(request.adapter, request.scale, request.deadline, request.raw),
            )
    assert {problem.status for problem in problems} == {400}
    assert all(problem.param for problem in problems)
    assert max(len(json.dumps(problem.body, allow_nan=False)) for problem in problems) < 6 * 10 * fields.MAX_SHOWN
    assert min(read, len(problems)) > 1000
    assert time.perf_counter() - began < 10
