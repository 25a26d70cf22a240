"""One hash for a base, however it is quantized.

Norm vectors stay F32 in every quantization, so the hash of the norm vectors, the vocabulary and the sizes is the same
for an HF folder, for its F32 to Q2_K files, and for those that llama.cpp's own tools made.

It tells apart models that were trained on their own, and fine-tunes that trained the norms. A fine-tune that left its
norms alone, as a LoRA merged into its base does, is told apart where edgelora merged it and wrote that down; others are
not: their weights differ, but those also differ between two quantizations of one model.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from converters.architectures import Sizes
from converters.base_file import read_base_header
from converters.checkpoint import Checkpoint, Floats
from converters.errors import FormatError
from converters.model import norms, understand
from converters.quant_types import TYPES
from converters.reader import ARRAY, STRING, GGUFHeader
from converters.split import COUNT

TOKENS = "tokenizer.ggml.tokens"
MERGED = "edgelora.merged"
"""What was merged into a base: for each adapter its name, scale, and the hash of its files, as text."""
UNTIED = "edgelora.untied"
"""Whether a base's output was made of its embeddings."""
_DTYPES = {"F32": "<f4", "F16": "<f2"}


def fingerprint(path: Path) -> str:
    """The fingerprint of a base: an HF folder, a GGUF file, or any part of a split one (the others are read too).

    Returns:
        64 hexadecimal digits.

    Raises:
        ConversionError: not a base, or broken.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    return fingerprint_of_header(read_base_header(path))


def _of_folder(folder: Path) -> str:
    with Checkpoint(folder) as checkpoint:
        model = understand(checkpoint)
        return fingerprint_of(model.sizes, model.vocabulary.tokens, norms(model))


def fingerprint_of_header(header: GGUFHeader) -> str:
    """The fingerprint of a GGUF base whose header has been read.

    Raises:
        FormatError: it is an adapter, or has no vocabulary, or is a part of a split base on its own.
    """
    norms = ((name, _vector(header, name)) for name in header.tensors if is_norm(name))
    return merged_fingerprint(fingerprint_with(header, norms), header.metadata.get(MERGED, ()))


def merged_fingerprint(fingerprint: str, merged: Sequence[str]) -> str:
    """The fingerprint of a base with adapters merged into it: its norms may be those of before, and it is another."""
    if not merged:
        return fingerprint
    return hashlib.sha256("\0".join((fingerprint, *merged)).encode()).hexdigest()


def fingerprint_with(header: GGUFHeader, norms: Iterable[tuple[str, Floats]]) -> str:
    """What the fingerprint of a GGUF base would be with these norms, and nothing merged into it.

    Raises:
        FormatError: see `fingerprint_of_header`.
    """
    if header.metadata.get(COUNT, 1) not in (0, len(header.files)):
        raise FormatError(f"{header.path}: one part of a split base has no fingerprint without the others")
    if header.kind != "base" or TOKENS not in header.metadata:
        raise FormatError(f"{header.path}: not a base with a vocabulary")
    raw = header.metadata.raw(TOKENS)
    if raw.kind != ARRAY or raw.item_kind != STRING:
        raise FormatError(f"{header.path}: {TOKENS} is not a list of strings")
    sizes = Sizes(header.architecture, raw.count, header.metadata)
    return _digest(sizes, raw.data, norms)


def fingerprint_of(sizes: Sizes, tokens: Sequence[str], norms: Iterable[tuple[str, Floats]]) -> str:
    """The fingerprint from its parts.

    Args:
        sizes: the model's sizes.
        tokens: the vocabulary, by id.
        norms: GGUF name and float32 values of every norm vector, in any order.
    """
    encoded = (token.encode("utf-8") for token in tokens)
    return _digest(sizes, b"".join(struct.pack("<Q", len(token)) + token for token in encoded), norms)


def _digest(sizes: Sizes, vocabulary: bytes, norms: Iterable[tuple[str, Floats]]) -> str:
    digest = hashlib.sha256(repr(sizes.identity).encode())
    digest.update(vocabulary)
    for name, values in sorted(norms, key=lambda norm: norm[0]):
        digest.update(name.encode() + b"\0" + values.astype("<f4").tobytes())
    return digest.hexdigest()


def is_norm(name: str) -> bool:
    return name.endswith("_norm.weight")


def _vector(header: GGUFHeader, name: str) -> Floats:
    tensor = header.tensors[name]
    if tensor.type_name not in _DTYPES:
        raise FormatError(f"{header.path}: {name} is {tensor.type_name}; norm vectors of a base are F32")
    count = tensor.size_bytes // TYPES[tensor.type_name].size
    values = np.fromfile(tensor.path, _DTYPES[tensor.type_name], count, offset=tensor.offset)
    return values.astype(np.float32)
