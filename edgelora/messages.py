"""Conversations, and the row formats of the files that hold them.

A training row is one JSON object on a line, in one of two shapes:

    {"messages": [{"role": "user", "content": "Is it waterproof?"}, {"role": "assistant", "content": "Yes, IP67."}]}
    {"prompt": "Is it waterproof?", "completion": "Yes, IP67."}

`weight` on an assistant message is OpenAI's: 0 leaves it out of training, 1 is the default. `tools`, `functions`,
`tool_calls` and `function_call` would change what the model reads and are refused; other fields (`id`, `name`,
`metadata` ...) do not reach a chat template and are ignored.

In a conversation with tools, an assistant's message may have `tool_calls`, and then no text; a tool's answers one:

    {"role": "assistant", "content": null, "tool_calls": [{"id": "a1", "type": "function",
        "function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}]}
    {"role": "tool", "tool_call_id": "a1", "content": "4 degrees"}

A batch row has `messages` (ending with the user's turn) or `prompt`, and may carry settings of its own.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

from edgelora.errors import DataFileError

ROLES = ("system", "user", "assistant", "tool")
MAX_PROBLEMS_SHOWN = 8
MAX_CSV_FIELD = 2**31 - 1  # Python's own limit is 128 KiB
_SURROGATE = re.compile("[\ud800-\udfff]")
TOOL_FIELDS = ("tools", "functions", "tool_calls", "function_call")


class Message(TypedDict):
    """One turn. `tool_calls`, `tool_call_id` and `name` are those of conversations with tools (`prepared`)."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Row:
    """One row of a data file: its 1-based line, its fields, or what is wrong with it.

    `data` is empty exactly where `problem` is not. `columns` are those of the file, where it has any: an empty cell is
    in no row's `data`.
    """

    line: int
    data: Mapping[str, Any]
    problem: str = ""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages that make sense to a chat template, and where they came from; in training, the last one is trained.

    `templated` is False for a prompt/completion row: without a chat template such a row is plain text to continue.
    `untrained` are the indices of assistant messages with weight 0.
    """

    messages: tuple[Message, ...]
    source: str
    templated: bool = True
    untrained: frozenset[int] = frozenset()


def user_message(content: str) -> Message:
    return {"role": "user", "content": content}


def read_rows(path: Path | str) -> Iterator[Row]:
    """Rows of a JSONL, CSV or Parquet file (by its suffix), or of JSONL on standard input for `-`; blank lines are
    skipped.

    A row that cannot be read is yielded with its `problem`, so that the caller decides whether one bad row ends the
    work (training) or is only reported (batch).

    Raises:
        DataFileError: the file is missing, not a file, or not what its suffix says.
        MissingExtraError: a Parquet file, without pyarrow.
    """
    with _open_text(path) as file:
        yield from _READERS.get(Path(path).suffix.lower(), _jsonl_rows)(file)


@contextmanager
def _open_text(path: Path | str) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; a separate try keeps errors of the body out of this one
    except OSError as error:
        raise DataFileError(
            f"{path}: {error.strerror}", hint="Give a JSONL file: one JSON object on each line."
        ) from None
    with file:
        yield file


def _jsonl_rows(file: IO[bytes]) -> Iterator[Row]:
    for line, raw in enumerate(file, start=1):
        text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if not text.strip():
            continue
        try:
            data = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            yield Row(line, {}, "not UTF-8 text")
        except json.JSONDecodeError as error:
            yield Row(line, {}, f"not JSON ({error.msg} at column {error.colno})")
        except ValueError:  # Python reads no numbers of more than 4,300 digits
            yield Row(line, {}, "not JSON (a number with too many digits)")
        except RecursionError:
            yield Row(line, {}, "JSON nested too deeply")
        else:
            yield (
                Row(line, data)
                if isinstance(data, dict)
                else Row(line, {}, f"a JSON {_json_type(data)}, expected an object")
            )


def _csv_rows(file: IO[bytes]) -> Iterator[Row]:
    csv.field_size_limit(MAX_CSV_FIELD)
    # Bytes that are not UTF-8 pass as surrogates, so that they spoil their own row and no other.
    lines = (raw.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, raw in enumerate(file))
    reader = csv.DictReader(lines, strict=True)
    while True:
        try:
            data = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(reader.line_num, {}, f"not CSV ({error})")
            return  # the reader's quoting state is lost: what follows cannot be told apart
        if None in data or None in data.values():
            yield Row(
                reader.line_num, {}, f"a row of another length than the header ({', '.join(reader.fieldnames or ())})"
            )
        elif any(_SURROGATE.search(text) for text in (*data, *data.values())):
            yield Row(reader.line_num, {}, "not UTF-8 text")
        else:
            filled = {name: value for name, value in data.items() if value != ""}
            yield Row(reader.line_num, filled, columns=tuple(data))


def _parquet_rows(file: IO[bytes]) -> Iterator[Row]:
    from edgelora.parquet import parquet_rows

    for number, (columns, data) in enumerate(parquet_rows(file), start=1):
        yield Row(number, data, columns=columns)


_READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def check_messages(value: object) -> str:
    """What keeps `value` from being a list of chat messages; empty if nothing does."""
    if not isinstance(value, list):
        return f"`messages` is a JSON {_json_type(value)}, expected a list of {{role, content}} objects"
    if not value:
        return "`messages` is empty"
    for index, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"message {index} is a JSON {_json_type(message)}, expected an object with `role` and `content`"
        if message.get("role") not in ROLES:
            return f"message {index} has role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
        if message["role"] == "assistant" and message.get("tool_calls") is not None:
            if problem := _tool_calls(message["tool_calls"]):
                return f"message {index} has `tool_calls` {problem}"
            if message["tool_calls"] and message.get("content") is None:
                continue
        if not isinstance(message.get("content"), str):
            return f"message {index} has `content` of type {_json_type(message.get('content'))}, expected a string"
        if message["role"] == "system" and index > 1:
            return f"message {index} is a system message; only the first may be"
    return ""


def _tool_calls(calls: Any) -> str:
    """What keeps `calls` from being those of an assistant's message; empty if nothing does."""
    if not isinstance(calls, list):
        return f"of type {_json_type(calls)}, expected a list"
    for number, call in enumerate(calls, start=1):
        function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else 0
        if not isinstance(function, dict):
            return f"of which {number} is no function's"
        name, identifier = function.get("name"), call.get("id", "")
        if not isinstance(name, str) or not _CALL_NAME.fullmatch(name):
            return f"of which {number} has name {name!r}, expected 1 to 64 letters, digits, _ and -"
        if not isinstance(identifier, str) or not _CALL_ID.fullmatch(identifier):
            return f"of which {number} has id {identifier!r}, expected letters, digits, _, -, . and :"
        if not isinstance(_arguments(function.get("arguments")), dict):
            return f"of which {number} has `arguments` that are no JSON object as text"
    return ""


