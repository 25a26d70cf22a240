"""A conversation: its messages, the adapter that answers, and the slash commands. No terminal in here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import BASE_NAMES
from edgelora.chat.columns import side_by_side
from edgelora.chat.history import History
from edgelora.engine.engine import Completion, Engine, Stream
from edgelora.errors import DataFileError, SettingsError
from edgelora.messages import Message, user_message


class Leave(Exception):
    """Not an error: the user asked to go."""


@dataclass
class Session:
    """One conversation over an engine.

    Attributes:
        adapter: the adapter that answers, or None for the bare base.
        scales: override the scales that adapters were loaded with, by name.
        system: overrides the adapter's own system prompt; an empty string means none at all.
        sampling: overrides the adapter's own settings.
        history: where what was said is kept; None keeps nothing.
        width: columns of the screen, for answers side by side; 0 for one under the other.
    """

    engine: Engine
    adapter: str | None = None
    scales: dict[str, float] = field(default_factory=dict)
    system: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    history: History | None = None
    width: int = 0
    _conversation: int | None = None

    def ask(self, text: str) -> Stream:
        """Start the answer to `text`; `keep` it when it is complete."""
        return self._stream(user_message(text), self.adapter)

    def keep(self, text: str, reply: str) -> None:
        """Make a question and its answer part of the conversation, and of the history.

        Raises:
            DataFileError: the history cannot be written; from now on nothing is, and the conversation goes on.
        """
        said: list[Message] = [user_message(text), {"role": "assistant", "content": reply}]
        self.messages += said
        if self.history is None:
            return
        try:
            if self._conversation is None:
                self._conversation = self.history.begin(self.engine.base_name, text)
            self.history.add(self._conversation, said, self.adapter or "none")
        except DataFileError:
            self.history = None
            raise

    def _stream(self, question: Message, adapter: str | None) -> Stream:
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.engine.stream(
            [*system, *self.messages, question],
            adapter=adapter,
            scale=self.scales.get(adapter or ""),
            sampling=self.sampling or None,
        )

    def command(self, line: str) -> Iterator[str]:
        """Carry out `/name argument`; what it has to say comes as lines.

        Raises:
            Leave: the user asked to leave.
            EdgeloraError: an unknown command or adapter, a file that cannot be written.
        """
        name, _, argument = line.strip().partition(" ")
        if name not in _COMMANDS:
            raise SettingsError(f"unknown command {name}", hint="/help lists them.")
        return _COMMANDS[name].run(self, argument.strip())

    def describe_adapter(self) -> str:
        scale = f" at scale {self.scales[self.adapter]:g}" if self.adapter in self.scales else ""
        return f"{self.adapter or 'no adapter'}{scale}"

    def _adapter(self, argument: str) -> Iterator[str]:
        if argument:
            self.adapter = self._known(argument)
        yield f"Answering: {self.describe_adapter()}. Loaded: {', '.join([*self.engine.adapters, 'none'])}."

    def _known(self, name: str) -> str | None:
        if name in BASE_NAMES:
            return None
        if name not in self.engine.adapters:
            raise SettingsError(f"no adapter {name!r}", hint=f"Loaded: {', '.join([*self.engine.adapters, 'none'])}.")
        return name

    def _scale(self, argument: str) -> Iterator[str]:
        *names, number = argument.split() or [""]
        name = self._known(names[0]) if names else self.adapter
        if name is None:
            raise SettingsError("the bare base has no scale", hint="For example: /scale support 0.5.")
        try:
            if len(names) > 1:
                raise ValueError
            scale = float(number)
        except ValueError:
            raise SettingsError(f"{argument!r} is not a scale", hint="For example: /scale 0.5") from None
        if not math.isfinite(scale):
            raise SettingsError(f"scale is {scale}, expected a finite number")
        self.scales[name] = scale
        yield f"{name} is applied at scale {scale:g}. Answering: {self.describe_adapter()}."

    def _system(self, argument: str) -> Iterator[str]:
        self.system = None if not argument else "" if argument == "none" else argument
        yield {None: "System prompt: the adapter's own.", "": "No system prompt."}.get(
            self.system, "System prompt set."
        )

    def _reset(self, _argument: str) -> Iterator[str]:
        self.messages.clear()
        self._conversation = None
        yield "The conversation starts again."

    def _compare(self, argument: str) -> Iterator[str]:
        """Ask several adapters the same thing at the same time; the conversation does not change."""
        names, question = self._compared(argument)
        messages = self.messages
        if not question:
            if not self.messages:
                raise SettingsError("nothing to compare yet", hint="/compare QUESTION, or ask something first.")
            question, self.messages = self.messages[-2]["content"], self.messages[:-2]
        try:
            streams = {name or "none": self._stream(user_message(question), name) for name in names}
        finally:
            self.messages = messages
        try:
            answers = {name: stream.completion.text for name, stream in streams.items()}
        finally:
            for stream in streams.values():
                stream.cancel()
        yield from side_by_side(answers, self.width)

    def _compared(self, argument: str) -> tuple[list[str | None], str]:
        """Who is asked, and what: names and commas first, if there are any."""
        first, _, rest = argument.partition(" ")
        known = {*self.engine.adapters, *BASE_NAMES}
        if "," in first or first in known:
            names = [self._known(name) for name in first.split(",") if name]
            return list(dict.fromkeys(names)), rest.strip()
        return [None, *self.engine.adapters], argument

    def _save(self, argument: str) -> Iterator[str]:
        if not argument:
            raise SettingsError("no file named", hint="For example: /save talk.jsonl")
        if not self.messages:
            raise SettingsError("nothing to save yet")
        row = {"messages": self.messages, "adapter": self.adapter or "none"}
        try:
            with open(Path(argument).expanduser(), "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataFileError(f"{argument}: {error.strerror}") from None
        yield f"Appended to {argument}, as a row that `edgelora train` reads."

    def _help(self, _argument: str) -> Iterator[str]:
        width = max(len(command.usage) for command in _COMMANDS.values())
        yield from (f"{command.usage:{width}}  {command.help}" for command in _COMMANDS.values())

    def _leave(self, _argument: str) -> Iterator[str]:
        raise Leave


@dataclass(frozen=True)
class _Command:
    usage: str
    help: str
    run: Callable[[Session, str], Iterator[str]]


_COMMANDS = {
    entry.usage.split()[0]: entry
    for entry in (
        _Command(
            "/adapter [NAME|none]", "switch the adapter that answers; alone, show which are loaded", Session._adapter
        ),
        _Command(
            "/scale [NAME] NUMBER", "how strongly an adapter is applied: 0 not at all, 1 as trained", Session._scale
        ),
        _Command(
            "/compare [A,B] [QUESTION]",
            "ask these (the base and every adapter) side by side; the last question, if none is given",
            Session._compare,
        ),
        _Command("/system [TEXT|none]", "set the system prompt; alone, go back to the adapter's own", Session._system),
        _Command("/reset", "forget the conversation", Session._reset),
        _Command("/save FILE", "append the conversation to a JSONL file", Session._save),
        _Command("/help", "this list", Session._help),
        _Command("/exit", "leave (also Ctrl-D)", Session._leave),
    )
}


def describe(completion: Completion) -> str:
    """Speed and size of an answer, for `--stats`."""
    return (
        f"{completion.prompt_tokens} prompt tokens ({completion.cached_tokens} cached), first token after "
        f"{completion.seconds_to_first_token * 1000:.0f} ms; {completion.completion_tokens} tokens at "
        f"{completion.tokens_per_second:.1f} tokens/s; ended by {completion.finish_reason}"
    )
