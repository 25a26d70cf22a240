"""Every error edgelora raises on purpose, and the exit code each one ends the command line with.

    EdgeloraError               1   the work was done and failed a check, or could not go on
    |- SettingsError            2   options that contradict each other or are out of range
    |- ModelFileError           3   a base, adapter or PEFT folder: missing, broken, or of the wrong kind
    |  |- BaseNotFoundError     3   no GGUF on this machine fits the adapter
    |  `- BaseMismatchError     3   the adapter was made for another base
    |- DataFileError            4   a dataset or batch file: missing, malformed, or not writable
    |- ContextOverflowError     4   a conversation that does not fit the context window
    |- MissingExtraError        5   a feature whose packages are not installed
    `- EngineBusyError          1   a request that came while as many waited as may wait

`converters` knows nothing of edgelora and has a tree of its own (`converters.errors`), which the command line
reports with exit code 3. An interrupt (Ctrl-C) ends with 130. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class EdgeloraError(Exception):
    """Base of the tree.

    Args:
        message: what is wrong, with both sides where two things disagree.
        hint: the next step, as a sentence a stranger can act on; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SettingsError(EdgeloraError):
    exit_code = 2


class ModelFileError(EdgeloraError):
    exit_code = 3


class BaseNotFoundError(ModelFileError):
    pass


class BaseMismatchError(ModelFileError):
    pass


class DataFileError(EdgeloraError):
    exit_code = 4


class ContextOverflowError(EdgeloraError):
    exit_code = 4


class MissingExtraError(EdgeloraError):
    exit_code = 5


class EngineBusyError(EdgeloraError):
    pass
