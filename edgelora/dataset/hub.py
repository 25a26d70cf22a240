"""Datasets of the Hugging Face hub, or folders like them: the only place here that knows the `datasets` package.

It keeps what it downloads in its own cache, and rows on disk: none are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError, MissingExtraError
from edgelora.parquet import plain_cell
from edgelora.rows import Row

MAX_REASON = 300


def dataset_rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a split, numbered from 1, with the cells that are not null, as JSON has them.

    Args:
        name: `OWNER/NAME`, or a folder.

    Raises:
        DataFileError: there is none of that name, split, or format.
        MissingExtraError: `datasets` is not installed.
    """
    if find_spec("datasets") is None:
        raise MissingExtraError(
            f"{name}: reading a dataset of the hub needs the package datasets, which is not installed",
            hint="Run: pip install 'edgelora[train]', or give a file.",
        )
    dataset = _loaded(name, split)
    columns = tuple(dataset.column_names)
    for number, row in enumerate(dataset, start=1):
        yield Row(number, {key: plain_cell(value) for key, value in row.items() if value is not None}, columns=columns)


def _loaded(name: str, split: str) -> Any:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of cards without metadata
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():  # of `save_to_disk`
            saved = datasets.load_from_disk(str(folder))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, split=split)
    except KeyError:
        raise DataFileError(f"{name}: no split {split!r}", hint=f"Name one that it has: {name}:SPLIT.") from None
    except Exception as error:  # errors of the hub, the network, and of a dozen readers of formats
        told = " ".join(str(error.__cause__ or error).split())  # what it wraps says more
        reason = told[:MAX_REASON] or type(error).__name__
        kind = "a folder of data" if folder.is_dir() else "a file here, nor a dataset of the hub"
        raise DataFileError(
            f"{name} ({split}): not {kind} that can be loaded: {reason}",
            hint="Check the path; a dataset is named OWNER/NAME, or OWNER/NAME:SPLIT.",
        ) from None
