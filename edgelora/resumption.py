"""What an earlier run of a batch has done already, and what of it may not be mixed with this run.

A row of the output is

- done, where identity and key are wanted; error rows too, since the same row would fail the same way (`retry_errors`
  does those again);
- replaced, where it is an error that another adapter, setting or edit may mend, or that is not in the input any more;
- a stranger otherwise: a result of an edited row, of another input, base, adapter content or setting. Strangers are
  refused unless `redo` replaces them.

What is replaced stays in the file until the rows in its place are written. A row of the input that is not selected
(`--limit`, `--sample`) keeps what it has, whatever that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgelora.batch_formats import Result, result_of
from edgelora.batch_ledger import FAILED, TO_DO, Entry, Ledger, said_of
from edgelora.errors import DataFileError


def reconcile(
    rows: Iterable[Mapping[str, Any]],
    ledger: Ledger,
    output: Path | str,
    *,
    redo: bool = False,
    retry_errors: bool = False,
) -> None:
    """Compare the output's `rows` with what the ledger wants, and note in it what is done and what is to be replaced.

    Raises:
        DataFileError: results that belong to another batch, and `redo` was not given.
    """
    n_strangers, example = 0, ""
    for at, row in enumerate(rows):
        result = result_of(row)
        assert result is not None  # or the file would not have been read as an output
        entry = ledger.find(result.labels, result.key, is_error=result.is_error)
        if entry and not entry.wanted:
            continue
        if entry and result.key == entry.key and not (result.is_error and retry_errors):
            _done(ledger, entry, at, result)
            continue
        ledger.replace(at)
        if not result.is_error:
            n_strangers += 1
            example = example or _strangeness(result, entry)
    if n_strangers and not redo:
        raise DataFileError(
            f"{output}: {n_strangers} of its rows do not belong to this batch, for example {example}",
            hint="Name another output with -o, or drop and redo those rows with --redo.",
        )


def _done(ledger: Ledger, entry: Entry, at: int, result: Result) -> None:
    """Of a row that was done again, a result counts more than an error, and the first result most."""
    if entry.done == TO_DO:
        ledger.mark(entry, at, is_error=result.is_error)
    elif entry.done == FAILED and entry.at is not None:
        ledger.replace(entry.at)
        ledger.mark(entry, at, is_error=result.is_error)
    else:
        ledger.replace(at)


def _strangeness(result: Result, entry: Entry | None) -> str:
    has_id = "id" in result.labels
    name = f"id {result.labels['id']!r}" if has_id else f"the result of line {result.labels.get('line')}"
    if not entry:
        return f"{name}, which is not in the input" + ("" if has_id else " or was edited")
    if said_of(result.key) != said_of(entry.key):
        return f"{name}, whose row was edited"
    before, now = (key.rpartition(".")[2] for key in (result.key, entry.key))
    if before != now:
        return f"{name}, which was decoded {before} rows at a time and not {now} (--parallel)"
    return f"{name}, which another base, another content of adapter {result.adapter} or other settings answered"
