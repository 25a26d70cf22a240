"""Rows of a Parquet file, a row group's piece at a time; the only place that knows pyarrow (extra `parquet`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from edgelora.errors import DataFileError, MissingExtraError

ROWS_AT_ONCE = 256


def parquet_rows(file: IO[bytes]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The names of all columns, and a row's cells that are not null, as JSON has them: dates become text.

    Raises:
        DataFileError: not Parquet, or broken.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"{file.name}: reading Parquet needs pyarrow, which is not installed",
            hint="Run: pip install 'edgelora[parquet]', or write the rows as JSONL or CSV.",
        ) from None
    try:
        source = pyarrow.parquet.ParquetFile(file)
        columns = tuple(source.schema_arrow.names)
        for piece in source.iter_batches(batch_size=ROWS_AT_ONCE):
            for row in piece.to_pylist():
                yield columns, {name: plain_cell(value) for name, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataFileError(f"{file.name}: not Parquet that can be read ({error})") from None


def plain_cell(value: Any) -> Any:
    """A cell as JSON has it."""
    return value if isinstance(value, str | int | float) else json.loads(json.dumps(value, default=str))