_CALL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CALL_ID = re.compile(r"[A-Za-z0-9_.:-]{0,128}")


def _arguments(given: Any) -> Any:
    """A call's arguments, which OpenAI has as JSON text, and Hugging Face's chat templates as an object."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given or "{}")
    except (ValueError, RecursionError):
        return None


def check_tool_turns(messages: list[Any]) -> str:
    """What keeps the tools' messages from answering the calls before them; empty if nothing does.

    Args:
        messages: of which `check_messages` finds nothing.
    """
    open_calls: set[str] = set()
    for index, message in enumerate(messages, start=1):
        open_calls |= {call.get("id", "") for call in message.get("tool_calls") or ()}
        if message["role"] == "tool":
            identifier = message.get("tool_call_id")
            if not isinstance(identifier, str) or identifier not in open_calls:
                return f"message {index} has tool_call_id {identifier!r}, which is that of no call before it"
    return ""


def prepared(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as chat templates take them, with nothing that those do not read: arguments of calls as objects, text
    that is null as empty, and a tool's message with the tool's name.

    Args:
        messages: of which `check_messages` finds nothing.
    """
    made, names = list[Message](), dict[str, str]()
    for given in messages:
        message: Message = {"role": given["role"], "content": given.get("content") or ""}
        if given["role"] == "assistant" and given.get("tool_calls"):
            message["tool_calls"] = [_prepared_call(call) for call in given["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in message["tool_calls"] if "id" in call}
        if given["role"] == "tool":
            identifier = given.get("tool_call_id")
            name = given.get("name") or names.get(str(identifier))
            message |= {"tool_call_id": identifier} if isinstance(identifier, str) else {}
            message |= {"name": name} if isinstance(name, str) else {}
        made.append(message)
    return made


def _prepared_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])}
    return {**({"id": call["id"]} if "id" in call else {}), "type": "function", "function": function}


