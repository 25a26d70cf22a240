"""Rows in, rows out: a JSONL or CSV file worked through by the engine, each row by the adapter it names.

    {"id": 7, "prompt": "Is it waterproof?", "adapter": "support", "max_tokens": 40}
    {"id": 7, "text": "Yes, IP67.", "finish_reason": "stop", "usage": {"prompt_tokens": 21, "completion_tokens": 6},
     "adapter": "support", "adapter_hash": "9f3a...", "key": "5d41402abc4b2a76.b9719d911017c592"}

A row has `prompt` or `messages`; it may have `id`, `adapter` (a loaded name, or a path), `scale`, `system`, the
sampling settings, and `metadata`, which is copied to the output. In CSV, the columns are these fields. A row that
cannot be answered becomes an output row with `error` in the place of `text`, and the work goes on.

Resuming. Every output row has a `key` of two halves: what the row said, and what answered it (base, adapter content,
the run's settings). What is in the output already is not done again; `edgelora.resumption` has the rules.

Results are reproducible: rows without a seed get one from their content, and no row depends on what ran before it
(`Request.deterministic`). So an interrupted and resumed batch ends as the uninterrupted one, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import BASE_NAMES, AdapterRef
from edgelora.batch_input import rereadable, typed
from edgelora.engine.engine import BATCH_WINDOW, Completion, Engine, Request, Stream
from edgelora.engine.preflight import content_hash
from edgelora.errors import ContextOverflowError, DataFileError, ModelFileError, SettingsError
from edgelora.messages import Message, Row, check_messages, read_rows, user_message
from edgelora.results import open_results
from edgelora.resumption import Identities, reconcile
from edgelora.sampling import Sampling

ROW_FIELDS = ("id", "prompt", "messages", "adapter", "scale", "system", "metadata")
HASH_DIGITS = 16
# An error of these kinds is the row's; any other ends the batch.
ROW_ERRORS = (SettingsError, ModelFileError, DataFileError, ContextOverflowError)
OnRow = Callable[[Mapping[str, Any], int, int], None]


@dataclass(frozen=True)
class Defaults:
    """What rows that say nothing of it get.

    Attributes:
        sampling: settings over the adapter's own defaults.
    """

    adapter: str | None = None
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchSummary:
    """How a batch went.

    Attributes:
        rows: in the input.
        resumed: rows that an earlier run had done.
        written: rows of this run, `errors` of them error rows.
        all_errors: error rows in the output, those of earlier runs included.
        by_adapter: rows written with each adapter.
    """

    rows: int
    resumed: int
    written: int
    errors: int
    all_errors: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    by_adapter: Mapping[str, int]


def run_batch(
    engine: Engine,
    input: Path | str,
    output: Path | str,
    *,
    defaults: Defaults | None = None,
    redo: bool = False,
    retry_errors: bool = False,
    on_row: OnRow | None = None,
) -> BatchSummary:
    """Answer every row of `input` that `output` does not hold yet.

    Args:
        input: JSONL or CSV; `-` is JSONL on standard input.
        output: JSONL, appended to; `-` is standard output, which cannot be resumed.
        redo: drop results that do not belong to this input, base, adapters and settings, and do them again.
        retry_errors: do rows again that ended in an error.
        on_row: called with each output row, the number of rows done and of rows in all.

    Raises:
        DataFileError: a file cannot be read or written, is locked, or holds results of another batch.
        EdgeloraError: the engine cannot go on. What was written is kept.
    """
    with rereadable(input) as source:
        if str(output) != "-" and Path(output).exists() and Path(output).samefile(source):
            raise DataFileError(f"{output}: is the input too", hint="Name another output with -o.")
        batch = _Batch(engine, source, str(input), defaults or Defaults(), on_row)
        try:
            return batch.run(output, redo, retry_errors)
        except KeyboardInterrupt:
            where = "were written" if str(output) == "-" else f"are in {output}; run the same command to go on"
            raise KeyboardInterrupt(f"{batch.n_done} rows {where}") from None


@dataclass(frozen=True)
class _Item:
    """A row to answer: how the output calls it, what is to be done, or what is wrong with it."""

    row: Row
    identity: str
    labels: Mapping[str, Any]
    key: str
    adapter: str
    problem: str = ""


class _Batch:
    """One run over one input."""

    def __init__(self, engine: Engine, source: Path, name: str, defaults: Defaults, on_row: OnRow | None) -> None:
        self.engine, self.source, self.name, self.defaults, self.on_row = engine, source, name, defaults, on_row
        self.sampling = {name: value for name, value in defaults.sampling.items() if value is not None}
        self.n_done = 0
        self.is_csv = source.suffix.lower() == ".csv"
        self._names: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self._base = (engine.base_fingerprint, engine.base.stat().st_size, engine.template_source)

    def run(self, output: Path | str, redo: bool, retry_errors: bool) -> BatchSummary:
        start = time.perf_counter()
        wanted = self.wanted()
        counts: Counter[str] = Counter()
        by_adapter: Counter[str] = Counter()
        with open_results(output) as results:
            resumed = reconcile(results.rows(), wanted, output, redo=redo, retry_errors=retry_errors)
            done, self.n_done = resumed.done, len(resumed.done)
            for item, result in self.answers(item for item in self.items() if item.identity not in done):
                results.append(result)
                self.n_done += 1
                counts.update(written=1, errors="error" in result, **result.get("usage", {}))
                by_adapter[item.adapter] += 1
                if self.on_row:
                    self.on_row(result, self.n_done, len(wanted))
            if resumed.replaced:
                results.drop(resumed.replaced)
        return BatchSummary(
            rows=len(wanted),
            resumed=len(done),
            written=counts["written"],
            errors=counts["errors"],
            all_errors=counts["errors"] + sum(done.values()),
            prompt_tokens=counts["prompt_tokens"],
            completion_tokens=counts["completion_tokens"],
            seconds=time.perf_counter() - start,
            by_adapter=dict(by_adapter),
        )

    def wanted(self) -> dict[str, str]:
        """Every row's identity and key.

        Raises:
            DataFileError: no rows, or none that can be read as one.
        """
        wanted, unreadable = dict[str, str](), list[Row]()
        for item in self.items():
            wanted[item.identity] = item.key
            if item.row.problem and len(unreadable) < len(wanted):
                unreadable.append(item.row)
        hint = "Each line is a JSON object with `prompt` or `messages`."
        if not wanted:
            raise DataFileError(f"{self.name}: no rows", hint=hint)
        if len(unreadable) == len(wanted):
            first = unreadable[0]
            raise DataFileError(f"{self.name}: no line is a row; line {first.line} is {first.problem}", hint=hint)
        return wanted

    def items(self) -> Iterator[_Item]:
        """The input's rows; the second of two rows with one id is an error row."""
        first_lines: dict[str, int] = {}
        identities = Identities()
        for row in read_rows(self.source):
            labels: dict[str, Any] = {"id": row.data["id"]} if row.data.get("id") is not None else {"line": row.line}
            problem = row.problem
            if "id" in labels:
                first = first_lines.setdefault(json.dumps(labels["id"], sort_keys=True), row.line)
                if first != row.line:
                    problem = f"the id {labels['id']!r} was used on line {first} already"
                    labels["line"] = row.line
            adapter = row.data.get("adapter") or self.defaults.adapter or "none"
            adapter = adapter if isinstance(adapter, str) else "none"
            key = f"{_digest([row.problem or dict(row.data)])}.{self.settings_hash(adapter)}"
            problem = problem or self.problem_of(row.data)
            yield _Item(row, identities.name(labels, key), labels, key, adapter, problem)

    def problem_of(self, data: Mapping[str, Any]) -> str:
        """What is wrong with a row's fields, before anything is computed; empty if nothing is."""
        known = {*ROW_FIELDS, *Sampling.field_names()}
        if unknown := sorted(set(data) - known):
            return f"unknown fields: {', '.join(unknown)} (put your own under `metadata`)"
        if ("prompt" in data) == ("messages" in data):
            return "expected either `prompt` or `messages`"
        texts = [name for name in ("prompt", "adapter", "system") if not isinstance(data.get(name), str | None)]
        return f"expected text in: {', '.join(texts)}" if texts else ""

    def settings_hash(self, adapter: str) -> str:
        """What answers a row, beside what the row itself says."""
        if adapter not in self._hashes:
            run = [self.defaults.system, self.sampling]
            self._hashes[adapter] = _digest([*self._base, *self.adapter_hash(adapter), *run])
        return self._hashes[adapter]

    def adapter_hash(self, name: str) -> list[Any]:
        """Content and scale of an adapter that a row names; empty where it cannot be found (yet)."""
        if name in BASE_NAMES:
            return ["none"]
        try:
            if name in self.engine.adapters:
                loaded = self.engine.adapter(name)
                return [loaded.content_hash, loaded.scale]
            reference = AdapterRef.parse(name)
            return [content_hash(reference.path), reference.scale]
        except ROW_ERRORS:
            return []

    def answers(self, items: Iterator[_Item]) -> Iterator[tuple[_Item, dict[str, Any]]]:
        """Output rows, in order; a few requests are in the engine's queue at any time."""
        waiting: deque[tuple[_Item, Stream | str]] = deque()
        for item in items:
            waiting.append((item, self.begin(item)))
            if len(waiting) >= BATCH_WINDOW:
                yield self.finish(*waiting.popleft())
        while waiting:
            yield self.finish(*waiting.popleft())

    def begin(self, item: _Item) -> Stream | str:
        """The reply on its way, or what is wrong."""
        if item.problem:
            return item.problem
        try:
            return self.engine.submit(self.request_of(item))
        except ROW_ERRORS as error:
            return error.message

    def finish(self, item: _Item, reply: Stream | str) -> tuple[_Item, dict[str, Any]]:
        try:
            body = {"error": reply} if isinstance(reply, str) else _reply_fields(reply.completion)
        except ROW_ERRORS as error:
            body = {"error": error.message}
        return item, {**item.labels, **body, "adapter": item.adapter, **self.metadata_of(item), "key": item.key}

    def metadata_of(self, item: _Item) -> dict[str, Any]:
        data = {name: value for name, value in item.row.data.items() if name == "metadata"}
        try:
            return typed(data) if self.is_csv else data
        except SettingsError:
            return data

    def request_of(self, item: _Item) -> Request:
        """The engine's request for a row.

        Raises:
            SettingsError, ModelFileError: messages, numbers or an adapter that cannot be used.
        """
        data = typed(item.row.data) if self.is_csv else item.row.data
        settings = {name: data[name] for name in Sampling.field_names() if data.get(name) is not None}
        seed = int(item.key[:8], 16)
        sampling = {"seed": seed, **self.sampling, **settings}
        name, scale = self.loaded(item.adapter)
        scale = data["scale"] if data.get("scale") is not None else scale
        return Request(self.messages_of(data), name, scale, sampling, deterministic=True)

    def messages_of(self, data: Mapping[str, Any]) -> list[Message]:
        messages = [user_message(data["prompt"])] if "prompt" in data else data["messages"]
        if problem := check_messages(messages):
            raise SettingsError(problem)
        has_system = messages[0]["role"] == "system"
        system = data.get("system")
        if has_system and system is not None:
            raise SettingsError("`system` is given twice: as a field and as the first message")
        if system is None and not has_system:
            system = self.defaults.system
        # An empty one stands for none at all: the adapter's own is not used then.
        return list(messages) if system is None else [{"role": "system", "content": system}, *messages]

    def loaded(self, adapter: str) -> tuple[str, float | None]:
        """The engine's name and the scale for what a row calls its adapter; a path is loaded at its first use."""
        if adapter in BASE_NAMES or adapter in self.engine.adapters:
            return adapter, None
        reference = AdapterRef.parse(adapter)
        if not reference.path.exists():
            raise SettingsError(f"unknown adapter {adapter!r}: neither a loaded name nor a file")
        if adapter not in self._names:
            name = f"{reference.name}-{content_hash(reference.path)[:HASH_DIGITS]}"
            self._names[adapter] = self.engine.load_adapter(name, reference.path, reference.scale).name
        return self._names[adapter], reference.scale


def _reply_fields(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": {"prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens},
        "adapter_hash": completion.adapter_hash or None,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:HASH_DIGITS]
