"""The sizes of a model, read from GGUF metadata whichever way the model came, and what follows from them.

A row of a family gives a tensor's shape by names from `NAMES`: ("q_rows", "embedding"). Sizes may differ from layer to
layer, so they are asked of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from converters.errors import FormatError

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS, src/llama-hparams.h


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, or of one of its layers.

    Attributes:
        architecture: `general.architecture`.
        vocab: rows of the token embedding.
        metadata: the GGUF file's, or what will be written into one.
        layer: whose sizes these are; None outside the layers.
    """

    architecture: str
    vocab: int
    metadata: Mapping[str, Any] = field(repr=False, hash=False)
    layer: int | None = None
    _layers: dict[int | None, Sizes] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("embedding", "layers", "heads", "head_dim"):
            self[name]  # a file without them is refused here, with the key's name
        if self["layers"] > MAX_LAYERS:
            raise FormatError(f"{self.architecture}.block_count is {self['layers']}, llama.cpp holds {MAX_LAYERS}")

    def at(self, layer: int | None) -> Sizes:
        """Those of one layer; made, and checked, once."""
        if layer not in self._layers:
            self._layers[layer] = replace(self, layer=layer)
        return self._layers[layer]

    def __getitem__(self, name: str | int) -> int:
        """A name of `NAMES`, or a number, which stands for itself."""
        return name if isinstance(name, int) else NAMES[name](self)

    def shape(self, names: tuple[str | int, ...]) -> tuple[int, ...]:
        return tuple(self[name] for name in names)

    def key(self, name: str, default: int | None = None) -> int:
        """A whole number of the metadata; where it holds a list, this layer's.

        Raises:
            FormatError: it is missing or not a positive whole number.
        """
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list):
            value = value[self.layer or 0] if (self.layer or 0) < len(value) else None
        if type(value) is not int or not 0 <= value < 2**31 or (value == 0 and default != 0):
            raise FormatError(f"{self.architecture}.{name} is {value!r}, expected a positive whole number")
        return value

    def key_or_feed_forward(self, name: str) -> int:
        """A size that is the dense layers' where it has no key of its own; some mixtures have no dense layers."""
        return self.key(name) if f"{self.architecture}.{name}" in self.metadata else self["feed_forward"]

    @property
    def is_sliding(self) -> bool:
        """Whether this layer sees a window of the context only, where that changes its sizes (Gemma 4)."""
        pattern = self.metadata.get(f"{self.architecture}.attention.sliding_window_pattern")
        return (
            isinstance(pattern, list)
            and self.layer is not None
            and bool(pattern[self.layer : self.layer + 1] == [True])
        )

    def head(self, name: str) -> int:
        """Values in a head of keys or values ("key_length", "value_length")."""
        plain = self.key(f"attention.{name}", self.key("embedding_length") // self.key("attention.head_count"))
        return self.key(f"attention.{name}_swa", plain) if self.is_sliding else plain

    @property
    def identity(self) -> tuple[Any, ...]:
        """What a fingerprint holds of the sizes. Adapters carry fingerprints: this may grow, never change."""
        raw = [
            self.metadata.get(f"{self.architecture}.{name}", default)
            for name, default in (
                ("embedding_length", 0),
                ("feed_forward_length", 0),
                ("block_count", 0),
                ("attention.head_count", 0),
                ("attention.head_count_kv", self["heads"]),
                ("attention.key_length", self["head_dim"]),
            )
        ]
        return (self.architecture, self.vocab, *raw)


NAMES: Mapping[str, Callable[[Sizes], int]] = {
    "vocab": lambda s: s.vocab,
    "embedding": lambda s: s.key("embedding_length"),
    "layers": lambda s: s.key("block_count"),
    "context": lambda s: s.key("context_length"),
    "feed_forward": lambda s: s.key("feed_forward_length"),
    "two_feed_forward": lambda s: 2 * s["feed_forward"],
    "heads": lambda s: s.key("attention.head_count"),
    "heads_kv": lambda s: s.key("attention.head_count_kv", s["heads"]),
    "head_dim": lambda s: s.head("key_length"),
    "value_dim": lambda s: s.head("value_length"),
    "q_rows": lambda s: s["heads"] * s["head_dim"],
    "kv_rows": lambda s: s["heads_kv"] * s["head_dim"],
    "v_rows": lambda s: s["heads_kv"] * s["value_dim"],
    "o_columns": lambda s: s["heads"] * s["value_dim"],
    "qkv_rows": lambda s: s["q_rows"] + s["kv_rows"] + s["v_rows"],
    "gated_q_rows": lambda s: 2 * s["q_rows"],
    "experts": lambda s: s.key("expert_count"),
    "expert_feed_forward": lambda s: s.key_or_feed_forward("expert_feed_forward_length"),
    "two_expert_feed_forward": lambda s: 2 * s["expert_feed_forward"],
    "shared_feed_forward": lambda s: s.key_or_feed_forward("expert_shared_feed_forward_length"),
    "per_layer_input": lambda s: s.key("embedding_length_per_layer_input"),
    "all_per_layer_inputs": lambda s: s["layers"] * s["per_layer_input"],
    # Gated delta net (Qwen3-Next and later): keys and values of linear attention
    "key_heads": lambda s: s.key("ssm.group_count"),
    "key_head_dim": lambda s: s.key("ssm.state_size"),
    "value_heads": lambda s: s.key("ssm.time_step_rank"),
    "value_rows": lambda s: s.key("ssm.inner_size"),
    "value_head_dim": lambda s: s["value_rows"] // s["value_heads"],
    "key_rows": lambda s: s["key_heads"] * s["key_head_dim"],
    "conv_rows": lambda s: 2 * s["key_rows"] + s["value_rows"],
    "conv_columns": lambda s: s.key("ssm.conv_kernel"),
    "qkvz_rows": lambda s: s["conv_rows"] + s["value_rows"],
    "two_value_heads": lambda s: 2 * s["value_heads"],
    "two_embedding": lambda s: 2 * s["embedding"],
}
