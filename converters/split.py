"""A GGUF file in parts: NAME-00001-of-00003.gguf and so on, as llama.cpp names, writes and reads them.

    first part   all metadata, split.no 0 (uint16), split.count (uint16), split.tensors.count (int32), tensors
    others       split.no, split.count, split.tensors.count, tensors

Names: `llama_split_path`, src/llama.cpp. Keys and limits: `add_shard_kv_data` and `add_tensor_info`,
gguf-py/gguf/gguf_writer.py: a part ends where one more tensor would be too many, or its tensors' bytes too many, and
holds at least one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import OutputExistsError, UnsupportedError, WriteError
from converters.reader import DEFAULT_ALIGNMENT
from converters.writer import Part, TensorSpec, Typed, Value, header_bytes

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
KEYS = (NUMBER, COUNT, TENSORS)
MAX_PARTS = 2**16 - 1  # split.count is a uint16
UNITS = {"K": 1000, "M": 1000**2, "G": 1000**3}
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class PartName:
    """What the name of a part says; `number` counts from 1."""

    folder: Path
    stem: str
    number: int
    count: int

    def path(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}-of-{self.count:05d}.gguf"


def part_name(path: Path) -> PartName | None:
    """What `path`'s name says, None where it is not that of a part."""
    match = _NAME.fullmatch(path.name)
    return PartName(path.parent, match["stem"], int(match["number"]), int(match["count"])) if match else None


def parse_size(text: str) -> int:
    """Bytes from what people type: "2G", "500M", "800K" or a number (`split_str_to_n_bytes`, convert_hf_to_gguf.py).

    Units are powers of 1000, and may be small letters.

    Raises:
        UnsupportedError: it is something else, or 0.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip().upper(), re.ASCII)
    size = int(match[1]) * UNITS.get(match[2], 1) if match else 0
    if size <= 0:
        raise UnsupportedError(
            f"{text!r} is no size of a part", hint='Write a number of bytes, or like "2G" or "500M".'
        )
    return size


def plan_parts(
    out: Path,
    metadata: Mapping[str, Value],
    specs: Sequence[TensorSpec],
    *,
    max_bytes: int = 0,
    max_tensors: int = 0,
    alignment: int = DEFAULT_ALIGNMENT,
) -> tuple[Part, ...]:
    """The files to write, one where everything fits into one.

    Args:
        out: the whole file's name; that of parts is made from it.
        max_bytes: of the tensors in a part, without its header; 0 is no limit.
        max_tensors: of a part; 0 is no limit.

    Raises:
        UnsupportedError: too many parts.
    """
    groups = _groups(specs, max_bytes, max_tensors)
    if len(groups) == 1:
        return (Part(out, header_bytes(metadata, specs, alignment), tuple(specs), alignment),)
    if len(groups) > MAX_PARTS:
        raise UnsupportedError(f"{out}: would have {len(groups)} parts, the format has {MAX_PARTS}")
    own = {"general.alignment": metadata["general.alignment"]} if "general.alignment" in metadata else {}
    whole = {key: value for key, value in metadata.items() if key not in KEYS}
    parts = []
    for number, group in enumerate(groups):
        keys = {NUMBER: Typed("H", number), COUNT: Typed("H", len(groups)), TENSORS: Typed("i", len(specs))}
        header = header_bytes({**(own if number else whole), **keys}, group, alignment)
        path = PartName(out.parent, _stem(out), number + 1, len(groups)).path(number + 1)
        parts.append(Part(path, header, tuple(group), alignment))
    return tuple(parts)


def _groups(specs: Sequence[TensorSpec], max_bytes: int, max_tensors: int) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        too_many = max_tensors and len(groups[-1]) >= max_tensors
        too_large = max_bytes and size + spec.size_bytes > max_bytes
        if groups[-1] and (too_many or too_large):
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.size_bytes
    return groups


def _stem(out: Path) -> str:
    """NAME of NAME.gguf, and of a part's name."""
    named = part_name(out)
    return named.stem if named else out.name.removesuffix(".gguf")


def other_parts(parts: Sequence[Part]) -> list[Path]:
    """Parts of the same name that are there and are none of `parts`: of an earlier split into another number."""
    if len(parts) == 1 and part_name(parts[0].path) is None:
        return []
    ours, first = {part.path for part in parts}, parts[0].path
    return [path for path in _siblings(first.parent, _stem(first)) if path not in ours]


def check_other_parts(parts: Sequence[Part], *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse early where parts of an earlier split are in the way: with `force` they are removed in the end.

    Raises:
        OutputExistsError: there are some, and `force` is not given.
        WriteError: one of them is read for this file.
    """
    others = other_parts(parts)
    if others and not force:
        shown = ", ".join(path.name for path in others[:3])
        raise OutputExistsError(
            f"{parts[0].path}: {len(others)} parts of another split of the same name are there: {shown}",
            hint="Choose another name, or replace them with --force.",
        )
    read = {path.resolve() for path in inputs} if others else set()
    if same := [path for path in others if path.resolve() in read]:
        raise WriteError(
            f"{parts[0].path}: would replace {same[0].name}, which is read for it", hint="Choose another name."
        )


def _siblings(folder: Path, stem: str) -> list[Path]:
    found = [(path, part_name(path)) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [path for path, named in found if named is not None and named.stem == stem]
