"""Quantizations as people name them, and the type each tensor of a file gets. Stdlib only.

A *type* is how one tensor is stored (`Q4_K`: blocks of 256 values in 144 bytes, see `block_types`). A *recipe* is what
people ask for (`q4_k_m`): it chooses a type per tensor, exactly as `llama_tensor_get_type` in llama.cpp's
src/llama-quant.cpp does, so that the file equals the one `llama-quantize` would have made. Functions in backquotes
without a file are of that source.

To add a quantization, add its row to `RECIPES`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from converters.block_types import PLAIN, TYPE_BY_NUMBER, TYPES, BlockType, find_type
from converters.errors import UnsupportedError
from converters.model_shape import ModelShape
from converters.tensor_kinds import EMBEDDINGS, FEED_FORWARD, OUTPUT, category_of, is_quantizable, tensor_order
from converters.type_overrides import Overrides, parse_tensor_types

__all__ = [
    "RECIPES", "TYPES", "TYPE_BY_NUMBER", "BlockType", "Fallback", "ModelShape", "Overrides", "Recipe", "TypePlan",
    "choose_types", "find_recipe", "find_type", "needs_imatrix", "parse_tensor_types", "plan_types", "tensor_order",
    "without_effect",
]  # fmt: skip

# A row that does not fill a type's blocks takes this type, or F16 where that does not fit (`tensor_type_fallback`).
_FALLBACK: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Never below Q8_0, in every recipe (`llama_tensor_get_type_impl`).
_EIGHT_BIT_PARTS_OF: Mapping[str, tuple[str, ...]] = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
# Three-dimensional matrices that are no experts (`llama_tensor_get_type_impl`): there, names say what is an expert.
_EXPERTS_BY_NAME = ("bailingmoe3",)


@dataclass(frozen=True)
class _Asked:
    """What a rule is asked about: the tensor's place among those of its kind, and the model.

    Attributes:
        layer: its index, from 0.
        n_layer: how many there are.
    """

    layer: int
    n_layer: int
    model: ModelShape
    has_imatrix: bool


Condition = Callable[[_Asked], bool]
Rule = str | Callable[[_Asked], str | None] | None
"""A type name, or what finds one; None is the recipe's default."""


def _when(holds: Condition, then: Rule, otherwise: Rule = None) -> Rule:
    return lambda asked: _resolve(then if holds(asked) else otherwise, asked)


def _resolve(rule: Rule, asked: _Asked) -> str | None:
    return rule(asked) if callable(rule) else rule


