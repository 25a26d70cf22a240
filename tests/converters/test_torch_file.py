"""Files of torch.save read without torch: equal to torch.load, or refused by name, and never executed."""

from __future__ import annotations

import os
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.checkpoint import Tensors
from converters.errors import ConversionError, FormatError, MissingFileError, TruncatedFileError, UnsupportedError
from converters.safetensors_file import StoredTensor
from converters.torch_file import StridedTensor, read_torch_file
from converters.torch_pickle import MAX_INSTRUCTIONS

pytestmark = pytest.mark.train

FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
OTHERS = {
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def saved(folder: Path, content: object, **how: object) -> Path:
    path = folder / "adapter_model.bin"
    torch.save(content, path, **how)
    return path


def check_equal(path: Path) -> Tensors:
    """Every tensor as torch.load has it: its shape, and its rows in whole and in part."""
    expected = torch.load(path, weights_only=False)  # our own file; it reads protocol 2 only otherwise
    with read_torch_file(path) as found:
        assert list(found.tensors) == list(expected)
        for name, tensor in expected.items():
            record, shape = found.tensors[name], tuple(tensor.shape)
            assert (record.name, record.shape, record.file) == (name, shape, path)
            assert record.dtype == {**FLOATS, **OTHERS}[tensor.dtype]
            if tensor.dtype in FLOATS:
                rows = tensor.detach().float().reshape(-1, shape[-1] if shape else 1).numpy()
                np.testing.assert_array_equal(found.rows(name).reshape(rows.shape), rows)
                np.testing.assert_array_equal(found.rows(name, 1, 2), rows[1:2]) if len(rows) > 1 else None
    return found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_are_those_of_torch_load(tmp_path, protocol):
    content = {str(dtype): values(5, 6).to(dtype) for dtype in FLOATS}
    content |= {str(dtype): (values(5, 6) * 4).abs().to(dtype) for dtype in OTHERS}
    content |= {"scalar": torch.tensor(3.5), "vector": values(7), "empty": torch.empty(0, 4), "deep": values(2, 3, 4)}
    check_equal(saved(tmp_path, content, pickle_protocol=protocol))


def test_views_and_shared_storages_are_those_of_torch_load(tmp_path):
    whole = values(6, 8)
    content = {
        "whole": whole, "transposed": whole.t(), "rows": whole[2:5], "columns": whole[:, 3:5],
        "every second": whole[::2],
        "one column": whole[:, 1], "permuted": values(2, 3, 4).permute(2, 0, 1), "repeated": whole[:1].expand(4, 8),
        "half transposed": whole.bfloat16().t(), "one row of many": whole.t()[:, :1], "element": whole[3, 4],
    }  # fmt: skip
    found = check_equal(saved(tmp_path, content))
    views = {name for name, tensor in found.tensors.items() if isinstance(tensor, StridedTensor)}
    assert views == set(content) - {"whole", "rows", "element", "one row of many"}


@pytest.mark.parametrize("checksums", [True, False])
def test_state_dicts_of_modules_and_parameters(tmp_path, checksums):
    parameter = torch.nn.Parameter(values(3, 4))
    parameter.attribute = "of a model"  # type: ignore[attr-defined]
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        for content in (module.state_dict(), OrderedDict(a=parameter, b=torch.nn.Parameter(values(2))), {}):
            check_equal(saved(tmp_path, content))
    finally:
        torch.serialization.set_crc32_options(before)


def test_whole_numbers_are_read_as_bytes_and_refused_as_floats(tmp_path):
    content = {"plain": torch.arange(12).reshape(3, 4), "turned": torch.arange(12).reshape(3, 4).t()}
    with read_torch_file(saved(tmp_path, content)) as found:
        for name, tensor in content.items():
            raw = found.raw_rows(name, 1, 3, tensor.shape[1] * 8).view(np.int64)
            np.testing.assert_array_equal(raw, tensor[1:3].numpy())
            with pytest.raises(UnsupportedError, match=f"{name}: is I64"):
                found.rows(name)


def test_a_changed_number_is_noticed(tmp_path):
    path = saved(tmp_path, {"a": values(3, 4), "b": values(4, 3).t()})
    with read_torch_file(path) as found:
        place, view = found.tensors["a"], found.tensors["b"]
        assert isinstance(place, StoredTensor)
        assert not np.array_equal(found.rows("b"), values(4, 3).numpy())
        assert view.shape == (3, 4)
        data = bytearray(path.read_bytes())
        data[place.offset] ^= 255
        path.write_bytes(data)
        assert not np.array_equal(found.rows("a"), values(3, 4).numpy())


OLD = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: saved(folder, {"a": values(3)}, **OLD), "before 1.6"),
        (lambda folder: saved(folder, {"a": values(3).to_sparse()}), "sparse tensors"),
        (lambda folder: saved(folder, {"a": torch.quantize_per_tensor(values(3), 0.1, 0, torch.qint8)}), "quantized"),
        (lambda folder: saved(folder, {"a": torch.empty(3, device="meta")}), "without values"),
        (lambda folder: saved(folder, {"a": values(3).to(torch.complex128)}), "128 bits"),
        (lambda folder: saved(folder, {"a": values(3).to(torch.complex64).conj()}), "conjugate"),
        (lambda folder: saved(folder, {"a": torch._neg_view(values(3))}), "negative"),
        (lambda folder: saved(folder, {"a": torch.zeros(1).expand(5000, 5000)}), "repeats 1 numbers"),
        (lambda folder: saved(folder, {"step": 3, "state_dict": {"a": values(3)}}), "step: is a int"),
        (lambda folder: saved(folder, {3: values(3)}), "other things than tensors"),
        (lambda folder: saved(folder, values(3)), "no dictionary"),
        (lambda folder: saved(folder, [values(3)]), "holds a list"),
        (lambda folder: saved(folder, torch.nn.Linear(2, 2)), "would import torch.nn.modules.linear.Linear"),
        (lambda folder: saved(folder, {"a": np.float64(1)}), "would import numpy"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_contents_are_refused_by_name(tmp_path, make, words):
    with pytest.raises(UnsupportedError, match=words) as caught:
        read_torch_file(make(tmp_path))
    assert "safe_serialization=True" in caught.value.hint


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "adapter_model.bin"
    cases = {
        b"": (TruncatedFileError, "is empty"),
        b"version https://git-lfs": (FormatError, "Git LFS"),
        pickle.dumps({"a": 1}): (UnsupportedError, "bare pickle"),
        bytes(257) + b"ustar" + bytes(300): (UnsupportedError, "tar file"),
        b"GGUF1234": (FormatError, "not a file of torch.save"),
    }
    for content, (kind, words) in cases.items():
        path.write_bytes(content)
        with pytest.raises(kind, match=words):
            read_torch_file(path)
    with pytest.raises(MissingFileError):
        read_torch_file(tmp_path / "nothing.bin")
    with pytest.raises(MissingFileError):
        read_torch_file(tmp_path)


# Files made by hand.

EMPTY = b"\x80\x02}."
STORAGE = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def zipped(folder: Path, code: bytes, *, storage: bytes = bytes(48), compression: int = 0, **more: bytes) -> Path:
    """A zip file as torch writes them, with a pickle of our own."""
    path = folder / "adapter_model.bin"
    members = {"data.pkl": code, "byteorder": b"little", "data/0": storage, "version": b"3\n"} | more
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"adapter_model/{name}", content)
    return path


