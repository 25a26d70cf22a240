"""Conversations as token ids and labels: the ids of the chat template's text, trained where the assistant speaks.
Plain texts are trained whole, without a template.

A label is the token's own id where it is trained, and -100 (torch's `ignore_index`, which TRL's collator also pads
with) elsewhere.

Serving tokenizes the prompt alone, and the model goes on from those ids. Where the whole text is cut otherwise (a token
that begins in the prompt and ends in the reply), prompt and reply are tokenized apart here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelora.errors import DataFileError, ModelFileError
from edgelora.messages import Conversation, Message
from edgelora.rows import listed_problems
from edgelora.tools.writing import written_message
from edgelora.train.passages import Passage, PassageFinder

IGNORED = -100
ROWS_COMPARED = 3
# Texts that few tokens join with what follows: the first that leaves a boundary is put before a reply.
CONTINUED = ("\n", "!", "0", "a")


@dataclass(frozen=True)
class TokenRow:
    """One training sequence; `labels` has the length of `input_ids`, `source` is the `FILE:LINE` it comes from."""

    input_ids: list[int]
    labels: list[int]
    source: str = ""


@dataclass(frozen=True)
class TokenRows:
    """The sequences of a file, and what became of its conversations.

    Attributes:
        cut: rows that lost tokens at `max_length`; of a plain text that is longer, each piece is a row.
        dropped: rows left out because no trained token was left, or nothing before it to foretell it from.
        split: conversations trained one reply at a time, or on another text than the template gives for the whole.
        quoting: conversations whose messages hold the text of special tokens.
        apart: `FILE:LINE` of conversations in which a token would reach from a prompt into its reply.
    """

    rows: list[TokenRow]
    cut: int
    dropped: int
    split: int
    quoting: int
    apart: tuple[str, ...] = ()

    @property
    def sources(self) -> list[str]:
        return [row.source for row in self.rows]

    def token_rows(self) -> list[TokenRow]:
        return self.rows

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
        notes = [f"{name}: {count} {text}" for count, text in said if count]
        if self.apart:
            notes.append(
                f"{name}: {len(self.apart)} conversations have a reply that continues the prompt's last word; there, "
                f"prompt and reply are tokenized apart, as serving does (the first: {self.apart[0]})"
            )
        return notes


def finder_for(tokenizer: Any, template: Any) -> PassageFinder:
    """The `PassageFinder` of a transformers tokenizer and an `edgelora.template.ChatTemplate`."""
    return PassageFinder(
        template,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
        special_tokens=[token for token in tokenizer.get_added_vocab() if token.strip()],
    )


def require_offsets(tokenizer: Any) -> None:
    """Raises ModelFileError where the tokenizer is none of the fast ones, which say where a token stands in a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelFileError(
            f"the base's tokenizer ({type(tokenizer).__name__}) gives no character offsets, which masking needs",
            hint="Save the base with a fast tokenizer (tokenizer.json).",
        )


def tokenize_conversations(
    conversations: Sequence[Conversation], tokenizer: Any, finder: PassageFinder, max_length: int
) -> TokenRows:
    """Every conversation as token rows of at most `max_length` tokens: the end of a conversation is cut off, and a
    plain text is cut into as many rows as it takes.

    Args:
        tokenizer: a fast `transformers` tokenizer.

    Raises:
        DataFileError: the template refuses conversations (each is named), or no trained token is left in any row.
        ModelFileError: the tokenizer gives no character offsets, or disagrees with its own `apply_chat_template`.
    """
    require_offsets(tokenizer)
    found = _find_passages(conversations, finder)
    for conversation, group in list(zip(conversations, found, strict=True))[:ROWS_COMPARED]:
        compare_with_transformers(conversation, group, tokenizer, finder)
    made = list(tokenize_passages([passage for group in found for passage in group], tokenizer))
    owners = [conversation for conversation, group in zip(conversations, found, strict=True) for _ in group]
    rows = [
        piece
        for owner, tokenized in zip(owners, made, strict=True)
        for row in tokenized.rows
        for piece in fitted(replace(row, source=owner.source), max_length, plain=owner.plain)
    ]
    kept = [row for row, _ in rows if n_trained(row)]
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
        quoting=sum(quotes_special_tokens(conversation, tokenizer) for conversation in conversations),
        apart=tuple(dict.fromkeys(o.source for o, tokenized in zip(owners, made, strict=True) if tokenized.apart)),
    )


def quotes_special_tokens(conversation: Conversation, tokenizer: Any) -> bool:
    """Whether messages hold special tokens as text: training sees tokens, where serving will see text."""
    return any(
        token in message["content"] for message in conversation.messages for token in tokenizer.all_special_tokens
    )


