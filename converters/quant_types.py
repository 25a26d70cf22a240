"""Quantizations: how many bytes each type takes, and which type each tensor of a file gets. Stdlib only.

A *type* is how one tensor is stored (`Q4_K`: blocks of 256 values in 144 bytes). A *recipe* is what people ask for
(`q4_k_m`): it chooses a type per tensor, exactly as `llama_tensor_get_type` in llama.cpp's `src/llama-quant.cpp` does,
so that the file equals the one `llama-quantize` would have made.

To add a quantization, add its row to `RECIPES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from converters.errors import UnsupportedError


@dataclass(frozen=True)
class BlockType:
    """One `ggml_type` (ggml/include/ggml.h).

    Attributes:
        number: its value in a GGUF file.
        block: values in a block.
        size: bytes in a block.
    """

    name: str
    number: int
    block: int
    size: int

    def row_bytes(self, n_cols: int) -> int:
        return n_cols // self.block * self.size

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor with `shape` in numpy order: the last dimension is the one in blocks."""
        return prod(shape[:-1]) * self.row_bytes(shape[-1]) if shape else self.size


_ROWS = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 40), ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8), ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
)  # fmt: skip
TYPES: Mapping[str, BlockType] = {row[0]: BlockType(*row) for row in _ROWS}
TYPE_BY_NUMBER: Mapping[int, BlockType] = {block_type.number: block_type for block_type in TYPES.values()}

# A row that does not fill a type's blocks takes this type, or F16 where that does not fit (`tensor_type_fallback`).
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

# Substrings that name a tensor's part in the model, first match wins (`tensor_get_category`).
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v_like_qkv"),
    ("attn_kv_b.weight", "attn_v_like_kv_b"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_V_LIKE = ("attn_v", "attn_v_like_qkv", "attn_v_like_kv_b")


@dataclass(frozen=True)
class ModelShape:
    """What a recipe asks about the model beside tensor names."""

    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def is_70b(self) -> bool:
        return self.architecture == "llama" and self.n_layer == 80 and self.n_head != self.n_head_kv


@dataclass
class _State:
    """Counters that run along the tensors in llama.cpp's order."""

    model: ModelShape
    tied: bool
    n_attn_v: int
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, category: str) -> int:
        index = self.seen.get(category, 0)
        self.seen[category] = index + 1
        return index


@dataclass(frozen=True)
class Recipe:
    """A quantization as people name it.

    Attributes:
        file_type: `general.file_type` (`llama_ftype` in include/llama.h).
        default: the type of every 2-D weight that `choose` does not treat specially.
        choose: (category, tensor name, state) to a type name.
    """

    name: str
    file_type: int
    default: str
    choose: Callable[[str, str, _State], str] | None = None


def _more_bits(layer: int, n_layer: int) -> bool:
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def _choose_q4_k_m(category: str, name: str, state: _State) -> str:
    model = state.model
    if category == "output" or (category == "token_embd" and state.tied):
        return "Q8_0" if model.architecture == "falcon" else "Q6_K"
    if category in _V_LIKE:
        more = _more_bits(state.count("attn_v"), state.n_attn_v)
        chosen = "Q6_K" if more else "Q5_K" if model.is_70b else "Q4_K"
        return "Q8_0" if model.n_expert == 8 else chosen
    if category == "attn_k" and model.n_expert == 8:
        return "Q8_0"
    if category == "ffn_down":
        return _ffn_down_q4_k_m(name, state)
    if category == "attn_output" and model.n_expert == 8 and model.architecture != "falcon":
        return "Q5_K"
    return "Q4_K"


def _ffn_down_q4_k_m(name: str, state: _State) -> str:
    layer, n_layer = state.count("ffn_down"), state.model.n_layer
    # Experts are not consecutive in a file: with experts the layer is read from the name.
    if state.model.n_expert > 1 and (found := re.match(r"blk\.(\d+)\.", name)):
        layer = int(found[1])
    if state.model.architecture == "falcon":
        return "Q6_K" if layer < n_layer // 16 else "Q5_K" if _more_bits(layer, n_layer) else "Q4_K"
    return "Q6_K" if _more_bits(layer, n_layer) else "Q4_K"


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", 0, "F32"),
        Recipe("f16", 1, "F16"),
        Recipe("bf16", 32, "BF16"),
        Recipe("q8_0", 7, "Q8_0"),
        Recipe("q4_k_m", 15, "Q4_K", _choose_q4_k_m),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, in any case.

    Raises:
        UnsupportedError: no such recipe; the hint lists those there are.
    """
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise UnsupportedError(f"unknown quantization {name!r}", hint=f"Known: {', '.join(RECIPES)}.")
    return recipe


def choose_types(tensors: Mapping[str, Sequence[int]], recipe: Recipe, model: ModelShape) -> dict[str, BlockType]:
    """The type of each tensor.

    Args:
        tensors: GGUF name to shape in numpy order.
        recipe: a row of `RECIPES`.
        model: what the recipe asks about the model.

    Returns:
        Name to type, in llama.cpp's own order of tensors (see `tensor_order`).
    """
    names = sorted(tensors, key=tensor_order)
    n_attn_v = sum(_category(name) in _V_LIKE for name in names)
    state = _State(model, tied="output.weight" not in tensors, n_attn_v=n_attn_v)
    return {name: TYPES[_choose(name, tensors[name], recipe, state)] for name in names}


def tensor_order(name: str) -> tuple[int, str]:
    """Sort key: tensors outside the layers, then layer by layer (`weight_name_comparer`, src/llama-model-loader.h)."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def _choose(name: str, shape: Sequence[int], recipe: Recipe, state: _State) -> str:
    if not _is_quantizable(name, shape):
        return "F32"
    wanted = recipe.choose(_category(name), name, state) if recipe.choose else recipe.default
    if shape[-1] % TYPES[wanted].block == 0:
        return wanted
    wanted = _FALLBACK.get(wanted, wanted)
    return wanted if shape[-1] % TYPES[wanted].block == 0 else "F16"


def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


def _is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Matrices of weights; vectors, norms and expert routers stay F32 (`tensor_allows_quantization`)."""
    is_weight = len(shape) >= 2 and name.endswith("weight")
    return is_weight and "_norm.weight" not in name and "ffn_gate_inp.weight" not in name
