"""Weights come out of safetensors files exactly, and broken ones are named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters.checkpoint import Checkpoint
from converters.errors import ConversionError, FormatError, MissingFileError, TruncatedFileError, UnsupportedError
from tests.converters.folders import CONFIG, make_model, safetensors_bytes, weights, write_json

INDEX = "model.safetensors.index.json"


def rows_of(folder: Path, name: str) -> np.ndarray:
    with Checkpoint(folder) as checkpoint:
        return checkpoint.rows(name)


def test_every_dtype_is_read_exactly(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.25, 0.0, 3e38], [1e-40, np.inf, -0.0, 7.0]], np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        arrays = {"f32": values, "f16": values.astype(np.float16), "bf16": bf16}
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(arrays))
    np.testing.assert_array_equal(rows_of(tmp_path, "f32"), values)
    np.testing.assert_array_equal(rows_of(tmp_path, "f16"), arrays["f16"].astype(np.float32))
    np.testing.assert_array_equal(rows_of(tmp_path, "bf16"), (bf16.astype(np.uint32) << 16).view(np.float32))


def test_rows_by_chunk_are_the_whole(tmp_path: Path) -> None:
    with Checkpoint(make_model(tmp_path)) as checkpoint:
        whole = checkpoint.rows("model.embed_tokens.weight")
        parts = [checkpoint.rows("model.embed_tokens.weight", start, start + 60) for start in range(0, 300, 60)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(whole, weights(CONFIG)["model.embed_tokens.weight"])


def shard(folder: Path) -> Path:
    """Cut the model of `make_model` into two shards."""
    make_model(folder)
    arrays = list(weights(CONFIG).items())
    (folder / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate((dict(arrays[:5]), dict(arrays[5:])), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        (folder / name).write_bytes(safetensors_bytes(part))
        index |= dict.fromkeys(part, name)
    write_json(folder / INDEX, {"weight_map": index})
    return folder


def test_shards_are_one_model(tmp_path: Path) -> None:
    with Checkpoint(shard(tmp_path / "a")) as cut, Checkpoint(make_model(tmp_path / "b")) as whole:
        assert set(cut.tensors) == set(whole.tensors)
        for name in whole.tensors:
            np.testing.assert_array_equal(cut.rows(name), whole.rows(name))


def change_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    write_json(folder / INDEX, index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (shard(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="1 of 2 shards are missing: model-00002"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(ghost="model-00001-of-00002.safetensors"), "ghost"),
        (lambda index: index.pop("model.norm.weight"), "does not name these tensors"),
        (lambda index: index.update(ghost="../outside.safetensors"), "outside this folder"),
        (lambda index: index.update(ghost=3), "expected a weight_map"),
    ],
)
def test_an_index_that_lies(change: Callable[[dict[str, str]], None], message: str, tmp_path: Path) -> None:
    change_index(shard(tmp_path), change)
    with pytest.raises(FormatError, match=message):
        Checkpoint(tmp_path)


def header_of(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def one(**entry: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}


BROKEN: dict[str, tuple[bytes, type[ConversionError], str]] = {
    "empty": (b"", TruncatedFileError, "0 bytes"),
    "header length beyond the file": (struct.pack("<Q", 10**6) + b"{}", TruncatedFileError, "its header alone"),
    "header of 2**62 bytes": (struct.pack("<Q", 2**62) + b"{}", FormatError, "not a safetensors file"),
    "not JSON": (struct.pack("<Q", 4) + b"oops", FormatError, "not JSON"),
    "a list": (header_of([]), FormatError, "not a JSON object"),
    "deep nesting": (struct.pack("<Q", 100_000) + b"[" * 100_000, FormatError, "not JSON"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", FormatError, "Git LFS"),
    "short data": (header_of(one()) + bytes(4), TruncatedFileError, "4 are missing"),
    "unknown dtype": (header_of(one(dtype="Q9")), FormatError, "unknown dtype"),
    "size that is not the shape's": (header_of(one(shape=[3])) + bytes(8), FormatError, "has 8 bytes"),
    "negative shape": (header_of(one(shape=[-2])) + bytes(8), FormatError, "entry for a"),
    "huge shape": (header_of(one(shape=[2**62, 2**62])) + bytes(8), FormatError, "has 8 bytes"),
    "a gap": (header_of(one(data_offsets=[8, 16])) + bytes(16), FormatError, "does not follow"),
    "overlap": (header_of(one() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}) + bytes(12),
                FormatError, "overlaps"),
    "a name twice": (struct.pack("<Q", 17) + b'{"a":{}, "a": {}}', FormatError, "occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_safetensors(what: str, tmp_path: Path) -> None:
    data, error, message = BROKEN[what]
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path)


def test_every_truncation_is_named(tmp_path: Path) -> None:
    make_model(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    for length in [*range(0, 3000, 37), len(data) - 1]:
        (tmp_path / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(TruncatedFileError):
            Checkpoint(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    with Checkpoint(make_model(tmp_path)) as checkpoint:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(TruncatedFileError, match="ends inside tensor"):
            checkpoint.rows("model.norm.weight")


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (make_model(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")
    with pytest.raises(UnsupportedError, match=r"pickles \(pytorch_model.bin\)") as caught:
        Checkpoint(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(MissingFileError, match=r"config\.json"):
        Checkpoint(tmp_path)
    write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(FormatError, match="not valid JSON"):
        Checkpoint(tmp_path)


def test_a_dtype_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"a": np.zeros((2, 2), np.uint8)}))
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(UnsupportedError, match="a: is F8_E4M3"):
        checkpoint.rows("a")


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(FormatError, match="has 4 bytes after its last tensor"):
        Checkpoint(tmp_path)
