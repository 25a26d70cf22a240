"""Files that the command-line tests share: made once, in one folder, as a user's would lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import TINY_BASE
from tests.peft_folders import write_lora


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="session")
def tiny_q8(files: Path) -> Path:
    from converters.base import convert_base

    return convert_base(TINY_BASE, files / "tiny-q8_0.gguf", quant="q8_0").path


@pytest.fixture(scope="session")
def adapter(files: Path, tiny_q8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF adapter with a contract, made for the bundled base."""
    from edgelora.conversion import convert
    from edgelora.store import Store

    folder = write_lora(tmp_path_factory.mktemp("peft") / "adapter", TINY_BASE, seed=1, strength=1.0)
    return convert(folder, files / "adapter.gguf", store=Store(tmp_path_factory.mktemp("store"))).path


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same architecture and shapes that is another model: its norms differ."""
    from converters.base import convert_base

    folder = Path(shutil.copytree(TINY_BASE, tmp_path_factory.mktemp("other") / "model"))
    roll_tensor(folder / "model.safetensors", "model.norm.weight")
    return convert_base(folder, folder.parent / "other-q8_0.gguf", quant="q8_0").path


def roll_tensor(path: Path, name: str) -> None:
    """Move every value of a tensor one place on, in the file (8 bytes of header size, JSON header, data)."""
    data = bytearray(path.read_bytes())
    header_size = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + header_size])[name]
    start, end = (8 + header_size + offset for offset in entry["data_offsets"])
    width = (end - start) // entry["shape"][0]
    data[start:end] = data[end - width : end] + data[start : end - width]
    path.write_bytes(data)