def _more_bits(layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third between (`use_more_bits`)."""
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def _picked(asked: _Asked) -> bool:
    return _more_bits(asked.layer, asked.n_layer)


def _first(count: int) -> Condition:
    return lambda asked: asked.layer < count


def _first_part(part: int) -> Condition:
    return lambda asked: asked.layer < asked.n_layer // part


def _middle(asked: _Asked) -> bool:
    return asked.n_layer // 8 <= asked.layer < 7 * asked.n_layer // 8


def _shared_values(asked: _Asked) -> bool:
    return asked.model.n_gqa >= 4


def _shared_values_or_experts(asked: _Asked) -> bool:
    return asked.model.n_gqa >= 4 or asked.model.n_expert >= 4


def _eight_experts(asked: _Asked) -> bool:
    return asked.model.n_expert == 8


def _is_falcon(asked: _Asked) -> bool:
    return asked.model.architecture == "falcon"


def _has_imatrix(asked: _Asked) -> bool:
    return asked.has_imatrix


def _attn_output(eight_experts: Rule = None, dense: Rule = None, falcon: Rule = None) -> Rule:
    return _when(_is_falcon, falcon, _when(_eight_experts, eight_experts, dense))


@dataclass(frozen=True)
class Recipe:
    """A quantization as people name it.

    Attributes:
        file_type: `general.file_type` (`llama_ftype` in include/llama.h).
        default: the type of every weight that nothing below treats specially (`llama_ftype_get_default_type`).
        output: the type of the output matrix, and of token embeddings that are the output too.
        embedding: the type of token embeddings that are not.
        rules: category to type.
        is_low_bit: one and two bits: rules see layers by counting tensors, and the model's size changes nothing.
        is_for_experts: `default` is for experts alone, everything else is Q8_0.
    """

    name: str
    file_type: int
    default: str
    rules: Mapping[str, Rule] = field(default_factory=dict, hash=False)
    output: str = "Q6_K"
    embedding: str | None = None
    is_low_bit: bool = False
    is_for_experts: bool = False

    @property
    def needs_imatrix(self) -> bool:
        """A model of common shape cannot be made without an importance matrix; `needs_imatrix` names the tensors."""
        return self.name in _NEEDS_IMATRIX_WITH or any(
            kind in _NEEDS_IMATRIX for kind in (self.default, *self.rules.values())
        )


def _low_bit(name: str, file_type: int, default: str, better: str, output: str | None = None) -> Recipe:
    """IQ1 and IQ2: `better` is what embeddings, values and the first layers' ffn_down get."""
    rules = {
        "attn_v": _when(_shared_values_or_experts, "Q4_K", better),
        "attn_k": _when(_eight_experts, "Q4_K"),
        "ffn_down": _when(_first_part(8), better),
        "attn_output": _when(_eight_experts, "Q5_K", output),
    }
    return Recipe(name, file_type, default, rules, output="Q5_K", embedding=better, is_low_bit=True)


_IQ4: Mapping[str, Rule] = {
    "attn_v": _when(_shared_values, "Q5_K"),
    "ffn_down": _when(_has_imatrix, None, _when(_first_part(8), "Q5_K")),
    "attn_output": _attn_output(eight_experts="Q5_K"),
}
_GOOD_K = {"attn_v": _when(_picked, "Q6_K"), "ffn_down": _when(_picked, "Q6_K")}

# fmt: off
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32", 0, "F32"),
        Recipe("f16", 1, "F16"),
        Recipe("bf16", 32, "BF16"),
        Recipe("q8_0", 7, "Q8_0", output="Q8_0"),
        Recipe("q6_k", 18, "Q6_K"),
        Recipe("q5_k_m", 17, "Q5_K", _GOOD_K),
        Recipe("q5_k_s", 16, "Q5_K"),
        # With an importance matrix the plain Q4_0 and Q5_0 go wrong in the first layers' ffn_down.
        Recipe("q5_0", 8, "Q5_0", {"ffn_down": _when(_has_imatrix, _when(_first_part(8), "Q5_1"))}),
        Recipe("q5_1", 9, "Q5_1"),
        Recipe(
            "q4_k_m", 15, "Q4_K",
            {
                "attn_v": _when(_picked, "Q6_K"),
                "ffn_down": _when(
                    _is_falcon, _when(_first_part(16), "Q6_K", _when(_picked, "Q5_K")), _when(_picked, "Q6_K")
                ),
                "attn_output": _attn_output(eight_experts="Q5_K"),
            },
        ),
        Recipe(
            "q4_k_s", 14, "Q4_K",
            {
                "attn_v": _when(_first(4), "Q5_K"),
                "ffn_down": _when(_is_falcon, None, _when(_first_part(8), "Q5_K")),
                "attn_output": _attn_output(eight_experts="Q5_K"),
            },
        ),
        Recipe("q4_0", 2, "Q4_0", {"ffn_down": _when(_has_imatrix, _when(_first_part(8), "Q4_1"))}),
        Recipe("q4_1", 3, "Q4_1"),
        Recipe("iq4_xs", 30, "IQ4_XS", _IQ4),
        Recipe("iq4_nl", 25, "IQ4_NL", _IQ4),
        Recipe("mxfp4_moe", 38, "MXFP4", output="Q8_0", is_for_experts=True),
        Recipe(
            "q3_k_l", 13, "Q3_K",
            {
                "attn_v": "Q5_K",
                "ffn_down": _when(_is_falcon, "Q4_K", "Q5_K"),
                "attn_output": _attn_output(dense="Q5_K", falcon="Q4_K"),
            },
        ),
        Recipe(
            "q3_k_m", 12, "Q3_K",
            {
                "attn_v": _when(_first(2), "Q5_K", "Q4_K"),
                "ffn_down": _when(
                    _first_part(16), "Q5_K", _when(_is_falcon, _when(_picked, "Q4_K"), "Q4_K")
                ),
                "attn_output": _attn_output(eight_experts="Q5_K", dense="Q4_K"),
            },
        ),
        Recipe("q3_k_s", 11, "Q3_K", {"attn_output": _attn_output(eight_experts="Q5_K")}),
        Recipe(
            "q2_k", 10, "Q2_K",
            {
                "attn_v": _when(_shared_values, "Q4_K", "Q3_K"),
                "ffn_down": "Q3_K",
                "attn_output": _attn_output(eight_experts="Q5_K", dense="Q3_K"),
            },
        ),
        Recipe(
            "q2_k_s", 21, "Q2_K",
            {"attn_v": _when(_shared_values, "Q4_K"), "ffn_down": _when(_first_part(8), "Q4_K")},
        ),
        Recipe(
            "iq3_m", 27, "IQ3_S",
            {
                "attn_v": "Q4_K",
                "ffn_down": _when(_first_part(8), "Q4_K", _when(_eight_experts, _when(_picked, "Q4_K"))),
                "attn_output": _attn_output(eight_experts="Q5_K", dense="Q4_K"),
            },
        ),
        Recipe(
            "iq3_s", 26, "IQ3_S",
            {"attn_v": _when(_shared_values, "Q4_K"), "attn_output": _attn_output(eight_experts="Q5_K")},
        ),
        Recipe(
            "iq3_xs", 22, "IQ3_S",
            {
                "attn_v": _when(_shared_values, "Q4_K"),
                "attn_k": "IQ3_XXS",
                "attn_q": "IQ3_XXS",
                "ffn_gate": _when(_middle, "IQ3_XXS"),
                "ffn_up": _when(_middle, "IQ3_XXS"),
                "attn_output": _attn_output(eight_experts="Q5_K"),
            },
        ),
        Recipe(
            "iq3_xxs", 23, "IQ3_XXS",
            {
                "attn_v": _when(_shared_values, "Q4_K", _when(_has_imatrix, None, "IQ3_S")),
                "attn_k": "IQ2_S",
                "attn_q": "IQ2_S",
                "ffn_down": _when(_has_imatrix, None, _when(_first_part(8), "Q4_K", "Q3_K")),
                "attn_output": _attn_output(eight_experts="Q5_K", dense="IQ3_S"),
            },
            output="Q5_K", embedding="IQ3_S",
        ),
        _low_bit("iq2_m", 29, "IQ2_S", better="IQ3_S", output="IQ3_S"),
        _low_bit("iq2_s", 28, "IQ2_XS", better="IQ3_S", output="IQ3_S"),
        _low_bit("iq2_xs", 20, "IQ2_XS", better="Q2_K"),
        _low_bit("iq2_xxs", 19, "IQ2_XXS", better="Q2_K"),
        _low_bit("iq1_m", 31, "IQ1_M", better="Q2_K", output="IQ2_XXS"),
        _low_bit("iq1_s", 24, "IQ1_S", better="Q2_K", output="IQ2_XXS"),
        Recipe("tq1_0", 36, "TQ1_0", embedding="Q4_K"),
        Recipe("tq2_0", 37, "TQ2_0", embedding="Q4_K"),
        Recipe("q2_0", 41, "Q2_0", embedding="Q4_K"),
        Recipe("q1_0", 40, "Q1_0"),
    )
}
# fmt: on
ALIASES: Mapping[str, str] = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

