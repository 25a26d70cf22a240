"""What choosing types asks about a model beside its tensors, as llama.cpp reads it from a file. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.errors import FormatError, UnsupportedError

# Layers that make a model llama.cpp's LLM_TYPE_70B (`load_arch_hparams`, src/models/*.cpp).
_LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
_70B_SHARES_HEADS = ("llama", "llama-embed")

# Layers that `load_arch_hparams` adds to the file's block_count (src/models/nanbeige.cpp, granite-switch.cpp).
_LAYERS: Mapping[str, Callable[[int, Mapping[str, Any]], int]] = {
    "nanbeige": lambda layers, metadata: layers * _whole(metadata, "nanbeige.num_loops", 1),
    "graniteswitch": lambda layers, metadata: layers + 1,
}


@dataclass(frozen=True)
class ModelShape:
    """What a recipe asks about the model beside tensor names.

    Attributes:
        n_layer: all of them, those for next-token prediction too.
        n_head: query heads; layers that differ: one number a layer.
        n_head_kv: key and value heads, likewise; 0 for a layer without attention.
        n_expert: experts of a layer, 0 for a dense model.
    """

    architecture: str
    n_layer: int
    n_head: int | tuple[int, ...]
    n_head_kv: int | tuple[int, ...]
    n_expert: int = 0

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelShape:
        """From the keys of a GGUF file, as llama.cpp reads them (`load_hparams`, src/llama-model.cpp).

        Raises:
            UnsupportedError: the architecture or the number of layers is missing.
            FormatError: a number of heads or experts is none.
        """
        architecture = metadata.get("general.architecture")
        layers = metadata.get(f"{architecture}.block_count")
        if not isinstance(architecture, str) or not isinstance(layers, int):
            missing = f"{architecture}.block_count" if isinstance(architecture, str) else "general.architecture"
            raise UnsupportedError(f"the file's metadata has no {missing}", hint="It is not a model in GGUF.")
        heads = _per_layer(metadata, f"{architecture}.attention.head_count", 0)
        return cls(
            architecture,
            _LAYERS[architecture](layers, metadata) if architecture in _LAYERS else layers,
            heads,
            _per_layer(metadata, f"{architecture}.attention.head_count_kv", heads),
            _whole(metadata, f"{architecture}.expert_count", 0),
        )

    @property
    def n_gqa(self) -> int:
        """Query heads that share a value head, in the first layer (`n_gqa`, src/llama-hparams.cpp)."""
        heads, shared = _first_of(self.n_head), _first_of(self.n_head_kv)
        return heads // shared if shared else 0

    @property
    def is_70b(self) -> bool:
        if self.n_layer != _LAYERS_OF_70B.get(self.architecture):
            return False
        shares_heads = _first_of(self.n_head) != _first_of(self.n_head_kv)
        return self.architecture not in _70B_SHARES_HEADS or (shares_heads and self.n_expert != 8)


def _per_layer(metadata: Mapping[str, Any], key: str, otherwise: int | tuple[int, ...]) -> int | tuple[int, ...]:
    value = metadata.get(key, otherwise)
    if isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
        return tuple(value)
    return _whole(metadata, key, value)


def _whole(metadata: Mapping[str, Any], key: str, otherwise: Any) -> int:
    value = metadata.get(key, otherwise)
    if not isinstance(value, int):
        raise FormatError(f"{key} is {str(value)[:40]!r}, expected a whole number", hint="Download the file again.")
    return value


def _first_of(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0] if value else 0