def tensor(
    count: int = 12, offset: int = 0, shape: bytes = b"K\x03K\x04\x86", strides: bytes = b"K\x04K\x01\x86"
) -> bytes:
    """Code that leaves a float32 tensor on the stack."""
    storage = b"(" + STORAGE + b"J" + struct.pack("<i", count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset) + shape + strides
        + b"\x89}tR"
    )  # fmt: skip


def state_dict(value: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00a" + value + b"s."


def test_a_file_made_by_hand_is_read(tmp_path):
    """The twin of all those below."""
    numbers = np.arange(12, dtype=np.float32)
    with read_torch_file(zipped(tmp_path, state_dict(tensor()), storage=numbers.tobytes())) as found:
        np.testing.assert_array_equal(found.rows("a"), numbers.reshape(3, 4))


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


SHELL = "touch executed"
HOSTILE = {
    "a call of os.system": b"cos\nsystem\n" + text(SHELL) + b"\x85R",
    "posix.system": b"cposix\nsystem\n" + text(SHELL) + b"\x85R",
    "an instance": b"(" + text(SHELL) + b"ios\nsystem\n",
    "an object": b"(ccollections\nOrderedDict\no",
    "a name from the stack": text("os") + text("system") + b"\x93" + text(SHELL) + b"\x85R",
    "a name with dots": text("torch") + text("serialization.os.system") + b"\x93" + text(SHELL) + b"\x85R",
    "a name with spaces": b"ctorch serialization os\nsystem\n" + text(SHELL) + b"\x85R",
    "getattr": b"cbuiltins\ngetattr\ncos\n__dict__\n" + text("system") + b"\x86R" + text(SHELL) + b"\x85R",
    "eval": b"cbuiltins\neval\n" + text("__import__('os').system('touch executed')") + b"\x85R",
    "a function of torch": b"ctorch.hub\nload\n" + text("stranger/code") + b"\x85R",
    "a new object": b"ccollections\nOrderedDict\n)\x81",
    "a new object with keywords": b"ccollections\nOrderedDict\n)}\x92",
    "an extension": b"\x82\x01",
    "an extension of two bytes": b"\x83\x01\x00",
    "an extension of four bytes": b"\x84\x01\x00\x00\x00",
    "state of a dictionary": b"}}" + text("__class__") + text("os") + b"sb",
    "state of a function": b"ccollections\nOrderedDict\n}" + text("__call__") + text("os") + b"sb",
    "a call of a storage": b"ctorch\nFloatStorage\nK\x03\x85R",
    "a dictionary of something": b"ccollections\nOrderedDict\n" + text("ab") + b"\x85R",
    "a text persistent id": b"Pstorage\n",
    "an outside reference": text("module") + b"N\x86Q",
    "a call of a value": text("os") + text(SHELL) + b"\x85R",
    "a parameter of nothing": b"ctorch._utils\n_rebuild_parameter\nN\x89}\x87R",
    "a parameter of too much": b"ctorch._utils\n_rebuild_parameter\n(NNNNNNtR",
    "a tensor of a name": b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nK\x00))\x89}tR",
    "a key that is a list": b"}]K\x01s",
    "a key that is a tuple": b"})K\x01s",
    "half a character": b"X\x03\x00\x00\x00\xed\xa0\x80",
    "an entry twice": b"}(" + text("k") + b"N" + text("k") + b"Nu",
    "an unknown memo": b"h\x07",
    "an empty stack": b"\x87",
    "marks without an end": b"((((",
    "odd items": b"}(K\x01u",
    "a storage larger than its member": tensor(count=13),
    "a storage smaller than its member": tensor(count=11),
    "a storage of a negative size": tensor(count=-1),
    "a tensor past its storage": tensor(offset=1),
    "a tensor before its storage": tensor(offset=-1),
    "a tensor of another size": tensor(shape=b"K\x04K\x04\x86"),
    "a tensor of a huge size": tensor(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x04\x86", strides=b"K\x00K\x01\x86"),
    "a size beyond all": tensor(shape=b"\x8a\xff" + b"\x7f" * 255 + b"K\x04\x86"),
    "negative strides": tensor(strides=b"J\xff\xff\xff\xffK\x01\x86"),
    "too few strides": tensor(strides=b"K\x01\x85"),
    "a shape that is true": tensor(shape=b"\x88K\x04\x86"),
    "no shape": tensor(shape=b"N"),
    "a hook": tensor().replace(b"}tR", b"}" + text("h") + b"NstR"),
    "many dimensions": tensor(shape=b"(" + b"K\x01" * 40 + b"t", strides=b"(" + b"K\x01" * 40 + b"t"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_not_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for code in (state_dict(HOSTILE[name]), b"\x80\x04" + HOSTILE[name] + b"0}."):
        with pytest.raises((FormatError, UnsupportedError)):
            read_torch_file(zipped(tmp_path, code))
    assert not (tmp_path / "executed").exists()


def test_the_shell_would_have_run(tmp_path, monkeypatch):
    """The twin: what is refused above does run where a pickle is opened as one."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(state_dict(HOSTILE["a call of os.system"]))
    assert (tmp_path / "executed").exists()


BOMBS = {
    "nested tuples": b")" + b"\x85" * 1_000_000,
    "nested marks": b"(" * 1_000_000,
    "doubled tuples": b"N" + b"q\x01h\x01h\x01\x86" * 100_000,
    "doubled tuples as a key": b"N" + b"q\x01h\x01h\x01\x86" * 100 + b"q\x02}h\x02Ns",
    "many instructions": b"N" * (MAX_INSTRUCTIONS + 10),
    "memo places": b"N" + b"r\xff\xff\xff\x7f" * 100_000,
    "a long text that is not there": b"X\xff\xff\xff\x7fabc",
    "a longer text that is not there": b"\x8d" + b"\xff" * 7 + b"\x7fabc",
    "a long number": b"\x8b\xff\xff\xff\x7f",
    "a number of many digits": b"L" + b"9" * 1_000_000 + b"L\n",
    "a frame that is not there": b"\x95" + b"\xff" * 7 + b"\x7f",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_long(tmp_path, name):
    path = zipped(tmp_path, state_dict(BOMBS[name]))
    begun = time.process_time()
    with pytest.raises(ConversionError) as caught:
        read_torch_file(path)
    assert time.process_time() - begun < 20  # a second or two on a quiet machine
    assert len(caught.value.message) < 1000


def test_recursive_values_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="a: is a list"):
        read_torch_file(zipped(tmp_path, state_dict(b"]q\x01h\x01a")))
    with pytest.raises(UnsupportedError, match="a: is a dict"):
        read_torch_file(zipped(tmp_path, b"\x80\x02}q\x01X\x01\x00\x00\x00ah\x01s."))


def test_zip_files_that_torch_does_not_write_are_refused(tmp_path):
    cases = [
        ({"compression": zipfile.ZIP_DEFLATED}, UnsupportedError, "compressed"),
        ({"byteorder": b"big"}, UnsupportedError, "byte order"),
        ({"constants.pkl": EMPTY}, UnsupportedError, "TorchScript"),
        ({"byteorder": b"little" * 10}, FormatError, "more than 16"),
    ]
    for how, kind, words in cases:
        with pytest.raises(kind, match=words):
            read_torch_file(zipped(tmp_path, EMPTY, **how))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match="and not one that"):
        read_torch_file(tmp_path / "other.zip")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_and_missing_storages_are_refused(tmp_path):
    path = zipped(tmp_path, state_dict(tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("adapter_model/data/0", bytes(48))
    with pytest.raises(FormatError, match="more than one member\n  - adapter_model/data/0"):
        read_torch_file(path)
    other = state_dict(tensor()).replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007")
    with pytest.raises(FormatError, match="no storage data/7"):
        read_torch_file(zipped(tmp_path, other))


def test_a_damaged_pickle_is_noticed_by_its_checksum(tmp_path):
    path = saved(tmp_path, {"lora_A": values(3, 4)})
    path.write_bytes(path.read_bytes().replace(b"lora_A", b"lora_B"))
    with pytest.raises(FormatError, match="checksum"):
        read_torch_file(path)


def read_all(path: Path) -> None:
    with read_torch_file(path) as found:
        for name, record in found.tensors.items():
            if record.dtype in FLOATS.values():
                found.rows(name)


def test_files_cut_short_and_changed_are_refused_or_read(tmp_path):
    """Every error is one of ours, whatever is wrong with the file."""
    path = saved(tmp_path, {"a": values(3, 4), "b": values(3, 4).t(), "c": torch.arange(5)})
    whole = path.read_bytes()
    chance = random.Random(3)
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ConversionError):
            read_torch_file(path)
    refused = 0
    pickled = whole.index(b"\x80\x02")
    directory = whole.index(b"PK\x01\x02")
    for turn in range(900):
        changed = bytearray(whole)
        first, last = ((0, len(whole)), (pickled, pickled + 400), (directory, len(whole)))[turn % 3]
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(first, last)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path.write_bytes(changed)
        try:
            read_all(path)
        except ConversionError:
            refused += 1
    assert refused > 300


def test_changed_pickles_without_a_checksum_are_refused_or_read(tmp_path):
    path = saved(tmp_path, {"a": values(3, 4), "b": values(3, 4).t()})
    with zipfile.ZipFile(path) as archive:
        content = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    chance, refused = random.Random(4), 0
    code = content.pop("data.pkl")
    for _ in range(900):
        changed = bytearray(code)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(code))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        try:
            read_all(zipped(tmp_path, bytes(changed), **content))
        except ConversionError:
            refused += 1
    assert refused > 300
    assert os.listdir(tmp_path) == ["adapter_model.bin"]
