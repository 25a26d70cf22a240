"""A header is read exactly, and one that lies is refused before anything is allocated."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters.base import convert_base
from converters.errors import FormatError, MissingFileError, TruncatedFileError
from converters.quant_types import TYPES
from converters.reader import read_header
from converters.writer import TensorSpec, Typed, header_bytes
from tests.converters.folders import make_model

SMALL = 4 << 20  # a lying count must not make the reader allocate more than this


def a_file(path: Path) -> Path:
    """Two tensors and every kind of value, by our own writer."""
    specs = [TensorSpec("a.weight", (2, 32), TYPES["F32"]), TensorSpec("b_norm.weight", (5,), TYPES["F32"])]
    values = {
        "general.architecture": "llama",
        "text": "Größe 😀",
        "flag": True,
        "number": 7,
        "negative": -7,
        "real": 0.5,
        "typed": Typed("i", 40),
        "words": ["a", "", "ccc"],
        "numbers": [1, -2, 3],
        "reals": [0.5, 1.5],
    }
    data = np.arange(64, dtype="<f4").tobytes() + np.arange(5, dtype="<f4").tobytes() + bytes(12)
    path.write_bytes(header_bytes(values, specs) + data)
    return path


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    path = a_file(tmp_path / "a.gguf")
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    for key, value in ours.metadata.items():
        assert theirs.fields[key].contents() == value
    assert set(ours.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.tensors[tensor.name].size_bytes == tensor.n_bytes


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(2**40))
    writer.add_float64("f64", 1e-300)
    writer.add_array("words", ["x", "ÿ"])
    writer.add_tensor("t.weight", np.ones((3, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    expected = {"general.architecture": "llama", "u8": 200, "i64": -(2**40), "f64": 1e-300, "words": ["x", "ÿ"]}
    assert dict(header.metadata) == expected
    assert header.tensors["t.weight"].type_name == "F16"
    assert header.kind == "base"


def test_the_table_of_types_is_the_gguf_packages() -> None:
    known = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (kind.number, kind.block, kind.size) for kind in TYPES.values()}
    assert {name: row for name, row in ours.items() if name in known} == known
    assert set(ours) - set(known) <= {"Q2_0"}  # newer in llama.cpp than in the gguf package


def test_a_vocabulary_stays_raw_until_it_is_asked_for(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(150_000)]
    path = tmp_path / "a.gguf"
    path.write_bytes(header_bytes({"general.architecture": "llama", "words": words}, []))
    tracemalloc.start()
    metadata = read_header(path).metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * path.stat().st_size  # as Python strings they take four times the file
    assert metadata["words"] == words


def test_every_truncation_is_named(tmp_path: Path) -> None:
    data = a_file(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    for length in range(4, len(data) - 12):  # the last 12 bytes are padding
        path.write_bytes(data[:length])
        with pytest.raises(TruncatedFileError):
            read_header(path)
    path.write_bytes(data[:-12])
    assert read_header(path).tensors


def test_every_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    """No byte of a header makes the reader fail in another way than a FormatError."""
    path = tmp_path / "a.gguf"
    data = bytearray(a_file(path).read_bytes())
    refused = 0
    for position in range(len(data) - 64 * 4):
        for value in (0, 0x7F, 0xFF):
            changed = data.copy()
            changed[position] = value
            path.write_bytes(changed)
            try:
                dict(read_header(path).metadata)
            except FormatError:
                refused += 1
    assert refused > 300


HUGE = struct.pack("<Q", 2**62)
LIES: dict[str, Callable[[bytes], bytes]] = {
    "2**62 tensors": lambda data: data[:8] + HUGE + data[16:],
    "2**62 entries": lambda data: data[:16] + HUGE + data[24:],
    "a key of 2**62 bytes": lambda data: data[:24] + HUGE + data[32:],
    "2**62 words": lambda data: replace_after(data, b"words", 4 + 4, HUGE),
    "2**62 numbers": lambda data: replace_after(data, b"numbers", 4 + 4, HUGE),
    "a word of 2**62 bytes": lambda data: replace_after(data, b"words", 4 + 4 + 8, HUGE),
    "2**62 rows": lambda data: replace_after(data, b"a.weight", 4 + 8, HUGE),
    "overlapping tensors": lambda data: replace_after(data, b"b_norm.weight", 4 + 8 + 4, bytes(8)),
    "an offset beyond the file": lambda data: replace_after(data, b"b_norm.weight", 4 + 8 + 4, HUGE),
    "an unknown tensor type": lambda data: replace_after(data, b"a.weight", 4 + 16, struct.pack("<I", 999)),
    "no dimensions": lambda data: replace_after(data, b"a.weight", 0, bytes(4)),
    "99 dimensions": lambda data: replace_after(data, b"a.weight", 0, struct.pack("<I", 99)),
    "an unknown value type": lambda data: replace_after(data, b"flag", 0, struct.pack("<I", 99)),
    "two tensors of one name": lambda data: data.replace(b"b_norm.weight", b"a.weight\0\0\0\0\0").replace(
        struct.pack("<Q", 13) + b"a.weight", struct.pack("<Q", 8) + b"a.weight"
    ),
    "version 1": lambda data: data[:4] + struct.pack("<I", 1) + data[8:],
    "big-endian": lambda data: data[:4] + struct.pack(">I", 3) + data[8:],
}


def replace_after(data: bytes, name: bytes, skip: int, new: bytes) -> bytes:
    start = data.index(name) + len(name) + skip
    return data[:start] + new + data[start + len(new) :]


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_without_allocating(lie: str, tmp_path: Path) -> None:
    path = a_file(tmp_path / "a.gguf")
    path.write_bytes(LIES[lie](path.read_bytes()))
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"a\.gguf"):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < SMALL


def test_what_is_not_gguf(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="No such file"):
        read_header(tmp_path / "none.gguf")
    for name, data in (("empty", b""), ("text", b"hello"), ("long", b"<html>" * 100)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match="not a GGUF file"):
            read_header(tmp_path / name)


def test_a_truncated_model(tmp_path: Path) -> None:
    out = tmp_path / "base.gguf"
    convert_base(make_model(tmp_path / "model"), out, quant="f16")
    data = out.read_bytes()
    out.write_bytes(data[: len(data) // 2])
    with pytest.raises(TruncatedFileError, match="are missing") as caught:
        read_header(out)
    assert "again" in caught.value.hint
