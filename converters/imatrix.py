"""Importance matrices: how strongly each column of a weight is used, so that quantization errs where it matters least.

For a weight of `n_cols` columns the file holds the sum of squared activations of each column and the number of rows
summed; the mean is what a quantizer weighs its errors with. A weight of experts has a sum and a count for each expert.

    blk.0.ffn_down.weight.in_sum2       float32 (n_cols,)           sums
    blk.0.ffn_down.weight.counts        float32 (1,)                rows
    blk.0.ffn_down_exps.weight.in_sum2  float32 (n_expert, n_cols)
    blk.0.ffn_down_exps.weight.counts   float32 (n_expert, 1)

Formats: llama.cpp's `IMatrixCollector::save_imatrix` (GGUF) and `save_imatrix_legacy`, tools/imatrix/imatrix.cpp; its
reader is common/imatrix-loader.cpp; the means are those of `load_imatrix`, tools/quantize/quantize.cpp.
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.block_types import TYPES
from converters.errors import FormatError, MissingFileError, TruncatedFileError, UnsupportedError, listed
from converters.reader import ARRAY, MAGIC, MAX_TENSOR_NAME, STRING, GGUFHeader, TensorInfo, read_header
from converters.tensor_kinds import EMBEDDINGS
from converters.writer import TensorSpec, Typed, Value, check_output, create, file_size, header_bytes

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_OVERRIDE_BYTES = 127  # llama_model_kv_override::val_str, include/llama.h, less its NUL
_MAX_COUNT = 2**53  # counts are float32 in the file; beyond this int64 and float64 part ways
_AGAIN = "Download it again, or make one with `edgelora convert --calibrate`."


@dataclass(frozen=True)
class Importance:
    """One weight's statistics.

    Attributes:
        sums: float32, shape (n,): n_cols values for each expert, expert after expert.
        counts: int64, shape (n_expert,), or (1,) for a weight without experts. 0: that expert was never used.
    """

    sums: Floats
    counts: Counts

    def means(self, start: int = 0, stop: int | None = None) -> Floats:
        """float32, shape (stop - start,): sums over counts, in float32; 1 for an expert that was never used."""
        places = np.arange(start, self.sums.size if stop is None else stop)
        counts = self.counts[places // (self.sums.size // self.counts.size)].astype(np.float32)
        used = counts > 0
        return np.where(used, self.sums[places] / np.where(used, counts, np.float32(1)), np.float32(1))


@dataclass(frozen=True)
class Means:
    """What llama-quantize weighs a tensor's columns with: float32 (n_cols,) of each expert, by its number.

    They are computed when they are asked for: of a mixture of 128 experts they take hundreds of megabytes.
    """

    entry: Importance
    n_cols: int

    def __len__(self) -> int:
        return self.entry.sums.size // self.n_cols

    def __getitem__(self, expert: int) -> Floats:
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        return self.entry.means(expert * self.n_cols, (expert + 1) * self.n_cols)


@dataclass(frozen=True)
class ImportanceMatrix:
    """The statistics of a model's weights, by GGUF tensor name, and what they were measured on.

    Attributes:
        datasets: names of the calibration texts.
        chunk_count: windows of text that were read.
        chunk_size: tokens in a window; 0 where the file does not say (legacy format).
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    def means_for(self, name: str, n_cols: int, n_expert: int = 1) -> Means | None:
        """What llama-quantize weighs a tensor's columns with.

        Returns:
            Those of `n_expert` experts, 1 for a matrix without; None where there is nothing for this tensor. Those of
            embeddings (which are looked up and not multiplied) count as nothing where their size is another.

        Raises:
            FormatError: the matrix has another number of values, so it was made for another model.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.sums.size == n_cols * n_expert:
            return Means(entry, n_cols)
        if name in EMBEDDINGS:  # src/llama-quant.cpp, llama_model_quantize_impl
            return None
        experts = f" for each of {n_expert} experts" if n_expert > 1 else ""
        raise FormatError(
            f"the importance matrix has {entry.sums.size} values for {name}, the tensor has {n_cols} columns{experts} "
            f"({n_cols * n_expert})",
            hint="It was made for another model: make one with `edgelora convert --calibrate`.",
        )


def quantize_metadata(imatrix: ImportanceMatrix, file: str) -> dict[str, Value]:
    """The keys that llama-quantize adds to its output, in its order and with its types (tools/quantize/quantize.cpp).

    Args:
        file: the matrix's file as it was given. It and the dataset's name are cut at 127 bytes, as llama-quantize does.
    """
    found: dict[str, Value] = {"quantize.imatrix.file": _override(file)}
    if imatrix.datasets:
        found["quantize.imatrix.dataset"] = _override(imatrix.datasets[0])
    found["quantize.imatrix.entries_count"] = Typed("I", len(imatrix.entries))
    if imatrix.chunk_count > 0:
        found["quantize.imatrix.chunks_count"] = Typed("I", imatrix.chunk_count)
    return found


def _override(text: str) -> bytes:
    return os.fsencode(text).split(b"\0")[0][:MAX_OVERRIDE_BYTES]


def read_imatrix(path: Path | str) -> ImportanceMatrix:
    """Read a matrix in either format; nothing in it is believed before it is checked.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not an importance matrix, or one that contradicts itself, or holds numbers that no sum of squares
            can be; all such tensors are named.
        TruncatedFileError: it ends early.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == MAGIC
        imatrix = _read_gguf(path) if is_gguf else _Legacy(path).read()
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    problems = [f"{name}: {problem}" for name, entry in imatrix.entries.items() for problem in _problems(entry)]
    if problems:
        raise FormatError(f"{path}: not a usable importance matrix:{listed(problems)}", hint=_AGAIN)
    return imatrix


