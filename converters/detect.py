"""What a path holds, seen from its first bytes or its files, so that `convert SOURCE` needs no option for it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from converters.checkpoint import PICKLES, pickles_in
from converters.errors import ConversionError, FormatError, MissingFileError, UnsupportedError
from converters.reader import MAGIC, read_header

EXPECTED = "Expected a model folder (config.json), a PEFT adapter folder (adapter_config.json) or a GGUF file."

PICKLE_SUFFIXES = tuple(pattern.removeprefix("*") for pattern in PICKLES)


class SourceKind(Enum):
    HF_BASE = "model folder"
    PEFT_ADAPTER = "PEFT adapter folder"
    GGUF_BASE = "GGUF base"
    GGUF_ADAPTER = "GGUF adapter"


# First bytes of files that people give by mistake, and what to say.
_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`."),
    (b"PK\x03\x04", "a PyTorch pickle, which can run code when opened", "Save the model as safetensors."),
    *(
        (bytes([0x80, protocol]), "a pickle, which can run code when opened", "Save the model as safetensors.")
        for protocol in range(2, 6)
    ),
    (b"<!DOCTYPE", "a web page, not a model", "The download went wrong: fetch the file itself."),
    (b"<html", "a web page, not a model", "The download went wrong: fetch the file itself."),
    (b"ggjt", "a GGML file from before GGUF", "Convert the original model again."),
    (b"lmgg", "a GGML file from before GGUF", "Convert the original model again."),
)


def detect(path: Path) -> SourceKind:
    """What kind of model or adapter `path` is.

    Raises:
        ConversionError: none of the four; the message says what it is, the hint what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or folder", hint=EXPECTED)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start.startswith(MAGIC):
        header = read_header(path)
        if header.metadata.get("general.type") == "imatrix":
            raise FormatError(f"{path}: is an importance matrix, not a model", hint="Give it with --imatrix.")
        return SourceKind.GGUF_ADAPTER if header.kind == "adapter" else SourceKind.GGUF_BASE
    raise _not_a_model(path, start)


def _detect_folder(folder: Path) -> SourceKind:
    if (folder / "adapter_config.json").is_file():
        return SourceKind.PEFT_ADAPTER
    if (folder / "config.json").is_file():
        return SourceKind.HF_BASE
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise MissingFileError(f"{folder}: is an empty folder", hint=EXPECTED)
    if pickles := pickles_in(folder):
        raise UnsupportedError(
            f"{folder}: holds pickles ({', '.join(pickles[:3])}), which can run code when opened", hint=EXPECTED
        )
    for wanted, hint in (("*.gguf", "Name the file: {}."), ("checkpoint-*", "Name one of its checkpoints: {}.")):
        if inside := sorted(folder.glob(wanted)):
            raise FormatError(f"{folder}: holds no model of its own", hint=hint.format(inside[-1]))
    raise FormatError(f"{folder}: not a model (it holds {', '.join(names[:5])})", hint=EXPECTED)


def _not_a_model(path: Path, start: bytes) -> ConversionError:
    if not start:
        return FormatError(f"{path}: is an empty file", hint=EXPECTED)
    for first, what, hint in _STARTS:
        if start[: len(first)].lower() == first.lower():
            return FormatError(f"{path}: {what}", hint=hint)
    if path.suffix in PICKLE_SUFFIXES:
        what = f"not a model (it starts with {start[:8]!r}; files named *{path.suffix} are mostly pickles)"
        return FormatError(f"{path}: {what}", hint=EXPECTED)
    if path.suffix == ".safetensors":
        return FormatError(f"{path}: is one file of a model", hint=f"Give its folder: {path.parent}")
    return FormatError(f"{path}: not a model (it starts with {start[:8]!r})", hint=EXPECTED)
