"""Every kind of path is named for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.adapter import convert_adapter
from converters.base import convert_base
from converters.detect import SourceKind, detect
from converters.errors import ConversionError
from tests.converters.folders import make_adapter, make_model


def test_the_four_kinds(tmp_path: Path) -> None:
    model, adapter = make_model(tmp_path / "model"), make_adapter(tmp_path / "adapter")
    base = convert_base(model, tmp_path / "base.gguf").path
    lora = convert_adapter(adapter, base, tmp_path / "lora.gguf").path
    assert detect(model) is SourceKind.HF_BASE
    assert detect(adapter) is SourceKind.PEFT_ADAPTER
    assert detect(base) is SourceKind.GGUF_BASE
    assert detect(lora) is SourceKind.GGUF_ADAPTER


FILES = {
    "empty": (b"", "is an empty file"),
    "model.pt": (b"PK\x03\x04abc", "a PyTorch pickle"),
    "model.bin": (b"\x80\x02cposix", "a pickle"),
    **{f"protocol{number}": (bytes([0x80, number]) + b"}q", "a pickle, which can run code") for number in range(2, 6)},
    "adapter_model.bin": (b"torch", r"files named \*\.bin are mostly pickles"),
    "page.gguf": (b"<!doctype html><html>", "a web page"),
    "lfs.gguf": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "old.bin": (b"tjgg\0\0", "not a model"),
    "model.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "is one file of a model"),
    "rows.jsonl": (b'{"prompt": "hi"}', "not a model"),
    "short.gguf": (b"GGUF\x03\0\0\0", "too short"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_model(name: str, tmp_path: Path) -> None:
    data, message = FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConversionError, match=message) as caught:
        detect(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


FOLDERS = {
    "nothing": ([], "is an empty folder", "config.json"),
    "pickles": (["pytorch_model.bin"], "holds pickles", "config.json"),
    "a file to name": (["base.gguf"], "no model of its own", "base.gguf"),
    "a training run": (["checkpoint-5/x"], "no model of its own", "checkpoint-5"),
    "other things": (["notes.txt"], "it holds notes.txt", "config.json"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_are_no_model(what: str, tmp_path: Path) -> None:
    names, message, hint = FOLDERS[what]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(ConversionError, match=message) as caught:
        detect(tmp_path)
    assert hint in caught.value.hint


def test_an_adapter_whose_weights_are_a_pickle(tmp_path: Path) -> None:
    """It is one; whether the pickle is read is asked later."""
    (make_adapter(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert detect(tmp_path) is SourceKind.PEFT_ADAPTER


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no such file or folder"):
        detect(tmp_path / "none")