def _problems(entry: Importance) -> Iterator[str]:
    if not np.isfinite(entry.sums).all():
        yield "sums that are not finite numbers"
    elif (entry.sums < 0).any():
        yield f"a sum of squares of {entry.sums.min()}"
    if (entry.counts < 0).any():
        yield "counts that are no numbers of rows (negative, too large, or NaN)"
    if entry.sums.size % entry.counts.size:
        yield f"{entry.sums.size} sums cannot be shared by {entry.counts.size} counts"


# GGUF


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    metadata = header.metadata
    pairs = _pairs(header.tensors)
    if not pairs:
        what = metadata.get("general.type") or metadata.get("general.architecture") or "unknown"
        raise FormatError(
            f"{path}: not an importance matrix (a GGUF file of type {str(what)[:40]!r} without *{SUMS} tensors)",
            hint="Give the file that llama-imatrix wrote.",
        )
    if problems := [*_pair_problems(pairs), *_metadata_problems(header)]:
        raise FormatError(f"{path}: not a usable importance matrix:{listed(problems)}", hint=_AGAIN)
    with open(path, "rb") as file:
        entries = {name: _entry(file, sums, counts) for name, (sums, counts) in sorted(pairs.items())}
    return ImportanceMatrix(entries, tuple(metadata[DATASETS]), metadata[CHUNK_COUNT], metadata[CHUNK_SIZE])


def _pairs(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[Any, Any]]:
    """Weight's name to its sums and counts, None for the one that is missing; other tensors are left out."""
    names = [name.removesuffix(end) for name in tensors for end in (SUMS, COUNTS) if name.endswith(end)]
    return {name: (tensors.get(name + SUMS), tensors.get(name + COUNTS)) for name in dict.fromkeys(names)}


def _pair_problems(pairs: Mapping[str, tuple[TensorInfo | None, TensorInfo | None]]) -> Iterator[str]:
    for name, pair in pairs.items():
        for suffix, tensor in zip((SUMS, COUNTS), pair, strict=True):
            if tensor is None:
                yield f"{name}{suffix} is missing"
            elif tensor.type_name != "F32":
                yield f"{tensor.name} is {tensor.type_name}, expected F32"


def _metadata_problems(header: GGUFHeader) -> Iterator[str]:
    metadata = header.metadata
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in metadata:
            yield f"{key} is missing"
        elif key == DATASETS:
            raw = metadata.raw(key)
            if (raw.kind, raw.item_kind) != (ARRAY, STRING):
                yield f"{key} is not a list of strings"
        elif type(metadata[key]) is not int or not 0 <= metadata[key] < 2**31:
            yield f"{key} is {str(metadata[key])[:40]}, expected a whole number below 2**31"


def _entry(file: Any, sums: TensorInfo, counts: TensorInfo) -> Importance:
    raw = _floats(file, counts).astype(np.float64)
    # Away from zero at a half, as C's lround; what is no count becomes -1, and is refused by name.
    whole = np.floor(np.where(np.isfinite(raw) & (raw >= 0) & (raw < _MAX_COUNT), raw, -1.0) + 0.5)
    return Importance(_floats(file, sums), whole.astype(np.int64))


def _floats(file: Any, tensor: TensorInfo) -> Floats:
    file.seek(tensor.offset)
    return np.frombuffer(file.read(tensor.size_bytes), "<f4").astype(np.float32, copy=False)


# The legacy format: int32 and float32 one after the other, no magic number.


