"""The rows of an evaluation: what is asked, and the reply that would be right.

A row is what training takes (`edgelora.dataset`): the last assistant message is the reference, what stands before it is
the prompt. With templates (`--prompt 'Classify: {text}' --reference '{category}'`) the columns of any table do.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.batch_template import PromptTemplate
from edgelora.dataset import conversation_of
from edgelora.errors import DataFileError, SettingsError
from edgelora.messages import Conversation, Message, user_message
from edgelora.rows import Row, listed_problems, read_rows

_HINT = (
    "A row has `messages` that end with the assistant's, or `prompt` and `completion`; other columns are named by "
    "templates: --prompt 'Classify: {text}' --reference '{category}'."
)


@dataclass(frozen=True)
class EvalRow:
    """One row.

    Attributes:
        line: 1-based, in the file.
        messages: the prompt; the last one is the user's, or a tool's.
        reference: the reply that would be right.
        tools: what the model may call, as a request's `tools`.
        data: the row's own fields, for `--function`.
    """

    line: int
    messages: tuple[Message, ...]
    reference: str
    tools: tuple[Mapping[str, Any], ...]
    data: Mapping[str, Any]

    @property
    def question(self) -> str:
        """The last message: what a reader of the report is shown."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class RowSettings:
    """Which rows are read, and how.

    Attributes:
        prompt, reference: templates over the row's columns; both or none.
        system: leads conversations that have no system message; with "" not even the adapter's own does.
        limit: the first so many.
        sample: so many of those, drawn by `seed`.
    """

    prompt: str | None = None
    reference: str | None = None
    system: str | None = None
    limit: int | None = None
    sample: int | None = None
    seed: int = 0


def read_eval_rows(path: Path | str, settings: RowSettings) -> list[EvalRow]:
    """The rows of a file that `edgelora.rows` reads.

    Raises:
        SettingsError: a template that cannot be used.
        DataFileError: the file cannot be read, holds no row, or bad rows (up to eight are named by line).
    """
    reader = _Reader(settings)
    found: list[EvalRow] = []
    problems: list[str] = []
    for row in read_rows(path):
        if settings.limit is not None and len(found) + len(problems) >= settings.limit:
            break
        made = reader.read(row, f"{path}:{row.line}")
        if isinstance(made, str):
            problems.append(f"{path}:{row.line}: {made}")
        else:
            found.append(made)
    if problems:
        raise DataFileError(listed_problems(problems), hint=_HINT)
    if not found:
        raise DataFileError(f"{path}: no rows", hint=_HINT)
    if settings.sample is not None and settings.sample < len(found):
        drawn = random.Random(settings.seed).sample(range(len(found)), settings.sample)
        found = [found[place] for place in sorted(drawn)]
    return found


class _Reader:
    """Rows to `EvalRow`s.

    Raises:
        SettingsError: one template without the other, or one that cannot be read.
    """

    def __init__(self, settings: RowSettings) -> None:
        if (settings.prompt is None) != (settings.reference is None):
            given, missing = ("--prompt", "--reference") if settings.reference is None else ("--reference", "--prompt")
            raise SettingsError(
                f"{given} is given without {missing}", hint="Name the columns of both: --prompt and --reference."
            )
        self._system = settings.system
        self._templates: tuple[PromptTemplate, PromptTemplate] | None = None
        if settings.prompt is not None and settings.reference is not None:
            self._templates = PromptTemplate(settings.prompt), PromptTemplate(settings.reference)

    def read(self, row: Row, source: str) -> EvalRow | str:
        """The row, or what is wrong with it."""
        conversation = self._filled(row, source) if self._templates else conversation_of(row, source)
        if isinstance(conversation, str):
            return conversation
        *prompt, reply = conversation.messages
        if conversation.plain or not prompt:
            return "a text without a prompt; its perplexity is measured with --perplexity FILE"
        if reply.get("tool_calls"):
            return "its reply calls tools, and replies are compared as text"
        if self._system is not None and prompt[0]["role"] != "system":
            prompt.insert(0, {"role": "system", "content": self._system})
        return EvalRow(row.line, tuple(prompt), reply["content"], conversation.tools, row.data)

    def _filled(self, row: Row, source: str) -> Conversation | str:
        if row.problem:
            return row.problem
        assert self._templates
        try:
            prompt, reference = (template.render(row.data, row.columns) for template in self._templates)
        except SettingsError as error:
            return error.message
        if not reference.strip():
            return "its reference is empty"
        return Conversation((user_message(prompt), {"role": "assistant", "content": reference}), source)
