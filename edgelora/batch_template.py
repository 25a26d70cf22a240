"""Prompts made of a row's columns: `Classify: {text}` with {"text": "It broke."} is "Classify: It broke."

A name in braces is a column, spelt as the file spells it, and nothing else: no attributes, no indices, no formats, so
a stranger's template reaches nothing but the row. `{{` and `}}` are braces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgelora.errors import SettingsError

_PIECE = re.compile(r"(?P<brace>\{\{|\}\})|\{(?P<column>[^{}]+)\}|(?P<stray>[{}])")
MAX_COLUMNS_SHOWN = 20


class PromptTemplate:
    """A template that has been read.

    Attributes:
        columns: the columns that it names.

    Raises:
        SettingsError: a brace without its other half, or no column at all.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._pieces: list[tuple[str, bool]] = []  # text, or the name of a column
        end = 0
        for found in _PIECE.finditer(source):
            if found["stray"]:
                raise SettingsError(
                    f"the prompt template has a single {found['stray']} at character {found.start() + 1}: {source!r}",
                    hint="Write {column} for a column of the row, and {{ or }} for a brace.",
                )
            self._pieces.append((source[end : found.start()], False))
            self._pieces.append((found["brace"][0], False) if found["brace"] else (found["column"], True))
            end = found.end()
        self._pieces.append((source[end:], False))
        self.columns = tuple(dict.fromkeys(text for text, is_column in self._pieces if is_column))
        if not self.columns:
            raise SettingsError(
                f"the prompt template has no {{column}}: every row would get the same prompt {source!r}",
                hint="Name a column of the row in braces: 'Classify: {text}'.",
            )

    def check(self, known: Collection[str]) -> None:
        """Raises:
        SettingsError: a column that is not `known`.
        """
        if unknown := [f"{{{name}}}" for name in self.columns if name not in known]:
            names = sorted(known)
            more = f" and {len(names) - MAX_COLUMNS_SHOWN} more" if len(names) > MAX_COLUMNS_SHOWN else ""
            raise SettingsError(
                f"the prompt template names {', '.join(unknown)}; the columns are "
                f"{', '.join(names[:MAX_COLUMNS_SHOWN])}{more}",
                hint="A column is named as the file spells it; a brace is written {{ or }}.",
            )

    def render(self, data: Mapping[str, Any], columns: Sequence[str] = ()) -> str:
        """The prompt of a row. `columns` are the file's: one that the row leaves empty is the empty text.

        Raises:
            SettingsError: a column that the row does not have.
        """
        self.check(columns or data)
        return "".join(_text(data.get(text)) if is_column else text for text, is_column in self._pieces)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