class _Legacy:
    """Reads `n_entries`, then for each its name, calls, and values; then the number of chunks and the dataset.

    A value is a mean times the entry's calls, so calls serve as counts. 0 calls: the values are the means.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.position = path, path.read_bytes(), 0

    def read(self) -> ImportanceMatrix:
        n_entries = self.number("the number of entries")
        if not 1 <= n_entries <= len(self.data) // 16:  # name length, a letter, calls, number of values, a value
            raise self.not_one(f"{n_entries} entries in {len(self.data)} bytes")
        entries: dict[str, Importance] = {}
        for index in range(n_entries):
            name, entry = self.entry(f"entry {index + 1} of {n_entries}")
            if name in entries:
                raise self.not_one(f"{name} occurs twice")
            entries[name] = entry
        # Older files end here.
        chunk_count = self.number("the number of chunks") if self.position < len(self.data) else 0
        dataset = self.text("the dataset's name") if self.position < len(self.data) else ""
        if self.position < len(self.data):
            raise self.not_one(f"{len(self.data) - self.position} bytes follow its end")
        if chunk_count < 0:
            raise self.not_one(f"{chunk_count} chunks")
        return ImportanceMatrix(dict(sorted(entries.items())), (dataset,) if dataset else (), chunk_count, 0)

    def entry(self, what: str) -> tuple[str, Importance]:
        name = self.text(f"the name of {what}")
        calls, count = self.number(f"the calls of {what}"), self.number(f"the number of values of {what}")
        if not name or count < 1:
            raise self.not_one(f"{what} is called {name[:80]!r} and has {count} values")
        values = np.frombuffer(self.take(4 * count, f"the values of {what}"), "<f4").astype(np.float32)
        return name, Importance(values, np.array([calls or 1], np.int64))

    def text(self, what: str) -> str:
        length = self.number(f"the length of {what}")
        if length < 0:
            raise self.not_one(f"the length of {what} is {length}")
        data = self.take(length, what).split(b"\0")[0]
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.not_one(f"{what} is not UTF-8 text") from None

    def number(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little", signed=True)

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.position:
            raise TruncatedFileError(
                f"{self.path}: not an importance matrix, or it ends early ({what} needs {count} bytes at byte "
                f"{self.position}, the file has {len(self.data)})",
                hint=_AGAIN,
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def not_one(self, why: str) -> FormatError:
        return FormatError(
            f"{self.path}: not an importance matrix ({why})", hint="Give the file that llama-imatrix wrote."
        )


# Writing


def write_imatrix(path: Path | str, imatrix: ImportanceMatrix, *, force: bool = False) -> None:
    """Write a matrix in the GGUF format, as llama-imatrix writes it: whole under its name, or not at all.

    Raises:
        UnsupportedError: a name that is too long for GGUF, or no dataset (llama-quantize demands its key).
        OutputExistsError, WriteError, DiskFullError: see `writer`.
    """
    path = Path(path)
    arrays = dict(_arrays(imatrix))
    if problems := [*_unwritable(imatrix, arrays)]:
        raise UnsupportedError(f"{path}: this importance matrix cannot be written:{listed(problems)}")
    specs = [TensorSpec(name, array.shape, TYPES["F32"]) for name, array in arrays.items()]
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        DATASETS: list(imatrix.datasets),
        CHUNK_COUNT: Typed("I", imatrix.chunk_count),
        CHUNK_SIZE: Typed("I", imatrix.chunk_size),
    }
    header = header_bytes(metadata, specs)
    check_output(path, file_size(header, specs), force=force)
    with create(path, header) as file:
        for spec, array in zip(specs, arrays.values(), strict=True):
            file.write(array.astype("<f4", copy=False).tobytes())
            file.end_tensor(spec)


def _unwritable(imatrix: ImportanceMatrix, arrays: Mapping[str, Floats]) -> Iterator[str]:
    if not imatrix.datasets:
        yield "it names no dataset"
    yield from (
        f"{name}: longer than {MAX_TENSOR_NAME} bytes" for name in arrays if len(name.encode()) > MAX_TENSOR_NAME
    )


def _arrays(imatrix: ImportanceMatrix) -> Iterator[tuple[str, Floats]]:
    for name, entry in sorted(imatrix.entries.items()):
        n_mat = len(entry.counts)  # ggml writes no dimension of 1 at the end
        yield name + SUMS, entry.sums.reshape(n_mat, -1) if n_mat > 1 else entry.sums
        yield name + COUNTS, entry.counts.astype(np.float32).reshape((n_mat, 1) if n_mat > 1 else (1,))
