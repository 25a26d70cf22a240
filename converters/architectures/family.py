"""What one model family is: its tensors under both names, its hyperparameters, and what it refuses.

A family is a table. The converter goes through it from Hugging Face to GGUF, and adapters take B through the same row
order as the weight they change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import FormatError

Config = Mapping[str, Any]
Indices = npt.NDArray[np.int64]
SUFFIXES = ("weight", "bias")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that give every tensor its shape, read from GGUF metadata whichever way the model came."""

    architecture: str
    vocab: int
    embedding: int
    feed_forward: int
    layers: int
    heads: int
    heads_kv: int
    head_dim: int

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.heads_kv * self.head_dim

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], vocab: int) -> Dimensions:
        """From the keys of a GGUF base.

        Raises:
            FormatError: a key is missing or not a positive whole number.
        """
        architecture = str(metadata.get("general.architecture"))

        def size(key: str, default: int | None = None) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            if not isinstance(value, int) or value < 1:
                raise FormatError(f"{architecture}.{key} is {value!r}, expected a positive whole number")
            return value

        embedding, heads = size("embedding_length"), size("attention.head_count")
        return cls(
            architecture=architecture,
            vocab=vocab,
            embedding=embedding,
            feed_forward=size("feed_forward_length"),
            layers=size("block_count"),
            heads=heads,
            heads_kv=size("attention.head_count_kv", heads),
            head_dim=size("attention.key_length", embedding // heads),
        )


RowOrder = Callable[[Dimensions], Indices]


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        hf: the module's name in transformers; `{layer}` stands for the layer's number.
        gguf: the tensor's name in llama.cpp, without ".weight" (llm_tensor names, src/llama-arch.cpp).
        shape: names of `Dimensions`, rows first; a bias has the first one only.
        order: for each row of the GGUF tensor, the row of the HF tensor it is; None where they are the same.
        bias: the configuration key that gives the module a bias; "" where it never has one.
        absent_if_tied: the output, which a model with tied embeddings does not have.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    order: RowOrder | None = None
    bias: str = ""
    absent_if_tied: bool = False

    def shape_of(self, suffix: str, dimensions: Dimensions) -> tuple[int, ...]:
        symbols = self.shape[:1] if suffix == "bias" else self.shape
        return tuple(getattr(dimensions, symbol) for symbol in symbols)

    def row_order(self, dimensions: Dimensions) -> Indices | None:
        return self.order(dimensions) if self.order else None


@dataclass(frozen=True)
class Place:
    """One tensor of a model under both names; `layer` is None outside the layers."""

    row: Row
    layer: int | None
    suffix: str

    @property
    def hf_module(self) -> str:
        return self.row.hf.replace("{layer}", str(self.layer))

    @property
    def gguf_module(self) -> str:
        return self.row.gguf.replace("{layer}", str(self.layer))

    @property
    def hf_name(self) -> str:
        return f"{self.hf_module}.{self.suffix}"

    @property
    def gguf_name(self) -> str:
        return f"{self.gguf_module}.{self.suffix}"


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: `general.architecture`.
        rows: every kind of tensor it has.
        hyperparameters: configuration to GGUF metadata, keys complete ("llama.block_count").
        problems: what in this configuration cannot be converted, each with its key and value.
        notices: what converts, but should be known.
        computed: tensors that are in the GGUF file and in no checkpoint, by GGUF name.
        ignored: endings of HF tensors that are not weights.
    """

    architecture: str
    rows: tuple[Row, ...]
    hyperparameters: Callable[[Config], dict[str, Any]]
    problems: Callable[[Config], list[str]]
    notices: Callable[[Config], list[str]]
    computed: Callable[[Config], dict[str, npt.NDArray[np.float32]]]
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

    def from_hf(self, name: str) -> Place | None:
        """The place of a transformers tensor ("model.layers.3.mlp.up_proj.weight"), or None."""
        module, _, suffix = name.rpartition(".")
        if suffix not in SUFFIXES:
            return None
        found = re.search(r"\.(0|[1-9]\d{0,8})\.", module)
        general = module[: found.start()] + ".{layer}." + module[found.end() :] if found else module
        row = next((row for row in self.rows if row.hf == general), None)
        return Place(row, int(found[1]) if found else None, suffix) if row else None

    def places(self, dimensions: Dimensions, config: Config) -> Iterator[Place]:
        """Every tensor that a model of these sizes and this configuration has; the output also where it is tied."""
        for row in self.rows:
            suffixes = SUFFIXES if row.bias and config.get(row.bias) else SUFFIXES[:1]
            for layer in range(dimensions.layers) if "{layer}" in row.hf else (None,):
                yield from (Place(row, layer, suffix) for suffix in suffixes)


def interleaved_rows(heads: int, head_dim: int) -> Indices:
    """Row order of q and k for the rotary embedding of llama.cpp's llama family.

    transformers rotates the first half of a head against the second, llama.cpp neighbours against each other: row
    2j + i of a head is row i * head_dim / 2 + j of the checkpoint (`LlamaModel.permute`, conversion/llama.py).
    """
    order = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)
