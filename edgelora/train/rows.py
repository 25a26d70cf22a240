"""What every objective makes of its data, and how it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgelora.dataset import read_conversations
from edgelora.preferences import read_preferences
from edgelora.train.data import TokenRow, tokenize_conversations
from edgelora.train.passages import PassageFinder
from edgelora.train.preference_rows import tokenize_preferences
from edgelora.train.probes import Prompt, before_the_reply


class Rows(Protocol):
    """Training sequences, as token ids."""

    @property
    def rows(self) -> Sequence[Any]:
        """One for each sequence, or pair of them."""

    @property
    def sources(self) -> list[str]:
        """`FILE:LINE` of each."""

    def columns(self) -> dict[str, list[list[int]]]:
        """As TRL's collator of the objective reads them."""

    def token_rows(self) -> Sequence[TokenRow]:
        """As plain sequences with labels, for initialisations that look at the data."""

    def notes(self, name: str, max_length: int) -> list[str]:
        """What a person should know about the rows of `name`."""


@dataclass(frozen=True)
class Data:
    """How the data of an objective is read.

    Attributes:
        read: the examples of a file or of several; a seed chooses among those that are seen in part.
        tokenize: examples, tokenizer, finder and `max_length` to rows.
        prompt: an example up to where its last reply begins.
        is_templated: whether it means nothing without a chat template.
    """

    read: Callable[[Any, int], Sequence[Any]]
    tokenize: Callable[[Sequence[Any], Any, PassageFinder, int], Rows]
    prompt: Callable[[Any], Prompt]
    is_templated: Callable[[Any], bool]


DATA: Mapping[str, Data] = {
    "sft": Data(
        read_conversations, tokenize_conversations, before_the_reply, lambda conversation: conversation.templated
    ),
    "dpo": Data(read_preferences, tokenize_preferences, lambda pair: pair.prompt, lambda pair: True),
}
