"""What training data is given as: `PATH[@WEIGHT]`, or a dataset of the Hugging Face hub, `OWNER/NAME[:SPLIT][@WEIGHT]`.

    support.jsonl            every row once
    general.jsonl@0.25       a quarter of its rows, chosen by the seed, none twice
    rare.jsonl@2.5           every row twice, and half of them a third time
    squad/tiny:validation    a split of a dataset of the hub; "train" where none is named
    my-dataset/              a folder that the `datasets` package reads as it reads a dataset of the hub

What weighs 0.25 has a quarter of its own rows in an epoch, however many rows the others have. The order within a file
stays; training shuffles all rows anyway.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgelora.errors import DataFileError, SettingsError
from edgelora.rows import SUFFIXES, Row, read_rows

DEFAULT_SPLIT = "train"
_WEIGHT = re.compile(r"(\d+(\.\d*)?|\.\d+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WITH_SPLIT = re.compile(r"(.+?):([\w.-]+(?:\[[\d:%]*\])?)")
Item = TypeVar("Item")


@dataclass(frozen=True)
class DataSource:
    """A file or a dataset, and how often its rows are seen.

    Attributes:
        name: the path, or the hub's id, as it was given.
        split: of a dataset.
        weight: times that a row is seen in an epoch, on average; above 0.
    """

    name: str
    weight: float = 1.0
    split: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise SettingsError(f"{self.name}: weight is {self.weight!r}, expected a number above 0")

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """See the module's examples. A file whose own name holds `@` or `:` is taken as it is where it exists.

        Raises:
            SettingsError: no path, or a weight that is no number above 0.
        """
        name, weight = (text, 1.0) if _exists(text) else _split_weight(text)
        parts = None if _exists(name) else _WITH_SPLIT.fullmatch(name)
        folder = Path(parts[1]).expanduser() if parts else None
        if parts and folder and (folder.is_dir() or (_HUB_ID.fullmatch(parts[1]) and not folder.is_file())):
            return cls(parts[1], weight, parts[2])
        if not name:
            raise SettingsError(f"data {text!r}: no path", hint="Write PATH[@WEIGHT], for example general.jsonl@0.5.")
        return cls(name, weight)

    @property
    def is_dataset(self) -> bool:
        """Whether the `datasets` package reads it: a folder, or what is named like a dataset of the hub and is no file
        here, nor would be one (`data/train.jsonl`, or anything in a folder that is here)."""
        path = Path(self.name).expanduser()
        if path.exists():
            return path.is_dir()
        named_as_file = path.suffix.lower() in SUFFIXES or path.parent.is_dir()
        return bool(_HUB_ID.fullmatch(self.name)) and not named_as_file

    def rows(self) -> Iterator[Row]:
        """Its rows, as `edgelora.rows.read_rows` gives them.

        Raises:
            DataFileError, MissingExtraError: it cannot be read.
        """
        if not self.is_dataset:
            return read_rows(self.name if self.name == "-" else Path(self.name).expanduser())
        from edgelora.dataset.hub import dataset_rows

        return dataset_rows(self.name, self.split or DEFAULT_SPLIT)

    @property
    def short_name(self) -> str:
        """Of a file its name, without its folder."""
        return self.name if self.is_dataset else Path(self.name).name

    def place(self, row: Row) -> str:
        """`FILE:LINE`, as messages name a row."""
        return f"{self.name}:{row.line}" if not self.split else f"{self.name}:{self.split}:{row.line}"

    def sha256(self) -> str:
        """Of the file's bytes, or of a dataset's rows, in hex."""
        digest = hashlib.sha256()
        if self.is_dataset:
            for row in self.rows():
                digest.update(json.dumps(row.data, sort_keys=True).encode() + b"\n")
            return digest.hexdigest()
        try:
            with open(Path(self.name).expanduser(), "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
        except OSError as error:
            raise DataFileError(f"{self.name}: {error.strerror}") from None
        return digest.hexdigest()


def data_sha256(sources: Sequence[DataSource]) -> str:
    """Of the file where there is one of weight 1; else of the digests and weights of all, in their order."""
    if len(sources) == 1 and sources[0].weight == 1:
        return sources[0].sha256()
    return hashlib.sha256(json.dumps([[s.sha256(), s.weight] for s in sources]).encode()).hexdigest()


def n_weighted(count: int, weight: float) -> int:
    """How many rows of `count` an epoch has."""
    copies = math.floor(weight)
    return copies * count + round((weight - copies) * count)


def nothing_left(name: str, count: int, weight: float) -> str:
    """What is wrong with a weight that leaves no row of `count`; empty where some are left, or there were none."""
    if not count or n_weighted(count, weight):
        return ""
    return f"{name}: a weight of {weight:g} leaves none of its {count:,} rows; @{1 / count:.3g} leaves one"


def weighted(items: Sequence[Item], weight: float, seed: str) -> list[Item]:
    """`items` as often as `weight` says: all of them `floor(weight)` times, and of the rest of the weight a share of
    them, rounded, drawn without replacement by `seed`, in their own order."""
    copies = math.floor(weight)
    share = n_weighted(len(items), weight) - copies * len(items)
    drawn = sorted(random.Random(seed).sample(range(len(items)), share))
    return [*items] * copies + [items[index] for index in drawn]


def _split_weight(text: str) -> tuple[str, float]:
    head, at, tail = text.rpartition("@")
    if not at or not head or "/" in tail:
        return text, 1.0
    if not _WEIGHT.fullmatch(tail):
        raise SettingsError(
            f"data {text!r}: {tail!r} is not a weight", hint="Write a number above 0 after '@': general.jsonl@0.5."
        )
    return head, float(tail)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, an unknown user's home
        return False
