"""The input of a batch: a file that is read twice, and the columns of a CSV as what they stand for."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgelora.errors import DataFileError, SettingsError


@contextmanager
def rereadable(input: Path | str) -> Iterator[Path]:
    """The input as a file that can be read twice: first for what there is to do. Pipes are spooled.

    Raises:
        DataFileError: missing, a folder, or not readable.
    """
    path = Path(input)
    if str(input) != "-" and (path.is_dir() or not path.exists()):
        reason = "a folder" if path.is_dir() else "no such file"
        raise DataFileError(
            f"{input}: {reason}", hint="Give a JSONL, CSV or Parquet file with one row for each request."
        )
    if str(input) != "-" and path.is_file():
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as spool:
        with _piped(path) as pipe:
            shutil.copyfileobj(pipe, spool)
        spool.flush()
        yield Path(spool.name)


@contextmanager
def _piped(path: Path) -> Iterator[IO[bytes]]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        pipe = open(path, "rb")  # noqa: SIM115 - a separate try keeps errors of the body out of this one
    except OSError as error:
        raise DataFileError(f"{path}: {error.strerror}") from None
    with pipe:
        yield pipe


_FRACTIONS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty", "scale")
_CSV_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "scale"), float),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("top_k", "repeat_last_n", "logprobs", "seed", "max_tokens"), int),
    **dict.fromkeys(("messages", "metadata", "schema", "logit_bias"), json.loads),
}


def typed(data: Mapping[str, str]) -> dict[str, Any]:
    """A CSV row with its numbers and JSON columns read.

    Raises:
        SettingsError: naming the column that cannot be.
    """
    values: dict[str, Any] = {}
    for name, text in data.items():
        try:
            values[name] = _CSV_TYPES.get(name, str)(text)
        except (ValueError, RecursionError):
            raise SettingsError(f"column {name} holds {text!r}, which cannot be read as {name}") from None
    return values
