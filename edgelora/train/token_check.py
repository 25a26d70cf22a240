"""Rows in tokens, for `edgelora data check`: counted as a run would make them, and one shown as the model sees it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from edgelora.dataset.check import ShownRow, TemplateShare
from edgelora.dataset.lengths import spread
from edgelora.dataset.scan import Measured
from edgelora.errors import ModelFileError
from edgelora.messages import Conversation
from edgelora.template import BUILTIN, ChatTemplate, resolve
from edgelora.train.base import find_base
from edgelora.train.data import (
    IGNORED,
    ROWS_COMPARED,
    TokenRow,
    compare_with_transformers,
    conversation_passages,
    finder_for,
    fitted,
    n_trained,
    quotes_special_tokens,
    require_offsets,
    tokenize_passages,
)
from edgelora.train.extra import require_extra
from edgelora.train.passages import Passage

ROWS_TAKEN_APART = 256
"""Of so many rows, what the template adds is counted: that takes each message's tokens alone."""


class TokenCheck:
    """A base's tokenizer and template, a `edgelora.dataset.scan.Measure`.

    Args:
        base: a Hugging Face folder, or whatever `edgelora train` takes.
        chat_template: a name or a file, instead of the base's own.
        max_length: where a run would cut.

    Raises:
        MissingExtraError: the packages of the extra `train` are not installed.
        ModelFileError, SettingsError: a base or template that cannot be used.
    """

    def __init__(self, base: str, chat_template: str | None, max_length: int) -> None:
        require_extra("counting tokens")
        self._tokenizer = find_base(base).load_tokenizer()
        require_offsets(self._tokenizer)
        source = resolve(chat_template) if chat_template else self._tokenizer.chat_template
        self._has_template = bool(source)
        self._finder = finder_for(self._tokenizer, ChatTemplate(source or BUILTIN["plain"]))
        self._max_length = max_length
        self._n_compared = 0
        self._added = array("I")
        self._special: dict[str, None] = {}  # a set in order

    def __call__(self, conversations: Sequence[Conversation]) -> list[Measured | str]:
        found = [self._passages(conversation) for conversation in conversations]
        passages = [passage for group in found if not isinstance(group, str) for passage in group]
        made = tokenize_passages(passages, self._tokenizer) if passages else iter(())
        return [
            group
            if isinstance(group, str)
            else self._measured(conversation, group, [row for _ in group for row in next(made).rows])
            for conversation, group in zip(conversations, found, strict=True)
        ]

    def shown(self, conversation: Conversation) -> ShownRow:
        """The first sequence that a conversation becomes.

        Raises:
            ModelFileError: the template refuses it.
        """
        passage = conversation_passages(conversation, self._finder)[0]
        row = next(tokenize_passages([passage], self._tokenizer)).rows[0]
        kept, is_cut = next(fitted(row, self._max_length, plain=conversation.plain))
        return ShownRow(conversation.source, _segments(kept, self._tokenizer), is_cut)

    def template_share(self) -> TemplateShare | None:
        """What the template added to the rows that were looked at; None where no template is used."""
        return TemplateShare(spread(self._added), tuple(self._special)) if self._added else None

    def _passages(self, conversation: Conversation) -> list[Passage] | str:
        if conversation.templated and not self._has_template:
            return (
                f"the base has no chat template; name one with --chat-template: {', '.join(BUILTIN)}, or a Jinja file"
            )
        try:
            passages = conversation_passages(conversation, self._finder)
            if self._n_compared < ROWS_COMPARED:
                compare_with_transformers(conversation, passages, self._tokenizer, self._finder)
                self._n_compared += 1
        except ModelFileError as error:
            return error.message.removeprefix(f"{conversation.source}: ")
        return passages

    def _measured(
        self, conversation: Conversation, passages: Sequence[Passage], rows: Sequence[TokenRow]
    ) -> Measured | str:
        pieces = [list(fitted(row, self._max_length, plain=conversation.plain)) for row in rows]
        trained = [n_trained(piece) for group in pieces for piece, _ in group]
        if not conversation.plain and len(rows) == 1 and len(self._added) < ROWS_TAKEN_APART:
            self._take_apart(conversation, rows[0])
        unknown = self._tokenizer.unk_token_id
        told = {
            f"that are cut at {self._max_length} tokens": any(is_cut for group in pieces for _, is_cut in group),
            f"of which a sequence is left out: cut at {self._max_length} tokens, it holds no reply": not all(trained),
            "trained reply by reply, as serving sees them: the template rewrites earlier turns": passages[0].rebuilt,
            "tokenized reply by reply, as in serving: a reply continues the prompt's last word": len(rows)
            > len(passages),
            f"with text that the tokenizer has no token for ({self._tokenizer.unk_token})": unknown is not None
            and any(unknown in row.input_ids for row in rows),
            "with special tokens as text: training sees tokens, serving will see text": quotes_special_tokens(
                conversation, self._tokenizer
            ),
        }
        lengths = [len(piece.input_ids) for group in pieces for piece, _ in group]
        whole = lengths if conversation.plain else [len(row.input_ids) for row in rows]
        return Measured(tuple(whole), sum(trained), tuple(text for text, is_so in told.items() if is_so))

    def _take_apart(self, conversation: Conversation, row: TokenRow) -> None:
        """Count the tokens of a row that its messages do not have, and see which special ones are among them."""
        contents = [message["content"] for message in conversation.messages if message["content"]]
        alone = self._tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"] if contents else []
        own = {token for ids in alone for token in ids}
        self._added.append(max(0, len(row.input_ids) - sum(map(len, alone))))
        added = self._tokenizer.added_tokens_decoder
        for token in row.input_ids:
            if token in added and token not in own:
                self._special.setdefault(str(added[token]))


def _segments(row: TokenRow, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The text of a row in pieces that are trained, and such that are not."""
    trained = [label != IGNORED for label in row.labels]
    ends = [i for i in range(1, len(trained) + 1) if i == len(trained) or trained[i] != trained[i - 1]]
    segments, before = [], ""
    for end in ends:
        text = str(tokenizer.decode(row.input_ids[:end], clean_up_tokenization_spaces=False))
        segments.append((text.removeprefix(before), trained[end - 1]))
        before = text
    return tuple(segments)
