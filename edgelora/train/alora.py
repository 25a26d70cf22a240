"""Activated LoRA (arXiv:2504.12397): it acts from the last occurrence of its invocation on.

What stands before is the base's alone, so that its cache serves every such adapter. Of a conversation only the last
reply follows the last invocation: each reply becomes a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from edgelora.errors import SettingsError
from edgelora.messages import user_message
from edgelora.train.data import IGNORED, TokenRow, TokenRows
from edgelora.train.passages import PassageFinder
from edgelora.train.preference_rows import PreferenceRows
from edgelora.train.rows import Rows


def invocation_tokens(text: str | None, finder: PassageFinder, tokenizer: Any) -> list[int]:
    """Ids of a text, or of what the chat template puts before every reply.

    Raises:
        SettingsError: the template puts nothing there.
    """
    question = [user_message("question")]
    before, after = finder.render(question), finder.render(question, reply_next=True)
    invocation = text or (after[len(before) :] if after.startswith(before) else "")
    if not invocation.strip():
        raise SettingsError(
            "alora acts from its invocation on, and this chat template puts nothing before a reply",
            hint='Give the text that comes before every reply with --invocation, such as "[/INST]".',
        )
    return list(tokenizer(invocation, add_special_tokens=False, verbose=False)["input_ids"])


def activated(rows: Rows, invocation: Sequence[int]) -> Rows:
    """The same, a reply at a time.

    Raises:
        SettingsError: rows in which the invocation does not occur before the reply.
    """
    if isinstance(rows, TokenRows):
        rows = replace(rows, rows=[each for row in rows.rows for each in reply_by_reply(row)])
    prompts = rows.rows if isinstance(rows, PreferenceRows) else rows.token_rows()
    without = list(dict.fromkeys(row.source for row in prompts if not _holds(_prompt(row), invocation)))
    if without:
        raise SettingsError(
            f"the invocation does not occur before the reply in {len(without)} rows, the first of them {without[0]}",
            hint="Give another with --invocation, or leave it out: then it is what the chat template puts there.",
        )
    return rows


def reply_by_reply(row: TokenRow) -> Iterator[TokenRow]:
    """A row for each reply: what stands before it, and it alone trained."""
    is_trained = [label != IGNORED for label in row.labels]
    starts = [i for i, trained in enumerate(is_trained) if trained and (i == 0 or not is_trained[i - 1])]
    for start in starts:
        end = next((i for i in range(start, len(is_trained)) if not is_trained[i]), len(is_trained))
        yield replace(row, input_ids=row.input_ids[:end], labels=[IGNORED] * start + row.labels[start:end])


def _prompt(row: Any) -> list[int]:
    if isinstance(row, TokenRow):
        return row.input_ids[: next(i for i, label in enumerate(row.labels) if label != IGNORED)]
    return list(row.prompt_ids)


def _holds(ids: Sequence[int], wanted: Sequence[int]) -> bool:
    length = len(wanted)
    return any(list(ids[at : at + length]) == list(wanted) for at in range(len(ids) - length + 1))
