"""What the store knows of one base or adapter: enough to say what fits which, without opening the file again.

    path         /home/me/models/tiny-q8_0.gguf
    kind         SourceKind.GGUF_BASE
    name         Tiny                       what people call it
    detail       q8_0                       quantization of a base, method and rank of an adapter
    fingerprint  029e51d5ff30...            of a base its own; of an adapter that of the base it wants
    base_name    ""                         of an adapter: what it calls its base
    problem      ""                         why it cannot be used; such files are remembered too

A file is known by its state (sizes and times) while it stays where it is, and by its content when it has moved.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.detect import SourceKind, detect
from converters.errors import ConversionError
from converters.hub_cache import ADAPTER_CONFIG, ADAPTER_WEIGHTS, repository_of
from converters.quant_types import RECIPES
from converters.reader import GGUFHeader, read_header
from converters.safetensors_file import StoredTensor, read_tensors
from converters.split import part_name
from edgelora.adapter_ref import default_name
from edgelora.contract import Contract
from edgelora.errors import EdgeloraError
from edgelora.version import __version__

BASES = (SourceKind.GGUF_BASE, SourceKind.HF_BASE)
ADAPTERS = (SourceKind.GGUF_ADAPTER, SourceKind.PEFT_ADAPTER)
QUANTIZATIONS = {recipe.file_type: recipe.name for recipe in RECIPES.values()}  # `general.file_type` to its name
MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".bin", ".md")  # what a model folder is made of
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
_HASH_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One base or adapter; see the module's table.

    Attributes:
        kind: None for what is neither base nor adapter.
        size_bytes: of all its files.
        state: changes when one of its files does; empty for what is gone.
        content: a hash of samples of its bytes, the same wherever it lies and whatever it is called.
        origin: how it came to be known: "convert", "added", a program whose folder it lies in; empty for what was only
            looked at.
    """

    path: Path
    kind: SourceKind | None = None
    name: str = ""
    detail: str = ""
    fingerprint: str = ""
    base_name: str = ""
    problem: str = ""
    size_bytes: int = 0
    state: str = ""
    content: str = ""
    origin: str = ""

    @property
    def is_base(self) -> bool:
        return self.kind in BASES and not self.problem

    @property
    def is_adapter(self) -> bool:
        return self.kind in ADAPTERS and not self.problem

    @property
    def is_there(self) -> bool:
        return self.path.exists()


@dataclass(frozen=True)
class _Facts:
    name: str = ""
    detail: str = ""
    fingerprint: str = ""
    base_name: str = ""


def place_of(path: Path) -> Path:
    """The path something is remembered by: absolute, its folder's links followed; of a split base its first part.

    The last link is kept: the Hugging Face cache's files are links to blobs whose names say nothing.
    """
    place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    named = part_name(place)
    return named.path(1) if named and named.path(1).is_file() else place


