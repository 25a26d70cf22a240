"""The place of a base in llama.cpp's `graniteswitch`, which computes Llama's graph with stacked adapters in it.

    token_embd.weight, output_norm.weight, output.weight    as in the base
    blk.0.attn_qkv.weight                                    its queries, keys and values, row under row
    blk.0.attn_output.weight, blk.0.ffn_gate.weight ...      as in the base
    blk.0.attn_q.lora_a, blk.0.attn_q.lora_b ...             (adapters + 1, rank, columns), (adapters + 1, rows, rank)

Slot 0 of a stack is zero: the bare base. Source: src/models/granite-switch.cpp and src/models/llama.cpp in llama.cpp.
Whatever the one reads and the other does not is refused here, or left out where it makes no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import FormatError, UnsupportedArchitectureError, UnsupportedError, listed
from converters.fingerprint import TOKENS
from converters.reader import GGUFHeader
from converters.tensor_kinds import EMBEDDING, OUTPUT

ARCHITECTURE, BASE_ARCHITECTURE = "graniteswitch", "llama"
MAX_ADAPTERS, MAX_RANK = 4096, 4096  # `load_arch_hparams`, src/models/granite-switch.cpp
ATTENTION = ("attn_q", "attn_k", "attn_v")

# Matrices that adapters change, and the sizes of their rows and columns; see `Sizes`.
MATRICES: Mapping[str, tuple[str, str]] = {
    "attn_q": ("queries", "embedding"),
    "attn_k": ("keys", "embedding"),
    "attn_v": ("keys", "embedding"),
    "attn_output": ("embedding", "queries"),
    "ffn_gate": ("feed_forward", "embedding"),
    "ffn_up": ("feed_forward", "embedding"),
    "ffn_down": ("embedding", "feed_forward"),
}
NORMS = ("attn_norm", "ffn_norm")
# Keys that graniteswitch reads and llama does not: with them the bundle would compute something else.
NOT_LLAMAS = (
    "logit_scale", "residual_scale", "embedding_scale", "attention.scale", "rope.scaling.finetuned",
    "expert_shared_feed_forward_length", "nextn_predict_layers",
)  # fmt: skip
# What a tensor's name says of why it has no place, the first match.
_REASONS = (
    ("_exps", "experts"),
    ("ffn_gate_inp", "experts"),
    ("_norm.weight", "a norm of queries or keys, or after a layer"),
    ("rope_", "rope factors, as Llama 3.1 and later have them"),
    (".bias", "a bias"),
    ("attn_qkv", "queries, keys and values in one tensor"),
    ("scale", "a scale beside a weight"),
)


@dataclass(frozen=True)
class Sizes:
    """Of a base: layers, and the lengths that shape its matrices; `queries` and `keys` are heads times their width."""

    layers: int
    embedding: int
    queries: int
    keys: int
    feed_forward: int

    def shape(self, matrix: str) -> tuple[int, int]:
        """Rows and columns of a row of `MATRICES`."""
        rows, columns = MATRICES[matrix]
        return getattr(self, rows), getattr(self, columns)


def check_base(header: GGUFHeader) -> Sizes:
    """The sizes of a base that fits.

    Raises:
        UnsupportedError: what has no place in graniteswitch, all of it by name.
        FormatError: an adapter, or a base that contradicts itself.
    """
    if header.kind != "base":
        raise FormatError(f"{header.path}: is an adapter, and a bundle is made of a base and adapters")
    if header.architecture == ARCHITECTURE:
        raise UnsupportedArchitectureError(
            f"{header.path}: is a bundle already ({ARCHITECTURE})",
            hint="Make a new one of its base and all the adapters.",
        )
    if header.architecture != BASE_ARCHITECTURE:
        raise UnsupportedArchitectureError(
            f"{header.path}: its architecture is {header.architecture}, and only {BASE_ARCHITECTURE} can be bundled: "
            f"llama.cpp's {ARCHITECTURE} computes no other graph",
            hint="Serve the adapters beside the base: edgelora chat --base BASE --adapter ADAPTER.",
        )
    sizes = _sizes(header)
    if problems := [*_key_problems(header), *_tensor_problems(header, sizes)]:
        raise UnsupportedError(
            f"{header.path}: cannot be bundled, for llama.cpp's {ARCHITECTURE} has no place for:{listed(problems)}",
            hint="Serve the adapters beside the base: edgelora chat --base BASE --adapter ADAPTER.",
        )
    return sizes


def _sizes(header: GGUFHeader) -> Sizes:
    names = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    values = {name: header.metadata.get(f"{BASE_ARCHITECTURE}.{name}") for name in names}
    values["attention.head_count_kv"] = _value(header, "attention.head_count_kv", values["attention.head_count"])
    if strange := [f"{BASE_ARCHITECTURE}.{name} is {value!r}, expected a number above 0"
                   for name, value in values.items() if type(value) is not int or value < 1]:  # fmt: skip
        raise UnsupportedError(f"{header.path}: cannot be bundled:{listed(strange)}")
    layers, embedding, feed_forward, heads, heads_kv = (int(str(value)) for value in values.values())
    width = _value(header, "attention.key_length", embedding // heads)
    if type(width) is not int or width < 1:
        raise FormatError(f"{header.path}: {BASE_ARCHITECTURE}.attention.key_length is {width!r}")
    return Sizes(layers, embedding, heads * width, heads_kv * width, feed_forward)


def _value(header: GGUFHeader, name: str, otherwise: Any) -> Any:
    return header.metadata.get(f"{BASE_ARCHITECTURE}.{name}", otherwise)


def _key_problems(header: GGUFHeader) -> Iterator[str]:
    heads = _value(header, "attention.head_count", 1)
    width = _value(header, "attention.key_length", _value(header, "embedding_length", 0) // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := _value(header, name, width)) != width:
            yield f"{BASE_ARCHITECTURE}.{name} {value!r}, where heads are {width} wide"
    for name in ("expert_count", "nextn_predict_layers"):
        if value := _value(header, name, 0):
            yield f"{BASE_ARCHITECTURE}.{name} {value!r}"
    if header.metadata.get("edgelora.tokenizer", "llama.cpp") != "llama.cpp":
        yield "its tokenizer: llama.cpp gives other token ids, so its programs could not use the bundle"
    if header.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab") or TOKENS not in header.metadata:
        yield "a base without a vocabulary: there would be no token to choose an adapter by"


def _tensor_problems(header: GGUFHeader, sizes: Sizes) -> Iterator[str]:
    n_vocab = header.metadata.raw(TOKENS).count if TOKENS in header.metadata else 0
    expected: dict[str, tuple[int, ...]] = {
        EMBEDDING: (n_vocab, sizes.embedding),
        "output_norm.weight": (sizes.embedding,),
    }
    for layer in range(sizes.layers):
        expected |= {f"blk.{layer}.{name}.weight": (sizes.embedding,) for name in NORMS}
        expected |= {f"blk.{layer}.{name}.weight": sizes.shape(name) for name in MATRICES}
    if OUTPUT in header.tensors:
        expected[OUTPUT] = (n_vocab, sizes.embedding)
    yield from _grouped(name for name in header.tensors if name not in expected)
    for name, shape in expected.items():
        if name not in header.tensors:
            yield f"a base without {name}"
        elif header.tensors[name].shape != shape:
            yield f"{name} of shape {header.tensors[name].shape}, expected {shape}"


def _grouped(names: Iterator[str]) -> Iterator[str]:
    """Tensors without a place, those of all layers as one: "blk.*.attn_q.bias (32 layers): a bias"."""
    layers: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"^blk\.\d+\.", "blk.*.", name)
        layers[kind] = layers.get(kind, 0) + 1
    for kind, count in layers.items():
        reason = next((f": {reason}" for part, reason in _REASONS if part in kind), "")
        yield f"{kind}{f' ({count} layers)' if '*' in kind else ''}{reason}"
