"""From the rows of a batch's input to requests: what each is called, what answers it, or what is wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import BASE_NAMES, AdapterRef
from edgelora.batch_formats import OPENAI, PLAIN, Format, Named, format_of
from edgelora.batch_input import typed
from edgelora.batch_ledger import Ledger
from edgelora.batch_template import PromptTemplate
from edgelora.engine.engine import Engine, Request
from edgelora.engine.planning import ERROR
from edgelora.engine.preflight import content_hash
from edgelora.errors import ContextOverflowError, DataFileError, ModelFileError, SettingsError
from edgelora.messages import Message, check_messages, user_message
from edgelora.rows import Row, read_rows
from edgelora.sampling import Sampling

ROW_FIELDS = ("id", "prompt", "messages", "adapter", "scale", "system", "metadata")
HASH_DIGITS = 16
# An error of these kinds is the row's; any other ends the batch.
ROW_ERRORS = (SettingsError, ModelFileError, DataFileError, ContextOverflowError)
_ROWS = "Each line is a JSON object with `prompt` or `messages`; with a prompt template, the columns that it names."


@dataclass(frozen=True)
class Defaults:
    """What rows that say nothing of it get.

    Attributes:
        sampling: settings over the adapter's own defaults.
        prompt: a template that makes the prompt of each row's columns, `Classify: {text}`.
    """

    adapter: str | None = None
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None


@dataclass(frozen=True)
class Item:
    """A row of the input that is to be answered."""

    place: int
    row: Row
    named: Named


class Rows:
    """The rows of an input, and how this engine and these defaults answer them.

    Args:
        name: what messages call the input.

    Raises:
        SettingsError: a prompt template that cannot be read, or that this input has no use for.
    """

    def __init__(self, engine: Engine, source: Path, name: str, defaults: Defaults) -> None:
        self._engine, self._source, self._name, self._defaults = engine, source, name, defaults
        self._sampling = {name: value for name, value in defaults.sampling.items() if value is not None}
        self._template = PromptTemplate(defaults.prompt) if defaults.prompt is not None else None
        self._is_csv = source.suffix.lower() == ".csv"
        self.format = self._first_format()
        self._bare = {*BASE_NAMES, engine.base_name} if self.format is OPENAI else set(BASE_NAMES)
        self._decode_rows = engine.deterministic_rows
        self._loaded_names: dict[str, str] = {}
        self._answer_hashes: dict[str, str] = {}
        self._base = (engine.base_fingerprint, engine.base.stat().st_size, engine.template_source, *_unusual(engine))

    def _first_format(self) -> Format:
        first = next((row for row in read_rows(self._source) if not row.problem), None)
        if not first:
            return PLAIN
        found = format_of(first)
        if self._template and found is OPENAI:
            raise SettingsError(
                f"{self._name}: its rows are OpenAI's batch requests, which have their own messages",
                hint="Leave out the prompt template, or give rows with columns.",
            )
        if self._template and first.columns:
            self._template.check(first.columns)
        return found

    def note(self, ledger: Ledger) -> None:
        """Enter every row of the input in the ledger.

        Raises:
            DataFileError: no rows, or none that can be read as one.
        """
        n_rows, n_unreadable, first_problem = 0, 0, ""
        for n_rows, row in enumerate(read_rows(self._source), start=1):
            ledger.add(n_rows - 1, row.line, self._id(row), self._key(row))
            if problem := row.problem or self._missing_columns(row):
                n_unreadable += 1
                first_problem = first_problem or f"line {row.line} is {problem}"
        if not n_rows:
            raise DataFileError(f"{self._name}: no rows", hint=_ROWS)
        if n_unreadable == n_rows:
            raise DataFileError(f"{self._name}: no line is a row; {first_problem}", hint=_ROWS)
        ledger.select()

    def to_do(self, ledger: Ledger) -> Iterator[tuple[Item, str]]:
        """The rows that the ledger has to do, each with what is wrong with it: mostly the empty text.

        Raises:
            DataFileError: the input is not what it was when it was entered.
        """
        for place, row in enumerate(read_rows(self._source)):
            entry = ledger.entry(place)
            if entry is None or not self._is_same(row, entry.key):
                raise DataFileError(
                    f"{self._name}:{row.line}: changed while the batch was running",
                    hint="What was written is kept; run the same command again.",
                )
            if not entry.is_to_do:
                continue
            labels, problem = self._id(row) or {"line": row.line}, row.problem
            if entry.first_line:
                problem = f"the id {labels['id']!r} was used on line {entry.first_line} already"
                labels = {**labels, "line": row.line}
            named = Named(labels, self._adapter(row.data), entry.key, self._metadata(row.data))
            yield Item(place, row, named), problem

    def request(self, item: Item) -> Request:
        """The engine's request for a row.

        Raises:
            SettingsError, ModelFileError: fields, messages, numbers or an adapter that cannot be used.
        """
        data = self._fields(item.row)
        if problem := _problem(data):
            raise SettingsError(problem)
        data = typed(data) if self._is_csv else data
        settings = {name: data[name] for name in Sampling.field_names() if data.get(name) is not None}
        seed = int(item.named.key[:8], 16)
        name, scale = self._loaded(item.named.adapter)
        scale = data["scale"] if data.get("scale") is not None else scale
        sampling = {"seed": seed, **self._sampling, **settings}
        return Request(self._messages(data), name, scale, sampling, deterministic=True)

    def _fields(self, row: Row) -> Mapping[str, Any]:
        """The row as a plain one."""
        data = self.format.fields(row.data)
        if not self._template:
            return data
        if "messages" in data:
            raise SettingsError("a row with `messages` and a prompt template: only one of them can be the prompt")
        own = {name: value for name, value in data.items() if name in ROW_FIELDS or name in Sampling.field_names()}
        return {**own, "prompt": self._template.render(data, row.columns)}

    def _missing_columns(self, row: Row) -> str:
        try:
            if self._template:
                self._template.check(row.columns or row.data)
        except SettingsError as error:
            return f"none for the template: {error.message}"
        return ""

    def _id(self, row: Row) -> dict[str, Any]:
        id = self.format.id_of(row.data)
        return {} if id is None else {"id": id}

    def _adapter(self, data: Mapping[str, Any]) -> str:
        name = self.format.adapter_of(data) or self._defaults.adapter or "none"
        return name if isinstance(name, str) else "none"

    def _metadata(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        found = {"metadata": data["metadata"]} if "metadata" in data else {}
        try:
            return typed(found) if self._is_csv else found
        except SettingsError:
            return found

    def _key(self, row: Row) -> str:
        """What the row says, what answers it, and how many rows each of its decodes has: another number rounds
        otherwise."""
        said = _digest([row.problem or dict(row.data)])
        return f"{said}.{self._answer_hash(self._adapter(row.data))}.{self._decode_rows}"

    def _is_same(self, row: Row, key: str) -> bool:
        return key.startswith(_digest([row.problem or dict(row.data)]))

    def _answer_hash(self, adapter: str) -> str:
        """What answers a row, beside what the row itself says."""
        if adapter not in self._answer_hashes:
            run = [self._defaults.system, self._sampling, self._defaults.prompt]
            self._answer_hashes[adapter] = _digest([*self._base, *self._adapter_hash(adapter), *run])
        return self._answer_hashes[adapter]

    def _adapter_hash(self, name: str) -> list[Any]:
        """Content and scale of an adapter that a row names; empty where it cannot be found (yet)."""
        try:
            if name in self._engine.adapters:
                loaded = self._engine.adapter(name)
                return [loaded.content_hash, loaded.scale]
            if name in self._bare:
                return ["none"]
            reference = AdapterRef.parse(name)
            return [content_hash(reference.path), reference.scale]
        except ROW_ERRORS:
            return []

    def _messages(self, data: Mapping[str, Any]) -> list[Message]:
        messages = [user_message(data["prompt"])] if "prompt" in data else data["messages"]
        if problem := check_messages(messages):
            raise SettingsError(problem)
        has_system = messages[0]["role"] == "system"
        system = data.get("system")
        if has_system and system is not None:
            raise SettingsError("`system` is given twice: as a field and as the first message")
        if system is None and not has_system:
            system = self._defaults.system
        # An empty one stands for none at all: the adapter's own is not used then.
        return list(messages) if system is None else [{"role": "system", "content": system}, *messages]

    def _loaded(self, adapter: str) -> tuple[str, float | None]:
        """The engine's name and the scale for what a row calls its adapter; a path is loaded at its first use."""
        if adapter in self._engine.adapters:
            return adapter, None
        if adapter in self._bare:
            return "none", None
        reference = AdapterRef.parse(adapter)
        if not reference.path.exists():
            loaded = ", ".join(sorted(self._engine.adapters)) or "none"
            raise ModelFileError(f"unknown adapter {adapter!r}: neither a loaded name ({loaded}) nor a file")
        if adapter not in self._loaded_names:
            name = f"{reference.name}-{content_hash(reference.path)[:HASH_DIGITS]}"
            self._loaded_names[adapter] = self._engine.load_adapter(name, reference.path, reference.scale).name
        return self._loaded_names[adapter], reference.scale


def _unusual(engine: Engine) -> list[Any]:
    """How this engine computes, where that is not as usual: rounded KV, conversations that are cut to the window."""
    cut = [] if engine.on_overflow == ERROR else [engine.on_overflow, engine.n_ctx]
    return [*cut, *([] if engine.kv_type == "f16" else [engine.kv_type])]


def _problem(data: Mapping[str, Any]) -> str:
    """What is wrong with a plain row's fields, before anything is computed; empty if nothing is."""
    known = {*ROW_FIELDS, *Sampling.field_names()}
    if unknown := sorted(set(data) - known):
        return f"unknown fields: {', '.join(unknown)} (put your own under `metadata`)"
    if ("prompt" in data) == ("messages" in data):
        return "expected either `prompt` or `messages`"
    texts = [name for name in ("prompt", "adapter", "system") if not isinstance(data.get(name), str | None)]
    return f"expected text in: {', '.join(texts)}" if texts else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:HASH_DIGITS]