def members(path: Path) -> list[Path]:
    """The files that are the model or adapter at `path`, in a fixed order; empty where nothing is there."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file())
    named = part_name(path)
    files = [named.path(number) for number in range(1, named.count + 1)] if named else [path]
    return [file for file in files if file.is_file()]


def state_of(path: Path) -> str:
    """A hash of names, sizes and times of `members`; empty where nothing is there, or may be looked at.

    Another edgelora may understand more, and looks again.
    """
    try:
        stats = [(file.name, file.stat()) for file in members(path)]
    except OSError:
        return ""
    seen = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in stats]
    return hashlib.sha256("".join([__version__, *seen]).encode("utf-8", "surrogateescape")).hexdigest() if seen else ""


def content_of(path: Path) -> str:
    """A hash of sizes and at most `SAMPLES * SAMPLE_BYTES` bytes of each file, taken evenly.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in members(path):
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for start in _sample_starts(size):
                opened.seek(start)
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _sample_starts(size: int) -> Iterable[int]:
    if size <= SAMPLES * SAMPLE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    return [number * (size - SAMPLE_BYTES) // (SAMPLES - 1) for number in range(SAMPLES)]


def examine(path: Path) -> Entry:
    """Look at what is at `path` (see `place_of`); what cannot be used has a `problem`, nothing is raised."""
    kind, facts, problem, state = None, _Facts(), "", state_of(path)
    try:
        kind = detect(path)
        facts = _READERS[kind](path)
    except (ConversionError, EdgeloraError) as error:
        problem = error.message
    except OSError as error:
        problem = f"{path}: cannot be read ({error.strerror or error})"
    size, content = _bytes_of(path)
    return Entry(path, kind, facts.name or default_name(path), facts.detail, facts.fingerprint, facts.base_name,
                 problem, size, state, content)  # fmt: skip


def _bytes_of(path: Path) -> tuple[int, str]:
    try:
        return sum(file.stat().st_size for file in members(path)), content_of(path)
    except OSError:
        return 0, ""


def _gguf_base(path: Path) -> _Facts:
    from converters.fingerprint import fingerprint

    header = read_header(path)
    name = header.metadata.get("general.name")
    return _Facts(name if isinstance(name, str) else "", quantization_of(header), fingerprint(path))


def quantization_of(header: GGUFHeader) -> str:
    """What a GGUF file calls its quantization, else the type of most of its bytes; lower case ("q4_k_m")."""
    file_type = header.metadata.get("general.file_type")
    if type(file_type) is int and file_type in QUANTIZATIONS:
        return QUANTIZATIONS[file_type]
    return largest({tensor.name: (tensor.type_name, tensor.size_bytes) for tensor in header.tensors.values()})


def largest(tensors: Mapping[str, tuple[str, int]]) -> str:
    """The type of most bytes, lower case; of name to (type, bytes)."""
    sizes: dict[str, int] = {}
    for kind, size in tensors.values():
        sizes[kind] = sizes.get(kind, 0) + size
    return max(sizes, key=lambda kind: sizes[kind]).lower() if sizes else ""


def _hf_base(folder: Path) -> _Facts:
    from converters.adapted_base import of_folder
    from converters.checkpoint import Checkpoint

    with Checkpoint(folder) as checkpoint:
        stored = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, StoredTensor)]
        dtype = largest({tensor.name: (tensor.dtype, tensor.size_bytes) for tensor in stored})
        base = of_folder(checkpoint)
        return _Facts(repository_of(folder) or base.name, dtype, base.fingerprint)


def _gguf_adapter(path: Path) -> _Facts:
    header = read_header(path)
    contract = Contract.from_metadata(header.metadata, str(path)) or Contract()
    name, method = header.metadata.get("general.name"), header.metadata.get("adapter.type")
    ranks = {tensor.shape[-1] for key, tensor in header.tensors.items() if key.endswith(".lora_b")}
    detail = " ".join([str(method or "lora"), *([f"r{_range(ranks)}"] if ranks else []), quantization_of(header)])
    is_named_by_hash = _HASH_NAME.fullmatch(path.stem) and isinstance(name, str) and name
    return _Facts(str(name) if is_named_by_hash else "", detail, contract.base_fingerprint, contract.base_name)


def _peft_adapter(folder: Path) -> _Facts:
    values, contract = read_json(folder / ADAPTER_CONFIG), Contract.load(folder) or Contract()
    read_tensors(folder / ADAPTER_WEIGHTS)  # it is not one without, and a broken one says so here
    base_name = contract.base_name or str(values.get("base_model_name_or_path") or "")
    rank = values.get("r")
    method = str(values.get("peft_type") or "?").lower()
    detail = f"{method} r{rank}" if type(rank) is int else method
    return _Facts(repository_of(folder), detail, contract.base_fingerprint, base_name)


def _range(numbers: Iterable[Any]) -> str:
    ordered = sorted(numbers)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


_READERS: Mapping[SourceKind, Callable[[Path], _Facts]] = {
    SourceKind.GGUF_BASE: _gguf_base,
    SourceKind.HF_BASE: _hf_base,
    SourceKind.GGUF_ADAPTER: _gguf_adapter,
    SourceKind.PEFT_ADAPTER: _peft_adapter,
}