def conversation_of(row: Row, source: str) -> Conversation | str:
    """The training conversation in a row, or what is wrong with the row."""
    data = row.data
    if row.problem:
        return row.problem
    if problem := _tool_fields(data):
        return problem
    if "messages" in data:
        return _messages_conversation(data["messages"], source)
    if "prompt" in data and "completion" in data:
        return _prompt_conversation(data["prompt"], data["completion"], source)
    found = ", ".join(f"`{name}`" for name in data) or "no fields"
    return f"expected `messages`, or `prompt` and `completion`; found {found}"


def _messages_conversation(messages: Any, source: str) -> Conversation | str:
    if problem := check_messages(messages) or _weights(messages):
        return problem
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [index for index in replies if messages[index].get("weight", 1)]
    if not any(messages[index]["content"].strip() for index in trained):
        return "no assistant message with text (and a weight other than 0), so nothing to learn from"
    if messages[-1]["role"] != "assistant":
        return f"the last message is the {messages[-1]['role']}'s, expected the assistant's reply"
    untrained = frozenset(replies).difference(trained)
    return Conversation(_clean(messages[: trained[-1] + 1]), source, untrained=untrained)


def _tool_fields(data: Mapping[str, Any]) -> str:
    """Fields in which a row describes or calls tools; empty text if there are none."""
    found = [f"`{name}`" for name in TOOL_FIELDS if data.get(name)]
    messages = data.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else [], start=1):
        names = [name for name in TOOL_FIELDS if isinstance(message, dict) and message.get(name)]
        found += [f"`{name}` in message {index}" for name in names]
    return f"{', '.join(found)}: training on tools is not supported yet" if found else ""


def _weights(messages: list[dict[str, Any]]) -> str:
    for index, message in enumerate(messages, start=1):
        if message.get("weight", 1) not in (0, 1):
            return f"message {index} has weight {message['weight']!r}, expected 0 or 1"
        if "weight" in message and message["role"] != "assistant":
            return f"message {index} has a weight, which only the assistant's messages take"
    return ""


def _prompt_conversation(prompt: Any, completion: Any, source: str) -> Conversation | str:
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational prompt/completion
        return _messages_conversation(prompt + completion, source)
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            return f"`{name}` is a JSON {_json_type(value)}, expected a string"
    if not completion.strip():
        return "`completion` is empty, so nothing to learn from"
    reply: Message = {"role": "assistant", "content": completion}
    return Conversation((user_message(prompt), reply), source, templated=False)


def _clean(messages: list[dict[str, Any]]) -> tuple[Message, ...]:
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def read_conversations(path: Path | str) -> list[Conversation]:
    """Every training conversation of a file.

    Raises:
        DataFileError: the file cannot be read, holds no row, or holds bad rows (up to eight are named by line).
    """
    conversations, problems = [], []
    for row in read_rows(path):
        found = conversation_of(row, f"{path}:{row.line}")
        if isinstance(found, str):
            problems.append(f"{path}:{row.line}: {found}")
        else:
            conversations.append(found)
    if problems:
        raise DataFileError(
            _summary(problems), hint="Each line is one JSON object with `messages`, or with `prompt` and `completion`."
        )
    if not conversations:
        raise DataFileError(
            f"{path}: no rows", hint="Each line is one JSON object with `messages`, or with `prompt` and `completion`."
        )
    return conversations


def _summary(problems: list[str]) -> str:
    shown = problems[:MAX_PROBLEMS_SHOWN]
    rest = len(problems) - len(shown)
    return "\n".join([*shown, *([f"... and {rest} more bad rows"] if rest else [])])


def _json_type(value: object) -> str:
    names = {
        dict: "object",
        list: "list",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
