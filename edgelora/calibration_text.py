"""Texts to measure a model on: plain text, or conversations that its chat template turns into text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelora.dataset import read_conversations
from edgelora.errors import DataFileError
from edgelora.messages import Conversation
from edgelora.rows import SUFFIXES

CONVERSATION_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")


@dataclass(frozen=True)
class CalibrationText:
    """A text, or conversations; one of the two is empty.

    Attributes:
        name: what it is called in an importance matrix: the file's path as it was given.
    """

    name: str
    text: str = ""
    conversations: tuple[Conversation, ...] = ()


def read_calibration(path: Path | str) -> CalibrationText:
    """Conversations of a `.jsonl`, `.json`, `.csv` or `.parquet` file (the rows that training takes), or any other file
    as plain text.

    Plain text is read as llama.cpp's tools do with `-f`: whole, without one newline at its end (common/arg.cpp).

    Raises:
        DataFileError: missing, not UTF-8 text, empty, or with rows that are no conversations.
    """
    if Path(path).suffix.lower() in CONVERSATION_SUFFIXES:
        return CalibrationText(str(path), conversations=tuple(read_conversations(path)))
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataFileError(
            f"{path}: {error.strerror}", hint="Give a text file, or a .jsonl of conversations."
        ) from None
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: not UTF-8 text (byte {error.start})") from None
    text = text.removesuffix("\n")
    if not text:
        raise DataFileError(f"{path}: empty", hint="Give a text file, or a .jsonl of conversations.")
    return CalibrationText(str(path), text)