def conversation_passages(conversation: Conversation, finder: PassageFinder) -> list[Passage]:
    """The texts that a conversation is trained as.

    Raises:
        ModelFileError: the template refuses it.
    """
    if conversation.plain:
        return [finder.document(conversation.messages[0]["content"])]
    return finder.passages(conversation.messages, conversation.untrained, conversation.tools)


def _find_passages(conversations: Sequence[Conversation], finder: PassageFinder) -> list[list[Passage]]:
    found, problems = [], []
    hint = ""
    for conversation in conversations:
        try:
            found.append(conversation_passages(conversation, finder))
        except ModelFileError as error:
            problems.append(f"{conversation.source}: {error.message}")
            hint = error.hint
    if problems:
        raise DataFileError(
            listed_problems(problems, "rows"),
            hint=hint or "Change these rows, or give another --chat-template.",
        )
    return found


@dataclass(frozen=True)
class TokenizedPassage:
    """The rows of a passage: one, or where its prompts have to be tokenized apart, one for each reply."""

    rows: tuple[TokenRow, ...]
    apart: bool = False


def tokenize_passages(passages: Sequence[Passage], tokenizer: Any) -> Iterator[TokenizedPassage]:
    """Ids and labels: a token is trained if a character of it is, and follows the ids of its prompt alone."""
    encoded = tokenizer(
        [passage.text for passage in passages],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for passage, ids, offsets in zip(passages, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        heads = [_ids(passage.text[:start], tokenizer) for start, _ in passage.spans]
        if all(ids[: len(head)] == head for head in heads):
            yield TokenizedPassage((TokenRow(ids, _labels(passage, ids, offsets)),))
        else:
            replies = [_continuation(passage.text[start:end], tokenizer) for start, end in passage.spans]
            yield TokenizedPassage(tuple(map(_row_of_parts, heads, replies)), apart=True)


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _row_of_parts(head: list[int], reply: list[int]) -> TokenRow:
    return TokenRow(head + reply, [IGNORED] * len(head) + reply)


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of a text that stands after another: without the space that some tokenizers put before a text's beginning."""
    for before in CONTINUED:
        encoded = tokenizer(before + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        at = next((i for i, (start, _) in enumerate(offsets) if start >= len(before)), len(ids))
        if at and offsets[at - 1][1] <= len(before):
            return list(ids[at:])
    return _ids(text, tokenizer)


def _labels(passage: Passage, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    trained = bytearray(len(passage.text) + 1)
    for start, end in passage.spans:
        trained[start:end] = b"\1" * (end - start)
    return [
        token if trained.find(1, start, max(end, start + 1)) >= 0 else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]


def n_trained(row: TokenRow) -> int:
    """How many tokens of a row are trained: nothing foretells the first, whatever its label."""
    return sum(label != IGNORED for label in row.labels[1:])


def fitted(row: TokenRow, max_length: int, *, plain: bool) -> Iterator[tuple[TokenRow, bool]]:
    """A row as rows of at most `max_length` tokens, each with whether tokens were lost.

    A piece of a plain text begins with the last token of the piece before, which foretells its first new one.
    """
    n_tokens = len(row.input_ids)
    for begin in range(0, max(n_tokens - 1, 1), max_length - 1) if plain else (0,):
        end = begin + max_length
        labels = [IGNORED, *row.labels[begin + 1 : end]] if begin else row.labels[:end]
        yield replace(row, input_ids=row.input_ids[begin:end], labels=labels), not plain and n_tokens > max_length


def compare_with_transformers(
    conversation: Conversation, passages: Sequence[Passage], tokenizer: Any, finder: PassageFinder
) -> None:
    """Other tools that read the adapter render with transformers: there, a row must get the same ids.

    Raises:
        ModelFileError: it gets others.
    """
    if passages[0].rebuilt or conversation.plain:
        return
    ours = tokenizer(passages[0].text, add_special_tokens=False, verbose=False)["input_ids"]
    written = [written_message(finder.template, message) for message in conversation.messages]
    theirs = chat_template_ids(tokenizer, written, finder.template.source, conversation.tools)
    if ours[: len(theirs)] != theirs:  # an end of turn may have been added
        raise ModelFileError(
            f"{conversation.source}: the chat template renders otherwise in transformers "
            f"({tokenizer.decode(theirs)[:60]!r}) than here ({tokenizer.decode(ours)[:60]!r})",
            hint="It uses something only transformers gives to a template; give another with --chat-template.",
        )


def chat_template_ids(
    tokenizer: Any, messages: Sequence[Message], source: str, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The ids transformers itself gives for a conversation under a template."""
    shown = [dict(tool) for tool in tools] or None
    encoded = tokenizer.apply_chat_template(
        [dict(m) for m in messages],
        tools=shown,
        chat_template=source,
        tokenize=True,
        return_dict=True,
        tokenizer_kwargs={"verbose": False},  # it would say that the row is long
    )
    return list(encoded["input_ids"])
