"""What is checked in a base's header before llama.cpp sees the file: values that end its process with an assertion.

llama.cpp refuses most broken bases with an exception, which is reported with its reason. What is here is the rest: an
assertion or an uncaught exception in `src/llama-model.cpp`, `src/llama-vocab.cpp` or `ggml`, at load or at first use.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from converters.reader import GGUFHeader
from edgelora.engine.preflight import listed
from edgelora.errors import ModelFileError

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, src/llama-hparams.h
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")  # LLAMA_ROPE_SCALING_TYPES, src/llama-model.cpp
_NEEDS = {  # tokenizer.ggml.model to what its vocabulary cannot do without
    "llama": ("scores", "token_type"),
    "gpt2": ("merges",),
    "t5": ("scores", "token_type"),
}
_LAYER = re.compile(r"blk\.(\d+)\.")
_TOKENS = "tokenizer.ggml.tokens"


def check_base(header: GGUFHeader) -> None:
    """Every known value that would end the process.

    Raises:
        ModelFileError: naming all of them.
    """
    metadata, architecture = header.metadata, header.architecture
    problems = [
        f"{key} is {metadata[key]!r}, expected {wanted}"
        for name, (accepts, wanted) in _VALUES.items()
        if (key := f"{architecture}.{name}") in metadata and not accepts(metadata[key])
    ]
    problems += [*_layer_problems(header), *_vocabulary_problems(header)]
    if problems:
        raise ModelFileError(
            listed(f"{header.path}: cannot be used as a base", problems), hint="Convert or download it again."
        )


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: not isinstance(value, int) or least <= value <= most  # llama.cpp refuses other types itself


def _is_epsilon(value: Any) -> bool:
    return not isinstance(value, float) or (math.isfinite(value) and value > 0)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "context_length": (_whole(1, 2**31 - 1), "a number from 1, below 2**31"),
    "attention.layer_norm_rms_epsilon": (_is_epsilon, "a number above 0"),
    "attention.layer_norm_epsilon": (_is_epsilon, "a number above 0"),
    "expert_count": (_whole(0, MAX_EXPERTS), f"at most {MAX_EXPERTS}"),
    "rope.scaling.type": (lambda value: value in ROPE_SCALINGS, f"one of {', '.join(ROPE_SCALINGS)}"),
}


def _layer_problems(header: GGUFHeader) -> Iterator[str]:
    metadata, key = header.metadata, f"{header.architecture}.block_count"
    layers = {match[1] for name in header.tensors if (match := _LAYER.match(name))}
    is_a_part = metadata.get("split.count", 1) not in (0, len(header.files))
    if layers and not is_a_part and isinstance(said := metadata.get(key), int) and said != len(layers):
        yield f"{key} is {said}, and the file has the tensors of {len(layers)} layers"


def _vocabulary_problems(header: GGUFHeader) -> Iterator[str]:
    metadata = header.metadata
    tokens, model = metadata.get(_TOKENS), metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return
    if metadata.get("edgelora.tokenizer") == "huggingface":
        model = None  # llama.cpp never tokenizes with it
    for name in _NEEDS.get(str(model), ()):
        if f"tokenizer.ggml.{name}" not in metadata:
            yield f"tokenizer.ggml.{name} is missing, which a {model!r} vocabulary needs"
    for name in ("scores", "token_type"):
        values = metadata.get(f"tokenizer.ggml.{name}")
        if isinstance(values, list) and len(values) != len(tokens):
            yield f"tokenizer.ggml.{name} has {len(values)} values for {len(tokens)} tokens"
    embedding = header.tensors.get("token_embd.weight")
    if embedding and embedding.shape[0] != len(tokens):
        yield f"{_TOKENS} has {len(tokens)} tokens, and token_embd.weight has {embedding.shape[0]} rows"
    # Empty tokens are renamed by llama.cpp, and a replacement character may stand for different bytes.
    twice = [token for token, count in Counter(tokens).items() if count > 1 and token and "\ufffd" not in token]
    if twice:
        yield f"{_TOKENS} holds {len(twice)} tokens twice, for example {twice[0]!r}"
    if model == "llama" and (absent := _absent_bytes(set(tokens))):
        yield f"{_TOKENS} lacks {absent} of the 256 bytes (<0x00> to <0xFF>) that a 'llama' vocabulary falls back on"


def _absent_bytes(tokens: set[str]) -> int:
    return sum(f"<0x{byte:02X}>" not in tokens and (byte > 127 or chr(byte) not in tokens) for byte in range(256))
