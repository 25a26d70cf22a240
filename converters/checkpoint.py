"""A Hugging Face model folder: its configuration and its weights, read in rows.

    model/
      config.json
      model.safetensors                     one file, or
      model.safetensors.index.json          an index and its shards
      model-00001-of-00002.safetensors ...

Rows are read with `pread`, so memory does not grow with the model (mapped pages would count as resident), and any
number of threads may read at once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from converters.errors import (
    ConversionError,
    FormatError,
    MissingFileError,
    TruncatedFileError,
    UnsupportedError,
    listed,
)
from converters.safetensors_file import StoredTensor, read_tensors

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READABLE: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a character cannot be written down again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def pickles_in(folder: Path) -> list[str]:
    """Names of weight files that could run code when opened."""
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin")


class Tensors:
    """Tensors of some safetensors files, by name. A context manager: it keeps the files open."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = dict(tensors)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        try:
            for path in sorted({tensor.file for tensor in self.tensors.values()}):
                self._descriptors[path] = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.__exit__(None, None, None)
            raise MissingFileError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows `start` to `stop` of a tensor as float32, shape (stop - start, row length); a vector is one row.

        Raises:
            UnsupportedError: a dtype that is not F32, F16 or BF16.
            TruncatedFileError: the file has become shorter since its header was read.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in READABLE:
            raise UnsupportedError(f"{tensor.file}: tensor {name} is {tensor.dtype}", hint=_DTYPE_HINT)
        dtype = READABLE[tensor.dtype]
        n_cols = tensor.shape[-1] if tensor.shape else 1
        n_rows = tensor.size_bytes // max(1, n_cols * dtype.itemsize)
        stop = n_rows if stop is None else stop
        row_bytes = n_cols * dtype.itemsize
        data = self._read(tensor, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        raw = np.frombuffer(data, dtype).reshape(stop - start, n_cols)
        if tensor.dtype == "BF16":
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype(np.float32, copy=False)

    def raw_rows(self, name: str, start: int, stop: int, row_bytes: int) -> Bytes:
        """Bytes of a tensor as rows of `row_bytes`, uint8 (stop - start, row_bytes), whatever its dtype."""
        tensor = self.tensors[name]
        data = self._read(tensor, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        return np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)

    def _read(self, tensor: StoredTensor, offset: int, count: int) -> bytes:
        descriptor, pieces = self._descriptors[tensor.file], []
        while count:
            try:
                piece = os.pread(descriptor, count, offset)  # one call gives at most 2 GiB
            except OSError as error:
                raise MissingFileError(f"{tensor.file}: cannot be read ({error.strerror})") from None
            if not piece:
                raise TruncatedFileError(f"{tensor.file}: ends inside tensor {tensor.name}", hint="Download it again.")
            pieces.append(piece)
            offset, count = offset + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


_DTYPE_HINT = "F32, F16 and BF16 can be read; download the weights that were not quantized."


class Checkpoint(Tensors):
    """A model folder. `config` is `config.json`; `tensors` says what there is, `rows` reads it.

    Raises:
        MissingFileError: no folder, no config.json, no weights, or a shard that is not there.
        FormatError: config.json, the index or a shard is broken, or the index names a tensor that its shard lacks.
        UnsupportedError: the weights are pickles.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise MissingFileError(f"{folder}: no such folder")
        self.config = read_json(folder / "config.json")
        super().__init__(_find_tensors(folder))

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names; those that get none are forgotten.

        Raises:
            FormatError: two get the same.
        """
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise FormatError(f"{self.folder}: has more than one tensor for{listed(twice)}")
        self.tensors = {names[stored]: tensor for stored, tensor in self.tensors.items() if stored in names}


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / INDEX).is_file():
        return _sharded(folder, read_json(folder / INDEX))
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    raise missing_weights(folder, WEIGHTS)


def missing_weights(folder: Path, wanted: str) -> ConversionError:
    """The error for a folder without `wanted`: it tells pickles and shards without an index apart."""
    if pickles := pickles_in(folder):
        return UnsupportedError(
            f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run code when opened",
            hint="Save them as safetensors: model.save_pretrained(folder) in a recent transformers or PEFT.",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"There is {', '.join(others[:3])}, but no {INDEX}." if others else ""
    return MissingFileError(f"{folder}: no {wanted} in this folder", hint=hint)


def _sharded(folder: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{folder / INDEX}: expected a weight_map of tensor names to file names")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise FormatError(f"{folder / INDEX}: names files outside this folder: {', '.join(outside)}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise MissingFileError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}",
            hint="Download them again.",
        )
    shards = {name: read_tensors(folder / name) for name in names}
    absent = [f"{tensor} (in {shard})" for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if absent:
        raise FormatError(f"{folder / INDEX}: names tensors that are not there:{listed(absent)}")
    extra = [f"{tensor} (in {shard})" for shard in names for tensor in shards[shard] if weight_map.get(tensor) != shard]
    if extra:
        raise FormatError(f"{folder / INDEX}: does not name these tensors of its shards:{listed(extra)}")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}
