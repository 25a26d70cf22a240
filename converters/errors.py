"""Every error the converters raise on purpose.

    ConversionError
    |- MissingFileError              a path that is not there or cannot be read
    |- DownloadError                 the hub cannot be reached, or does not give what was asked for
    |- FormatError                   a file that is not what it should be
    |  `- TruncatedFileError         it ends before its own header says
    |- UnsupportedError              understood, and refused by name: a tensor, a config key, a dtype, a tokenizer
    |  |- UnsupportedArchitectureError
    |  `- UnsupportedAdapterError
    |- BaseMismatchError             an adapter whose tensors do not fit the base
    |- OutputExistsError             refused to overwrite
    `- WriteError                    the disk is full, or the place cannot be written
       `- DiskFullError

The command line reports each with its message, its hint on a line of its own, and one exit code.
"""

from __future__ import annotations

from collections.abc import Sequence


class ConversionError(Exception):
    """Base of the tree.

    Args:
        message: what is wrong, with both sides where two things disagree.
        hint: the next step, as a sentence a stranger can act on.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class MissingFileError(ConversionError):
    pass


class DownloadError(ConversionError):
    pass


class FormatError(ConversionError):
    pass


class TruncatedFileError(FormatError):
    pass


class UnsupportedError(ConversionError):
    pass


class UnsupportedArchitectureError(UnsupportedError):
    pass


class UnsupportedAdapterError(UnsupportedError):
    pass


class BaseMismatchError(ConversionError):
    pass


class OutputExistsError(ConversionError):
    pass


class WriteError(ConversionError):
    pass


class DiskFullError(WriteError):
    pass


MAX_LISTED = 8


def listed(problems: Sequence[str]) -> str:
    """All problems in one message, one a line; a long list ends with a count."""
    shown = [f"\n  - {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        shown.append(f"\n  - and {len(problems) - MAX_LISTED} more")
    return "".join(shown)
