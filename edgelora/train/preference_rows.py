"""Preference pairs as token ids: one prompt, two replies, cut where serving cuts them.

{"prompt_ids": [1, 32, 17], "chosen_ids": [88, 2], "rejected_ids": [45, 61, 2]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.errors import DataFileError, ModelFileError
from edgelora.messages import Message
from edgelora.preferences import Preference
from edgelora.rows import listed_problems
from edgelora.train.data import IGNORED, TokenRow, tokenize_passages
from edgelora.train.passages import Passage, PassageFinder


@dataclass(frozen=True)
class PreferenceRow:
    """One pair; both replies go on from `prompt_ids`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: str


@dataclass(frozen=True)
class PreferenceRows:
    """The pairs of a file, and what became of them; `cut` lost tokens at `max_length`, `dropped` all that differs."""

    rows: list[PreferenceRow]
    cut: int
    dropped: int

    @property
    def sources(self) -> list[str]:
        return [row.source for row in self.rows]

    def columns(self) -> dict[str, list[list[int]]]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {name: [getattr(row, name) for row in self.rows] for name in names}

    def token_rows(self) -> list[TokenRow]:
        """The chosen ones."""
        return [
            TokenRow(row.prompt_ids + row.chosen_ids, [IGNORED] * len(row.prompt_ids) + row.chosen_ids, row.source)
            for row in self.rows
        ]

    def notes(self, name: str, max_length: int) -> list[str]:
        """What a person should know about the rows of `name`."""
        said = (
            (self.cut, f"pairs are longer than {max_length} tokens and are cut there; --max-length keeps more"),
            (self.dropped, f"pairs are left out: cut at {max_length} tokens, their replies are the same"),
        )
        return [f"{name}: {count} {text}" for count, text in said if count]


def tokenize_preferences(
    pairs: Sequence[Preference], tokenizer: Any, finder: PassageFinder, max_length: int
) -> PreferenceRows:
    """Every pair as token ids of at most `max_length` each (the end is cut off).

    Args:
        tokenizer: a fast `transformers` tokenizer.

    Raises:
        DataFileError: pairs that the template refuses or cannot show (each is named), or no pair is left.
    """
    found, problems = [], []
    hint = ""
    for pair in pairs:
        try:
            found.append(_row(pair, tokenizer, finder))
        except ModelFileError as error:
            problems.append(f"{pair.source}: {error.message}")
            hint = error.hint
    if problems:
        raise DataFileError(
            listed_problems(problems, "rows"), hint=hint or "Change these rows, or give another --chat-template."
        )
    cut = [_cut(row, max_length) for row in found]
    kept = [row for row in cut if row.chosen_ids and row.rejected_ids and row.chosen_ids != row.rejected_ids]
    if not kept:
        raise DataFileError(
            f"{pairs[0].source.rpartition(':')[0]}: cut at {max_length} tokens, no pair has two different replies",
            hint="Raise --max-length.",
        )
    return PreferenceRows(
        kept, cut=sum(before != after for before, after in zip(found, cut, strict=True)), dropped=len(cut) - len(kept)
    )


def _row(pair: Preference, tokenizer: Any, finder: PassageFinder) -> PreferenceRow:
    prompt, chosen = _reply(pair.prompt, pair.chosen, tokenizer, finder)
    other, rejected = _reply(pair.prompt, pair.rejected, tokenizer, finder)
    if prompt != other:
        raise ModelFileError("the chat template writes another prompt before the rejected reply than before the chosen")
    return PreferenceRow(prompt, chosen, rejected, pair.source)


def _reply(
    prompt: Sequence[Message], reply: Sequence[Message], tokenizer: Any, finder: PassageFinder
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of the reply to it with what ends it.

    Raises:
        ModelFileError: several messages, or what `PassageFinder.passages` raises.
    """
    if len(reply) != 1:
        raise ModelFileError(f"a reply of {len(reply)} messages: preferences are between single replies")
    earlier = [i for i, message in enumerate(prompt) if message["role"] == "assistant"]
    passage = finder.passages([*prompt, *reply], earlier)[-1]
    ((start, end),) = passage.spans
    ((row,),) = [each.rows for each in tokenize_passages([Passage(passage.text[:end], ((start, end),))], tokenizer)]
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[:first], row.input_ids[first:]


def _cut(row: PreferenceRow, max_length: int) -> PreferenceRow:
    room = max(max_length - len(row.prompt_ids), 0)
    return PreferenceRow(row.prompt_ids, row.chosen_ids[:room], row.rejected_ids[:room], row.source)
