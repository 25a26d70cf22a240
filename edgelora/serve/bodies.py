"""OpenAI's request bodies, read as what is asked of the engine.

    asked = read_chat({"model": "support", "messages": [{"role": "user", "content": "Waterproof?"}], "n": 2, "seed": 7})
    [request.sampling for request in asked.requests("support")]     # [{"seed": 7}, {"seed": 8}]

What OpenAI documents is read (https://platform.openai.com/docs/api-reference), and beside it `top_k`, `min_p`,
`repeat_penalty`, `repeat_last_n`, `grammar`, `lora_scale`, `adapters` and `timeout`. A field that nobody knows is
ignored, as OpenAI does, and listed in `ignored`; one that is known and cannot be followed is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from edgelora.engine.stream import Request
from edgelora.errors import SettingsError
from edgelora.messages import check_messages
from edgelora.openai_body import WITHOUT_MEANING, message_of, schema_of
from edgelora.sampling import Sampling
from edgelora.serve.fields import (
    INVALID_TYPE,
    INVALID_VALUE,
    UNSUPPORTED_FIELD,
    UNSUPPORTED_VALUE,
    Fields,
    Problem,
    each,
    flag,
    inner,
    mapping,
    member,
    number,
    one_of,
    raw,
    shown,
    text,
    whole,
)
from edgelora.serve.problems import ApiError

Prompts = tuple[str | list[int], ...]

MAX_N = 16
MAX_CHOICES = 128
"""Replies to one body: its prompts times `n`."""
MAX_STOPS, MAX_STOP_LENGTH = 32, 256
"""OpenAI's limit is 4 strings; all of them are looked for at every token."""
MAX_BLEND = 16
MAX_SCALE = 100.0
MAX_SECONDS = 86_400.0
MAX_INPUTS = 2048
MAX_WHOLE = 2**31 - 1
COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions: a text that is only continued seldom ends by itself."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "grammar"),
)
"""Fields that are called as in `Sampling`, and checked there."""
_CHAT_REFUSED = {
    "functions": "is deprecated and not supported: use tools",
    "function_call": "is deprecated and not supported: use tool_choice",
    "audio": "is not supported: replies are text",
    "web_search_options": "is not supported: nothing is looked up",
    "moderation": "is not supported: nothing is moderated",
}
_COMPLETION_REFUSED = {"suffix": "is not supported: texts are continued, not filled in"}
_EMBEDDINGS_REFUSED = {
    "dimensions": "is not supported: embeddings are as long as the base makes them",
    "lora_scale": "is not supported for embeddings",
    "adapters": "is not supported for embeddings",
}


