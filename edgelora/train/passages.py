"""Which characters of a rendered conversation the assistant has to produce, for any chat template.

A template is a program that turns messages into text; few say which part is the assistant's. It is found by asking for
the text at three points of each assistant turn:

    before    the messages so far, ending where the reply begins   ...Hi<|im_end|>\\n<|im_start|>assistant\\n
    after     the same with the reply                              ...<|im_start|>assistant\\nHello!<|im_end|>\\n
    probe     the same with another reply                          ...<|im_start|>assistant\\n(probe)<|im_end|>\\n

`before` must begin `after`, as at serving time the model goes on from `before`; what `after` and `probe` share at their
ends is the template's, and is trained up to its first special token (`<|im_end|>` here): so the model learns to stop.
Some templates write that token at the start of the next turn only (GLM, Apertus): then it is added.

A reply that calls tools is text like any other, as the template writes it; what tools answer is not trained.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message, user_message
from edgelora.template import ChatTemplate
from edgelora.tools.families import required_family
from edgelora.tools.writing import written_message

Tools = Sequence[Mapping[str, Any]]
PROBE = "reply-probe-5f3a"
_QUESTION = user_message("question-probe-5f3a")
_HINT = "Give another template with --chat-template, for example chatml."


@dataclass(frozen=True)
class Passage:
    """A text and the character ranges of it that are trained, in order.

    `rebuilt` texts are what serving sees, and not what the template makes of the whole conversation.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    rebuilt: bool = False


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: the text up to its end, and the range of it that is trained."""

    text: str
    start: int
    end: int
    rebuilt: bool

    @property
    def trained_text(self) -> str:
        return self.text[: self.end]


class PassageFinder:
    """Finds the assistant's text under one template.

    Args:
        template: the chat template, as it will be used in serving.
        bos_token, eos_token: the tokenizer's, empty where it has none.
        special_tokens: texts of the tokenizer's added tokens; the first after a reply ends the turn, unless it is the
            token that begins a sequence.
    """

    def __init__(
        self, template: ChatTemplate, *, bos_token: str, eos_token: str, special_tokens: Iterable[str]
    ) -> None:
        self.template = template
        self._bos, self._eos = bos_token, eos_token
        longest_first = sorted(({*special_tokens} - {bos_token} | {eos_token}) - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Message], *, reply_next: bool = False, tools: Tools = ()) -> str:
        """The text that serving makes of the same conversation.

        Raises:
            ModelFileError: the template refuses it, or does not support tools that it has.
        """
        try:
            if tools:
                required_family(self.template)
            written = [written_message(self.template, message) for message in messages]
        except SettingsError as error:
            raise ModelFileError(error.message, hint=_HINT) from None
        return self.template.render(
            written, add_generation_prompt=reply_next, bos_token=self._bos, eos_token=self._eos, tools=tools or None
        )

    def document(self, text: str) -> Passage:
        """A text that no template sees: all of it is trained, and that it ends."""
        whole = f"{self._bos}{text}{self._eos}"
        return Passage(whole, ((len(self._bos), len(whole)),))

    def passages(
        self, messages: Sequence[Message], untrained: Collection[int] = (), tools: Tools = ()
    ) -> list[Passage]:
        """The conversation as one passage; as one passage a reply where the template rewrites earlier turns.

        Templates of reasoning models drop the reasoning of earlier replies, and Mistral's show the system prompt in
        the last question only, so that no single text holds every reply as it was produced. One text per reply is
        what serving sees.

        Args:
            untrained: indices of replies that are read only; the last message is not among them.
            tools: what the conversation's `tools` are to the template.

        Raises:
            ModelFileError: the template refuses the conversation, or its replies cannot be told from the rest.
        """
        replies = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in untrained]
        turns = [self._turn(messages[:i], messages[i], tools) for i in replies]
        whole = turns[-1].text
        if not any(turn.rebuilt for turn in turns) and all(whole.startswith(turn.trained_text) for turn in turns):
            return [Passage(whole, tuple((turn.start, turn.end) for turn in turns))]
        return [Passage(turn.text, ((turn.start, turn.end),), rebuilt=True) for turn in turns]

    def stop_strings(self) -> tuple[str, ...]:
        """What ends a reply under this template, where it is not the tokenizer's end-of-sequence token.

        A special token; without one, what the template writes after a reply; if that is blank, the beginning of the
        user's next turn too.
        """
        answer = _assistant(PROBE)
        alone = following = self.render([_QUESTION, answer]).partition(PROBE)[2]
        with suppress(ModelFileError):  # a template for a single turn
            text = self.render([_QUESTION, answer, _QUESTION])
            following = text.partition(PROBE)[2].partition(_QUESTION["content"])[0]
        token = self._special.search(following)
        ending = token.group() if token else alone.rstrip() or following.rstrip(" ")
        return (ending,) if ending.strip() and ending != self._eos else ()

    def _turn(self, history: Sequence[Message], reply: Message, tools: Tools) -> _Turn:
        before = self.render(history, reply_next=True, tools=tools)
        after = self.render([*history, reply], tools=tools)
        head, probe, tail = self.render([*history, _assistant(PROBE)], tools=tools).partition(PROBE)
        if not probe:
            raise ModelFileError("the chat template does not show the assistant's text", hint=_HINT)
        rebuilt = not (after.startswith(before) and head.startswith(before))
        if rebuilt:
            same_end = _same_question(before, head, history) or self._same_opening(before, head, history, tools)
            if not (after.startswith(head) and same_end):
                raise _not_a_continuation(before, after)
            after = before + after[len(head) :]
        written = after[len(before) :]
        shown_end = len(before) + self._written_end(written, tail, reply)
        shown = after[len(before) : shown_end]
        if reply["content"].strip() and not shown.strip():
            raise ModelFileError("the chat template does not show the assistant's text", hint=_HINT)
        if any(call["function"]["name"] not in shown for call in reply.get("tool_calls", ())):
            raise ModelFileError("the chat template does not show the assistant's calls of tools", hint=_HINT)
        if token := self._special.search(after, shown_end):
            return _Turn(after, len(before), token.end(), rebuilt)
        after += self._end_in_next_turn(after, [*history, reply], tools)
        return _Turn(after, len(before), len(after), rebuilt)

    def _same_opening(self, before: str, head: str, history: Sequence[Message], tools: Tools) -> bool:
        """Whether a reply to a tool's answer begins alike in both texts: some templates end that turn in another way
        where a reply follows (Hermes 3: without a newline)."""
        if not history or history[-1]["role"] != "tool":
            return False
        opening = before.removeprefix(self.render(history, tools=tools))
        return bool(opening.strip()) and opening != before and head.endswith(opening)

    def _written_end(self, written: str, tail: str, reply: Message) -> int:
        """Where in the text of a reply the template's own end begins; calls may end otherwise than text does.

        Args:
            written: from where the reply begins.
            tail: what follows a reply of text.
        """
        end = len(written) - self._whole_tokens(tail, _common_suffix(written, tail))
        if not reply.get("tool_calls"):
            return end
        family = required_family(self.template)
        called = written.rfind(family.closing) if family.closing else -1
        if called >= 0:
            return min(end, called + len(family.closing))
        last = list(self._special.finditer(written))[-1:]
        return min([end, *[token.start() for token in last if token.end() == len(written.rstrip())]])

    def _whole_tokens(self, tail: str, length: int) -> int:
        """The length of an end of `tail`, `length` or less, that begins inside of no special token."""
        start = len(tail) - length
        inside = (token for token in self._special.finditer(tail) if token.start() < start < token.end())
        return len(tail) - next((token.end() for token in inside), start)

    def _end_in_next_turn(self, text: str, messages: Sequence[Message], tools: Tools) -> str:
        """What the text of the next turn begins with, up to its first special token; empty where there is none."""
        try:
            longer = self.render([*messages, _next_turn(messages[-1])], tools=tools)
        except ModelFileError:
            return ""
        following = longer.removeprefix(text).partition(_QUESTION["content"])[0] if longer.startswith(text) else ""
        token = self._special.search(following)
        return following[: token.end()] if token else ""


def chosen_template(named: str | None, of_base: str | None, *, chat_needed: bool) -> str:
    """The source of the template to train with: the one that is named, the base's, or (for prompt/completion) `plain`.

    Raises:
        SettingsError: the base has none, and the data holds conversations.
    """
    from edgelora.template import BUILTIN, resolve

    if named is not None:
        return resolve(named)
    if of_base:
        return of_base
    if not chat_needed:
        return BUILTIN["plain"]
    raise SettingsError(
        "the base has no chat template, and the data holds conversations",
        hint=f"Name one with --chat-template: {', '.join(BUILTIN)}, or a Jinja file.",
    )


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _next_turn(reply: Message) -> Message:
    """The question after a reply of text, a tool's answer after a call."""
    if not (calls := reply.get("tool_calls")):
        return _QUESTION
    answer: Message = {"role": "tool", "content": _QUESTION["content"], "name": calls[0]["function"]["name"]}
    return {**answer, "tool_call_id": calls[0]["id"]} if "id" in calls[0] else answer


def _same_question(before: str, head: str, history: Sequence[Message]) -> bool:
    """Whether two texts agree from the last message on: what differs is how the template writes earlier ones."""
    last = history[-1]["content"].strip() if history else ""
    at = before.rfind(last) if last else -1
    return at >= 0 and head.endswith(before[at:])


def _common_suffix(one: str, other: str) -> int:
    return _common_prefix(one[::-1], other[::-1])


def _common_prefix(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _not_a_continuation(before: str, after: str) -> ModelFileError:
    at = _common_prefix(before, after)
    return ModelFileError(
        "the assistant's text cannot be found under this chat template: the prompt for a reply and the conversation "
        f"with the reply differ before the reply begins ({before[at : at + 30]!r} and {after[at : at + 30]!r} after "
        f"{after[max(0, at - 30) : at]!r})",
        hint=_HINT,
    )
