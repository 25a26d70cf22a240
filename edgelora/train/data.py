"""Conversations as token ids and labels: the ids of the chat template's text, trained where the assistant speaks.

A label is the token's own id where it is trained, and -100 (torch's `ignore_index`, which TRL's collator also pads
with) elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.errors import DataFileError, ModelFileError
from edgelora.messages import MAX_PROBLEMS_SHOWN, Conversation, Message
from edgelora.train.passages import Passage, PassageFinder

IGNORED = -100
ROWS_COMPARED = 3


@dataclass(frozen=True)
class TokenRow:
    """One training sequence; `labels` has the length of `input_ids`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenRows:
    """The sequences of a file, and what became of its conversations.

    Attributes:
        cut: rows that lost tokens at `max_length`.
        dropped: rows left out because no trained token was left.
        split: conversations trained one reply at a time, or on another text than the template gives for the whole.
        quoting: conversations whose messages hold the text of special tokens.
    """

    rows: list[TokenRow]
    cut: int
    dropped: int
    split: int
    quoting: int

    def columns(self) -> dict[str, list[list[int]]]:
        return {"input_ids": [r.input_ids for r in self.rows], "labels": [r.labels for r in self.rows]}

    def notes(self, name: str, max_length: int) -> list[str]:
        """What a person should know about the rows of `name`."""
        said = (
            (self.cut, f"rows are longer than {max_length} tokens and are cut there; --max-length keeps more"),
            (self.dropped, f"rows are left out: cut at {max_length} tokens, they hold no reply"),
            (
                self.split,
                "conversations are trained reply by reply, as serving sees them: the template rewrites earlier turns",
            ),
            (self.quoting, "conversations hold special tokens as text; training sees tokens, serving will see text"),
        )
        return [f"{name}: {count} {text}" for count, text in said if count]


def finder_for(tokenizer: Any, template: Any) -> PassageFinder:
    """The `PassageFinder` of a transformers tokenizer and an `edgelora.template.ChatTemplate`."""
    return PassageFinder(
        template,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        special_tokens=[token for token in tokenizer.get_added_vocab() if token.strip()],
    )


def tokenize_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, finder: PassageFinder, max_length: int
) -> TokenRows:
    """Every conversation as token rows of at most `max_length` tokens (the end is cut off).

    Args:
        tokenizer: a fast `transformers` tokenizer.

    Raises:
        DataFileError: the template refuses conversations (each is named), or no trained token is left in any row.
        ModelFileError: the tokenizer gives no character offsets, or disagrees with its own `apply_chat_template`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelFileError(
            f"the base's tokenizer ({type(tokenizer).__name__}) gives no character offsets, which masking needs",
            hint="Save the base with a fast tokenizer (tokenizer.json).",
        )
    found = _find_passages(conversations, finder)
    _compare_with_transformers(conversations, found, tokenizer, finder)
    passages = [passage for group in found for passage in group]
    rows = [_cut(row, max_length) for row in tokenize_passages(passages, tokenizer)]
    kept = [row for row, _ in rows if any(label != IGNORED for label in row.labels)]
    if not kept:
        raise DataFileError(
            f"{conversations[0].source.rpartition(':')[0]}: cut at {max_length} tokens, no row holds a reply",
            hint="Raise --max-length.",
        )
    return TokenRows(
        kept,
        cut=sum(cut for _, cut in rows),
        dropped=len(rows) - len(kept),
        split=sum(group[0].rebuilt for group in found),
        quoting=sum(_quotes(conversation, tokenizer) for conversation in conversations),
    )


def _quotes(conversation: Conversation, tokenizer: Any) -> bool:
    return any(
        token in message["content"] for message in conversation.messages for token in tokenizer.all_special_tokens
    )


def _find_passages(conversations: Sequence[Conversation], finder: PassageFinder) -> list[list[Passage]]:
    found, problems = [], []
    hint = ""
    for conversation in conversations:
        try:
            found.append(finder.passages(conversation.messages))
        except ModelFileError as error:
            problems.append(f"{conversation.source}: {error.message}")
            hint = error.hint
    if problems:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        more = [f"... and {rest} more rows"] if rest > 0 else []
        raise DataFileError(
            "\n".join(problems[:MAX_PROBLEMS_SHOWN] + more),
            hint=hint or "Change these rows, or give another --chat-template.",
        )
    return found


def tokenize_passages(passages: Sequence[Passage], tokenizer: Any) -> Iterable[TokenRow]:
    """Ids and labels: a token is trained if a character of it is."""
    encoded = tokenizer(
        [passage.text for passage in passages],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for passage, ids, offsets in zip(passages, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield TokenRow(ids, _labels(passage, ids, offsets))


def _labels(passage: Passage, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    trained = bytearray(len(passage.text) + 1)
    for start, end in passage.spans:
        trained[start:end] = b"\1" * (end - start)
    return [
        token if trained.find(1, start, max(end, start + 1)) >= 0 else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]


def _cut(row: TokenRow, max_length: int) -> tuple[TokenRow, bool]:
    if len(row.input_ids) <= max_length:
        return row, False
    return TokenRow(row.input_ids[:max_length], row.labels[:max_length]), True


def _compare_with_transformers(
    conversations: Sequence[Conversation], found: Sequence[Sequence[Passage]], tokenizer: Any, finder: PassageFinder
) -> None:
    """Other tools that read the adapter render with transformers: the first rows must get the same ids there."""
    for conversation, group in list(zip(conversations, found, strict=True))[:ROWS_COMPARED]:
        if group[0].rebuilt:
            continue
        ours = tokenizer(group[0].text, add_special_tokens=False, verbose=False)["input_ids"]
        theirs = chat_template_ids(tokenizer, conversation.messages, finder.template.source)
        if ours[: len(theirs)] != theirs:  # an end of turn may have been added
            raise ModelFileError(
                f"{conversation.source}: the chat template renders otherwise in transformers "
                f"({tokenizer.decode(theirs)[:60]!r}) than here ({tokenizer.decode(ours)[:60]!r})",
                hint="It uses something only transformers gives to a template; give another with --chat-template.",
            )


def chat_template_ids(tokenizer: Any, messages: Sequence[Message], source: str) -> list[int]:
    """The ids transformers itself gives for a conversation under a template."""
    encoded = tokenizer.apply_chat_template(
        [dict(m) for m in messages], chat_template=source, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])