@dataclass(frozen=True)
class Asked:
    """What a body of /v1/chat/completions or /v1/completions asks for.

    Attributes:
        model: as the client wrote it: an adapter, the base, or BASE:ADAPTER; still to be looked up.
        prompts: conversations (of chat always one), or texts and token ids to continue; each gets `n` replies. A
            message has `role` and `content`, and `tool_calls` or `tool_call_id` where it was given one.
        sampling: the fields of `Sampling` that were given, but for the seed.
        scale: `lora_scale`: instead of the adapter's own; of a blend, times every scale.
        blend: `adapters`, names to scales. `model` is then the base, or one of them: see `check_blend`.
        seed: of the first reply to each prompt, the next ones have seed + 1, seed + 2 ...; any 64 bits, folded to 32.
        deadline: `timeout`, in seconds.
        tools, tool_choice, parallel_tool_calls: JSON values, as they came.
        ignored: names of fields that nobody knows, fit for a header.
    """

    kind: Literal["chat", "completion"]
    model: str
    prompts: tuple[Any, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None
    blend: Mapping[str, float] | None = None
    n: int = 1
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    deadline: float | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    ignored: tuple[str, ...] = ()

    def check_blend(self, adapter: str | None) -> None:
        """Whether the adapter that `model` was found to be (None: it is the base) has a part in the blend; one that
        has none would give its name to what others write.

        Raises:
            ApiError: 400, it has none.
        """
        if self.blend is not None and adapter is not None and adapter not in self.blend:
            message = f"model is {shown(self.model)}, expected the base or one of adapters: those are what is blended"
            raise ApiError(400, message, param="model", code=INVALID_VALUE)

    def requests(self, adapter: str | Mapping[str, float] | None, *, tenant: str | None = None) -> list[Request]:
        """The engine's requests, one for each choice: number i is reply i % n to prompt i // n, as OpenAI counts."""
        seeds = [{} if self.seed is None else {"seed": (self.seed + index) % 2**32} for index in range(self.n)]
        return [
            Request(
                prompt,
                adapter,
                self.scale,
                {**self.sampling, **seed},
                deadline=self.deadline,
                tenant=tenant,
                raw=self.kind == "completion",
            )
            for prompt in self.prompts
            for seed in seeds
        ]


@dataclass(frozen=True)
class AskedEmbeddings:
    """What a body of /v1/embeddings asks for: the embeddings of texts, or of token ids."""

    model: str
    inputs: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    ignored: tuple[str, ...] = ()


def read_chat(body: object) -> Asked:
    """The body of /v1/chat/completions.

    Raises:
        ApiError: 400; `param` is the first field that is wrong.
    """
    fields = Fields(body, _CHAT_REFUSED, WITHOUT_MEANING)
    conversation: list[dict[str, Any]] = fields.need("messages", _messages, [])
    sampling = _sampling_of(fields)

    old, new = (fields.read(name, whole(1, MAX_WHOLE), None) for name in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        fields.refuse("max_tokens", f"is {old} where max_completion_tokens is {new}, expected one of them")
    if old or new:
        sampling["max_tokens"] = new or old

    candidates = fields.read("top_logprobs", whole(0, 20), 0)
    if fields.read("logprobs", flag, False):
        sampling["logprobs"] = candidates
    elif candidates:
        fields.refuse("top_logprobs", f"is {candidates}, which needs logprobs to be true")

    fields.read("modalities", _only_text, None)
    tools = {name: fields.read(name, raw, None) for name in ("tools", "tool_choice", "parallel_tool_calls")}
    return _asked("chat", fields, (conversation,), sampling, **tools)


def read_completion(body: object) -> Asked:
    """The body of /v1/completions.

    Raises:
        ApiError: 400; `param` is the first field that is wrong.
    """
    fields = Fields(body, _COMPLETION_REFUSED, WITHOUT_MEANING)
    prompts: Prompts = fields.need("prompt", _prompts, ())
    sampling = _sampling_of(fields)
    sampling["max_tokens"] = fields.read("max_tokens", whole(1, MAX_WHOLE), COMPLETION_TOKENS)
    candidates = fields.read("logprobs", whole(0, 20), None)
    if candidates is not None:
        sampling["logprobs"] = candidates
    echo = fields.read("echo", flag, False)
    if echo and candidates is not None:
        fields.refuse("logprobs", "is not supported beside echo: the prompt has none", UNSUPPORTED_VALUE)
    if echo and not all(isinstance(prompt, str) for prompt in prompts):
        fields.refuse("echo", "is not supported for a prompt of token ids", UNSUPPORTED_VALUE)
    return _asked("completion", fields, prompts, sampling, echo=echo)


def read_embeddings(body: object) -> AskedEmbeddings:
    """The body of /v1/embeddings.

    Raises:
        ApiError: 400; `param` is the first field that is wrong.
    """
    fields = Fields(body, _EMBEDDINGS_REFUSED, WITHOUT_MEANING)
    model = fields.need("model", _model, "")
    inputs: Prompts = fields.need("input", _prompts, ())
    if len(inputs) > MAX_INPUTS:
        fields.refuse("input", f"has {len(inputs)} texts, expected at most {MAX_INPUTS}")
    if "" in inputs:
        fields.refuse("input", "has an empty text")
    encoding = fields.read("encoding_format", one_of("float", "base64"), "float")
    fields.end()
    return AskedEmbeddings(model, inputs, cast(Literal["float", "base64"], encoding), fields.ignored)


def _asked(
    kind: Literal["chat", "completion"],
    fields: Fields,
    prompts: tuple[Any, ...],
    sampling: Mapping[str, Any],
    **more: Any,
) -> Asked:
    """What the two have in common."""
    model, n = fields.need("model", _model, ""), fields.read("n", whole(1, MAX_N), 1)
    if n * len(prompts) > MAX_CHOICES:
        fields.refuse("n", f"makes {n * len(prompts)} replies, expected at most {MAX_CHOICES}")
    if kind == "completion" and fields.read("best_of", whole(1, MAX_N), n) != n:
        fields.refuse("best_of", f"is not supported unless it is n, which is {n}", UNSUPPORTED_VALUE)
    stream, include_usage = fields.read("stream", flag, False), fields.read("stream_options", _include_usage, None)
    if include_usage is not None and not stream:
        fields.refuse("stream_options", "is only allowed where stream is true")
    scale, blend = fields.read("lora_scale", number(-MAX_SCALE, MAX_SCALE), None), fields.read("adapters", _blend, None)
    seed, deadline = fields.read("seed", whole(-(2**63), 2**64 - 1), None), fields.read("timeout", _seconds, None)
    fields.end()
    return Asked(
        kind,
        model,
        prompts,
        sampling,
        scale,
        blend,
        n,
        seed,
        stream,
        bool(include_usage),
        deadline=deadline,
        ignored=fields.ignored,
        **more,
    )


def _sampling_of(fields: Fields) -> dict[str, Any]:
    """The settings that are given; those that chat and completions spell in the same way."""
    given = {name: fields.read(name, _setting(name), None) for name in _SETTINGS}
    given["stop"] = fields.read("stop", _stops, None)
    given["schema"] = fields.read("response_format", _schema, None)
    if given["grammar"] is not None and given["schema"] is not None:
        fields.refuse("grammar", "is given beside a response_format, expected one of them")
    return {name: value for name, value in given.items() if value is not None}


def _setting(name: str) -> Callable[[Any], Any]:
    """A reader of a field of `Sampling`."""

    def read(value: Any) -> Any:
        try:
            return getattr(Sampling.from_mapping({name: value}), name)
        except SettingsError as error:
            why = error.message.removeprefix("sampling: ")
            prefix = f"{name} is "
            message = why.removeprefix(f"{name} ") if why.startswith(prefix) else f"cannot be followed: {why}"
            raise Problem(f"{message}. {error.hint}" if error.hint else message) from None
        except (ValueError, RecursionError):  # a schema made for it
            raise Problem("cannot be followed") from None

    return read


def _model(value: Any) -> str:
    if not text(value):
        raise Problem("is empty, expected the name of a model")
    return str(value)


def _seconds(value: Any) -> float:
    if number(0, MAX_SECONDS)(value) == 0:
        raise Problem("is 0, expected seconds, more than none")
    return float(value)


def _include_usage(value: Any) -> bool:
    wanted = mapping(value).get("include_usage")
    return False if wanted is None else inner(wanted, flag, ".include_usage")


def _blend(value: Any) -> dict[str, float]:
    if not 1 <= len(mapping(value)) <= MAX_BLEND:
        raise Problem(f"has {len(value)} names, expected 1 to {MAX_BLEND} with their scales")
    return {name: inner(scale, number(-MAX_SCALE, MAX_SCALE), f".{name}") for name, scale in value.items()}


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else each(value, text, "text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise Problem(f"has {len(stops)} texts, expected at most {MAX_STOPS}")
    if not all(1 <= len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise Problem(f"has a text that is empty, or longer than {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _schema(value: Any) -> Mapping[str, Any] | None:
    """The schema of a response format; None for text."""
    wanted = member(mapping(value), "type", one_of("text", "json_object", "json_schema"))
    if wanted == "json_schema":
        described = member(value, "json_schema", mapping)
        inner(described, lambda it: member(it, "schema", mapping), ".json_schema")
        for name, reader in (("name", text), ("strict", flag)):
            if described.get(name) is not None:
                inner(described[name], reader, f".json_schema.{name}")
    schema = schema_of(value)
    return None if schema is None else cast(Mapping[str, Any], _setting("schema")(schema))


def _only_text(value: Any) -> list[str]:
    return each(value, one_of("text"), "a list")


def _messages(value: Any) -> list[dict[str, Any]]:
    messages = each(value, _message, "a list of messages")
    if not messages:
        raise Problem("is empty, expected a list of messages")
    if problem := check_messages(messages):
        raise Problem(f"cannot be followed: {problem}")
    return messages


def _message(value: Any) -> dict[str, Any]:
    role = member(mapping(value), "role", one_of(*_ROLES))
    if value.get("function_call") is not None:
        raise Problem("is deprecated and not supported: use tool_calls", UNSUPPORTED_FIELD, ".function_call")
    more: dict[str, Any] = {}
    if role == "assistant" and value.get("tool_calls") not in (None, []):
        more["tool_calls"] = inner(value["tool_calls"], lambda it: each(it, _tool_call, "a list"), ".tool_calls")
    if role == "tool":
        more["tool_call_id"] = member(value, "tool_call_id", text)
    if "tool_calls" in more and value.get("content") is None:
        value = {**value, "content": ""}
    member(value, "content", _check_content)
    plain = message_of(value)
    return {"role": plain["role"], "content": plain["content"], **more}


def _check_content(value: Any) -> None:
    """Text, or parts of text."""
    if not isinstance(value, str):
        each(value, _check_part, "text or a list of parts")


def _check_part(value: Any) -> None:
    kind = member(mapping(value), "type", text)
    if kind != "text":
        raise Problem(
            f"is {shown(kind)}: only text can be read here, no images, sound or files", UNSUPPORTED_VALUE, ".type"
        )
    member(value, "text", text)


def _tool_call(value: Any) -> dict[str, Any]:
    def function(described: Any) -> dict[str, str]:
        return {name: member(mapping(described), name, text) for name in ("name", "arguments")}

    return {
        "id": member(mapping(value), "id", text),
        "type": member(value, "type", one_of("function")),
        "function": member(value, "function", function),
    }


def _prompts(value: Any) -> Prompts:
    """A text, token ids, or a list of either."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return (_prompt(value),)
    prompts = each(value, _prompt, "text, token ids, or a list of either")
    if not prompts:
        raise Problem("is empty")
    return tuple(prompts)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Problem(f"is {shown(value)}, expected text or token ids", INVALID_TYPE)
    if not value:
        raise Problem("has no token")
    return each(value, whole(0, MAX_WHOLE), "token ids")