# Too few bits to do without an importance matrix (`tensor_requires_imatrix`); Q2_K only in these recipes.
_NEEDS_IMATRIX = frozenset(("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"))
_NEEDS_IMATRIX_WITH: Mapping[str, str] = {"q2_k_s": "Q2_K"}
ABORTS_WITHOUT_IMATRIX = frozenset(("IQ2_XXS", "IQ2_XS", "IQ1_S"))
"""Types whose quantizer ends the process without one, for any tensor (`ggml_quantize_requires_imatrix`, ggml.c)."""


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`, in any case.

    Raises:
        UnsupportedError: no such recipe; the hint lists those there are.
    """
    lower = name.lower()
    recipe = RECIPES.get(ALIASES.get(lower, lower))
    if recipe is None:
        raise UnsupportedError(f"unknown quantization {name!r}", hint=f"Known: {', '.join(RECIPES)}.")
    return recipe


def without_effect(overrides: Overrides, recipe: Recipe, names: Iterable[str]) -> list[str]:
    """What of `overrides` changes nothing, in words: llama-quantize is silent about it, a caller should not be."""
    if recipe.default in PLAIN and (overrides.tensor_types or overrides.pure):
        return [f"tensor types and pure are for recipes that quantize, {recipe.name} does not"]
    return [f"no tensor's name has {pattern!r} in it" for pattern in overrides.unmatched(names)]


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not fill the blocks of the type it should have."""

    name: str
    n_cols: int
    wanted: BlockType
    stored: BlockType


@dataclass(frozen=True)
class TypePlan:
    """The type of each tensor, in llama.cpp's own order of tensors, and which are not what the recipe wants."""

    types: Mapping[str, BlockType]
    fallbacks: tuple[Fallback, ...]

    def notices(self) -> list[str]:
        """A line for each kind: "3 tensors: rows of 300 are not a multiple of 256 (Q4_K), stored as F16"."""
        kinds = Counter((item.n_cols, item.wanted, item.stored) for item in self.fallbacks)
        return [
            f"{count} tensor{'s' if count > 1 else ''}: rows of {n_cols} are not a multiple of {wanted.block}"
            f" ({wanted.name}), stored as {stored.name}"
            for (n_cols, wanted, stored), count in kinds.items()
        ]


def choose_types(
    tensors: Mapping[str, Sequence[int]],
    recipe: Recipe,
    model: ModelShape,
    *,
    overrides: Overrides | None = None,
    has_imatrix: bool = False,
) -> dict[str, BlockType]:
    """The types of `plan_types` alone."""
    return dict(plan_types(tensors, recipe, model, overrides=overrides, has_imatrix=has_imatrix).types)


def plan_types(
    tensors: Mapping[str, Sequence[int]],
    recipe: Recipe,
    model: ModelShape,
    *,
    overrides: Overrides | None = None,
    has_imatrix: bool = False,
    source_types: Mapping[str, BlockType] | None = None,
) -> TypePlan:
    """The type of each tensor, and the fallbacks.

    Args:
        tensors: GGUF name to shape in numpy order.
        recipe: a row of `RECIPES`.
        model: what the recipe asks about the model.
        overrides: types chosen by hand.
        has_imatrix: there is an importance matrix, whatever is in it.
        source_types: what tensors are now, where it is not F32: vectors, norms and the like keep it.

    Raises:
        UnsupportedError: rows that fill the blocks of no type that may stand in, or an expert without a layer.
    """
    names = sorted(tensors, key=tensor_order)
    walk = _Walk(recipe, model, overrides or Overrides(), has_imatrix, names)
    kept = source_types or {}
    types = {name: walk.choose(name, tensors[name], kept.get(name, TYPES["F32"])) for name in names}
    return TypePlan(types, tuple(walk.fallbacks))


def needs_imatrix(types: Mapping[str, BlockType], recipe: Recipe) -> list[str]:
    """Tensors that cannot be made without an importance matrix that has them (`tensor_requires_imatrix`).

    Embeddings and the output can, except in types whose quantizer would end the process.
    """
    needing = {*_NEEDS_IMATRIX, _NEEDS_IMATRIX_WITH.get(recipe.name)}
    free = (*EMBEDDINGS, OUTPUT)
    return [name for name, kind in types.items() if kind.name in (ABORTS_WITHOUT_IMATRIX if name in free else needing)]


class _Walk:
    """Tensors are asked for in llama.cpp's order: rules count those of a kind (`quantize_state_impl`)."""

    def __init__(
        self, recipe: Recipe, model: ModelShape, overrides: Overrides, has_imatrix: bool, names: Sequence[str]
    ) -> None:
        self.recipe, self.model, self.overrides, self.has_imatrix = recipe, model, overrides, has_imatrix
        self.is_tied = OUTPUT not in names
        self.n_attn_v = sum(category_of(name) == "attn_v" for name in names)
        self.seen: Counter[str] = Counter()
        self.fallbacks: list[Fallback] = []

    def choose(self, name: str, shape: Sequence[int], source: BlockType) -> BlockType:
        """`llama_tensor_get_type`."""
        if not is_quantizable(name, shape, self.model.architecture):
            return source
        category, by_hand = category_of(name), self.overrides.matching(name)
        # per_layer_token_embd is a table of its own: by name it can have a type of its own.
        is_named = name == "per_layer_token_embd.weight" and by_hand is not None
        if category == "token_embd" and self.overrides.token_embedding and not is_named:
            return _filled(name, shape, self.overrides.token_embedding)
        if category == "output" and self.overrides.output:
            return _filled(name, shape, self.overrides.output)
        if self.recipe.default in PLAIN:
            return TYPES[self.recipe.default]
        if by_hand is None:
            by_hand = self.recipe.default if self.overrides.pure else self.recommended(category, name, shape)
        return self.fitting(name, shape[-1], TYPES[by_hand])

    def recommended(self, category: str, name: str, shape: Sequence[int]) -> str:
        """`llama_tensor_get_type_impl`."""
        recipe, model = self.recipe, self.model
        if any(part in name for part in _EIGHT_BIT_PARTS_OF.get(model.architecture, ())):
            return "Q8_0"
        if category == "output" or (category == "token_embd" and self.is_tied):
            return find_type(self.overrides.output).name if self.overrides.output else self.output_type(shape[-1])
        if recipe.is_for_experts:
            by_name = model.architecture in _EXPERTS_BY_NAME
            is_expert = len(shape) >= 3 and shape[-3] > 1 and (category in FEED_FORWARD or not by_name)
            return recipe.default if is_expert else "Q8_0"
        if category == "token_embd":
            return recipe.embedding or recipe.default
        asked = _Asked(*self.place(category, name), model, self.has_imatrix)
        chosen = _resolve(recipe.rules.get(category), asked) or recipe.default
        return chosen if recipe.is_low_bit else _with_more_for_large(chosen, category, model)

    def output_type(self, n_cols: int) -> str:
        fills = n_cols % TYPES[self.recipe.default].block == 0
        return self.recipe.output if fills and self.model.architecture != "falcon" else "Q8_0"

    def place(self, category: str, name: str) -> tuple[int, int]:
        """(layer, how many layers there are) for a rule."""
        layer = self.seen[category]
        self.seen[category] += 1
        if category == "attn_v":
            return layer, self.n_attn_v
        # Experts are not consecutive in a file: with experts the layer is read from the name.
        if category in FEED_FORWARD and self.model.n_expert > 1 and not self.recipe.is_low_bit:
            found = re.match(r"blk\.(\d+)", name)
            if found is None or int(found[1]) >= self.model.n_layer:
                raise UnsupportedError(
                    f"{name}: is in none of the model's {self.model.n_layer} layers",
                    hint="Does the model's block_count count all its layers, those for next-token prediction too?",
                )
            layer = int(found[1])
        return layer, self.model.n_layer

    def fitting(self, name: str, n_cols: int, wanted: BlockType) -> BlockType:
        """`tensor_type_fallback`."""
        if n_cols % wanted.block == 0:
            return wanted
        if wanted.block > 32 and wanted.name not in _FALLBACK:
            raise UnsupportedError(
                f"{name}: its rows of {n_cols} do not fill blocks of {wanted.block}, and nothing stands in for"
                f" {wanted.name}",
                hint="Choose another quantization for it.",
            )
        stored = TYPES[_FALLBACK.get(wanted.name, wanted.name)]
        stored = stored if n_cols % stored.block == 0 else TYPES["F16"]
        self.fallbacks.append(Fallback(name, n_cols, wanted, stored))
        return stored


def _with_more_for_large(chosen: str, category: str, model: ModelShape) -> str:
    """Values and keys are small beside everything else in these models, so more bits for them cost little."""
    if category in ("attn_v", "attn_k") and model.n_expert == 8:
        return "Q8_0"
    if category == "attn_v" and model.is_70b and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def _filled(name: str, shape: Sequence[int], kind: str) -> BlockType:
    """A type chosen by hand for one tensor: no other stands in for it."""
    found = find_type(kind)
    if shape[-1] % found.block:
        raise UnsupportedError(
            f"{name}: its rows of {shape[-1]} do not fill {found.name}'s blocks of {found.block}",
            hint="Choose a type with smaller blocks for it, like q8_0, or f16.",
        )
    return found
