"""Which characters of a rendered conversation the assistant has to produce, for any chat template.

A template is a program that turns messages into text; few say which part is the assistant's. It is found by asking for
the text at three points of each assistant turn:

    before    the messages so far, ending where the reply begins   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    after     the same with the reply                              ...assistant\\nHello!<|im_end|>\\n
    probe     the same with another reply                          ...assistant\\n(probe)<|im_end|>\\n

`before` must begin `after`, as at serving time the model goes on from `before`; what `after` and `probe` share at their
ends is the template's, and is trained up to its first special token (`<|im_end|>` here), so that the model learns to stop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message, user_message
from edgelora.template import ChatTemplate

PROBE = "reply-probe-5f3a"
_HINT = "Give another template with --chat-template, for example chatml."


@dataclass(frozen=True)
class Passage:
    """A text and the character ranges of it that are trained, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Turn:
    """An assistant turn: the text up to its end, and the range of it that is trained."""

    text: str
    start: int
    end: int


class PassageFinder:
    """Finds the assistant's text under one template.

    Args:
        template: the chat template, as it will be used in serving.
        bos_token, eos_token: the tokenizer's, empty where it has none.
        special_tokens: texts of the tokenizer's added tokens; the first in the text after a reply ends the turn.
    """

    def __init__(
        self, template: ChatTemplate, *, bos_token: str, eos_token: str, special_tokens: Iterable[str]
    ) -> None:
        self.template = template
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        longest_first = sorted({*special_tokens, eos_token} - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, messages: Sequence[Message], *, reply_next: bool = False) -> str:
        return self.template.render(messages, add_generation_prompt=reply_next, **self._tokens)

    def passages(self, messages: Sequence[Message]) -> list[Passage]:
        """The conversation as one passage; as one passage a reply where the template rewrites earlier turns.

        Templates of reasoning models drop the reasoning of earlier replies, so that no single text holds every reply
        as it was produced. One text per reply is what serving sees.

        Raises:
            ModelFileError: the template refuses the conversation, or its replies cannot be told from the rest.
        """
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [self._turn(messages[:i], messages[i]) for i in replies]
        whole = turns[-1].text if replies[-1] == len(messages) - 1 else self.render(messages)
        if all(whole.startswith(turn.text) for turn in turns):
            return [Passage(whole, tuple((turn.start, turn.end) for turn in turns))]
        return [Passage(turn.text, ((turn.start, turn.end),)) for turn in turns]

    def stop_strings(self) -> tuple[str, ...]:
        """What ends a reply under this template, where it is not the tokenizer's end-of-sequence token."""
        question, answer = user_message("question-probe-5f3a"), _assistant(PROBE)
        try:
            text = self.render([question, answer, question])
        except ModelFileError:
            text = self.render([question, answer])
        following = text.partition(PROBE)[2].partition(question["content"])[0]
        token = self._special.search(following)
        ending = token.group() if token else following.rstrip(" ")
        return (ending,) if ending.strip() and ending != self._tokens["eos_token"] else ()

    def _turn(self, history: Sequence[Message], reply: Message) -> _Turn:
        before = self.render(history, reply_next=True)
        after, probe = self.render([*history, reply]), self.render([*history, _assistant(PROBE)])
        for text, content in ((after, reply["content"].strip()), (probe, PROBE)):
            if not text.startswith(before) or (content and len(text) == len(before)):
                raise _not_a_continuation(before, text)
        if PROBE not in probe[len(before) :]:
            raise ModelFileError("the chat template does not show the assistant's text", hint=_HINT)
        template_end = _common_suffix(after[len(before) :], probe.rpartition(PROBE)[2])
        token = self._special.search(after, len(after) - template_end)
        return _Turn(after, len(before), token.end() if token else len(after))


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


def _common_suffix(one: str, other: str) -> int:
    return len(commonprefix([one[::-1], other[::-1]]))


def _not_a_continuation(before: str, after: str) -> ModelFileError:
    at = len(commonprefix([before, after]))
    return ModelFileError(
        "the assistant's text cannot be found under this chat template: the prompt for a reply and the conversation with "
        f"the reply differ before the reply begins ({before[at : at + 30]!r} and {after[at : at + 30]!r} after "
        f"{after[max(0, at - 30) : at]!r})",
        hint=_HINT,
    )
