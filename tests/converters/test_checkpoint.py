"""Weights come out of safetensors files exactly, and broken ones are named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.checkpoint import Checkpoint
from converters.errors import ConversionError, FormatError, MissingFileError, TruncatedFileError, UnsupportedError
from tests.converters import quantized_folders
from tests.converters.folders import CONFIG, make_adapter, make_model, safetensors_bytes, weights, write_json

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
        (lambda index: index.update(ghost="/etc/passwd"), "outside this folder"),
        (lambda index: index.update(ghost=".."), "outside this folder"),
        (lambda index: index.update(ghost="a\0b"), "outside this folder"),
        (lambda index: index.update(ghost=3), "expected a weight_map"),
        (lambda index: index.clear(), "expected a weight_map"),
    ],
)
def test_an_index_that_lies(change: Callable[[dict[str, str]], None], message: str, tmp_path: Path) -> None:
    change_index(shard(tmp_path), change)
    with pytest.raises(FormatError, match=message):
        Checkpoint(tmp_path)


def header_of(entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def raw_header(text: bytes) -> bytes:
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
    "too many dimensions": (header_of(one(shape=[1] * 17 + [2])) + bytes(8), FormatError, "entry for a"),
    "negative offsets": (header_of(one(data_offsets=[-8, 0])) + bytes(8), FormatError, "entry for a"),
    "offsets the wrong way": (header_of(one(data_offsets=[8, 0])) + bytes(8), FormatError, "-8 bytes"),
    "a size of true": (header_of(one(shape=[True, 2])) + bytes(8), FormatError, "entry for a"),
    "a number of 5000 digits": (raw_header(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), FormatError, "not JSON"),
    "not UTF-8": (raw_header(b'{"\xff": {}}'), FormatError, "not JSON"),
    "half a character": (raw_header(b'{"\\ud800": {}}'), FormatError, "not JSON"),
    "half a byte": (header_of(one(dtype="F4", shape=[3], data_offsets=[0, 1])) + bytes(1), FormatError, "F4"),
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


def test_a_name_too_long_for_a_file(tmp_path: Path) -> None:
    change_index(shard(tmp_path), lambda index: index.update(ghost="x" * 5000))
    with pytest.raises(MissingFileError, match="too long"):
        Checkpoint(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path) / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError, match=r"model-00002-of-00002\.safetensors: has .* \(1 are missing\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_links_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/0123")
    with pytest.raises(MissingFileError, match=rf"{name}: is a link to \.\./blobs/0123, which is not there"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", INDEX])
def test_links_that_go_round(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model") if name else tmp_path / "model"
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / name)
    with pytest.raises(MissingFileError, match="Too many levels of symbolic links"):
        Checkpoint(folder)


NOBODY = """
import os, pathlib
from converters.checkpoint import Checkpoint
from converters.errors import MissingFileError
if os.getuid() == 0:
    os.setuid(65534)
try:
    with Checkpoint(pathlib.Path("model")) as checkpoint:
        print(len(checkpoint.tensors))
except MissingFileError as error:
    print(error)
"""


def seen_by_nobody(place: Path) -> str:
    """What a process says of `place`/model that may not look at everything, as root may."""
    place.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", NOBODY]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_looked_at(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    assert seen_by_nobody(tmp_path) == "21"
    (folder / name).chmod(0)
    said = seen_by_nobody(tmp_path)
    (folder / name).chmod(0o700)
    assert said == f"{Path('model') / (name or 'config.json')}: cannot be read (Permission denied)"


def test_a_folder_and_a_pipe_are_no_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        Checkpoint(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", "Mistral's own names"),
        ("model-q4_k_m.gguf", "a GGUF file"),
        ("model.onnx", "an ONNX model"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("weights.npz", "MLX"),
        ("adapter_model.safetensors", "an adapter's weights"),
    ],
)
def test_weights_of_another_kind_are_named(name: str, message: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsupportedError, match=message) as caught:
        Checkpoint(folder)
    assert name in caught.value.message
    assert caught.value.hint


def test_other_weights_beside_the_right_ones_are_nothing(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.onnx", "model.gguf"):
        (folder / name).write_bytes(b"anything")
    with Checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 21


def test_one_file_and_an_index_of_others(tmp_path: Path) -> None:
    folder = shard(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights(CONFIG)))
    with pytest.raises(FormatError, match=r"an model\.safetensors\.index\.json of other files") as caught:
        Checkpoint(folder)
    assert "Delete one" in caught.value.hint
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(weights(CONFIG), "model.safetensors")})
    with Checkpoint(folder) as checkpoint:
        assert len(checkpoint.tensors) == 21


def test_an_adapter_where_a_base_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is an adapter") as caught:
        Checkpoint(make_adapter(tmp_path, base_model_name_or_path="someone/base-1b"))
    assert "someone/base-1b" in caught.value.hint


def test_f64_is_rounded_to_the_nearest(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG)
    values = np.array([[1 / 3, 1e300, -0.0, 1e-300]])
    quantized_folders.write(tmp_path, {"a": ("F64", values)})
    np.testing.assert_array_equal(rows_of(tmp_path, "a"), np.array([[1 / 3, np.inf, -0.0, 0]], np.float32))


def test_whole_numbers_are_no_weights_and_may_be_buffers(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    tensors = quantized_folders.read(folder)
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.ones(4, np.float32)),
        "model.layers.0.attention.bias": ("BOOL", np.ones((1, 1, 8, 8), np.uint8)),
        "model.layers.0.attention.masked_bias": ("I64", np.array(-10000)),
    }
    quantized_folders.write(folder, {**tensors, **buffers})
    assert convert_base(folder, tmp_path / "out.gguf").n_tensors == 21
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype, numpy_dtype in (("I8", np.int8), ("I16", np.int16), ("U8", np.uint8), ("BOOL", np.uint8)):
        quantized_folders.write(folder, {**tensors, name: (dtype, np.ones((48, 32), numpy_dtype))})
        with pytest.raises(UnsupportedError, match=rf"{name}: is {dtype}"):
            convert_base(folder, tmp_path / "out.gguf", force=True)


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    tensors = quantized_folders.read(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    quantized_folders.write(folder, {**tensors, name: ("F32", np.zeros((0, 32), np.float32))})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.rows(name).shape == (0, 32)
    with pytest.raises(FormatError, match=rf"{name}: has shape \(0, 32\), config.json gives \(48, 32\)"):
        convert_base(folder, tmp_path / "out.gguf")
    quantized_folders.write(folder, {**tensors, name: ("F32", np.zeros((2, 0), np.float32))})
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.rows(name).shape == (2, 0)


def test_a_file_that_shrinks_during_a_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "out.gguf"
    read, done = Checkpoint.rows, []

    def rows(self: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> Any:
        done.append(name)
        if len(done) == 12:
            os.truncate(folder / "model.safetensors", 9000)
        return read(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "rows", rows)
    with pytest.raises(TruncatedFileError, match="ends inside tensor"):
        convert_base(folder, out)
    assert list(tmp_path.iterdir()) == [folder]
