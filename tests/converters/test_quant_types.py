"""Recipes know more shapes than small models have; overrides are read and checked; what cannot be is said by name.

That types are those of llama-quantize is in tests/equivalence/test_recipes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import UnsupportedError
from converters.quant_types import (
    ALIASES,
    RECIPES,
    TYPES,
    ModelShape,
    Overrides,
    choose_types,
    find_recipe,
    find_type,
    needs_imatrix,
    parse_tensor_types,
    plan_types,
    without_effect,
)


def layers(count: int, rows: int = 256) -> dict[str, tuple[int, ...]]:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.{layer}.{name}.weight": (rows, rows) for layer in range(count) for name in names}
    return {**shapes, "token_embd.weight": (512, rows), "blk.0.attn_norm.weight": (rows,)}


def chosen(shapes: dict[str, tuple[int, ...]], model: ModelShape) -> dict[str, str]:
    return {name: kind.name for name, kind in choose_types(shapes, find_recipe("q4_k_m"), model).items()}


def test_the_70b_shape_gets_more_for_its_values() -> None:
    small = chosen(layers(80), ModelShape("llama", 80, 64, 64))
    large = chosen(layers(80), ModelShape("llama", 80, 64, 8))
    assert small["blk.10.attn_v.weight"] == "Q4_K"
    assert large["blk.10.attn_v.weight"] == "Q5_K"
    assert small["blk.9.attn_v.weight"] == large["blk.9.attn_v.weight"] == "Q6_K"


def test_eight_experts() -> None:
    types = chosen(layers(4), ModelShape("llama", 4, 8, 2, n_expert=8))
    assert types["blk.2.attn_v.weight"] == types["blk.2.attn_k.weight"] == "Q8_0"
    assert types["blk.2.attn_output.weight"] == "Q5_K"


def test_tied_embeddings_are_the_output() -> None:
    shapes = layers(1)
    assert chosen(shapes, ModelShape("llama", 1, 8, 8))["token_embd.weight"] == "Q6_K"
    untied = chosen({**shapes, "output.weight": (512, 256)}, ModelShape("llama", 1, 8, 8))
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_K", "Q6_K")


@pytest.mark.parametrize(("rows", "expected"), [(256, "Q4_K"), (288, "Q5_0"), (300, "F16")])
def test_rows_that_do_not_fill_blocks(rows: int, expected: str) -> None:
    types = chosen(layers(1, rows), ModelShape("llama", 1, 4, 4))
    assert types["blk.0.attn_q.weight"] == expected
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_recipes_are_those_of_llama_quantize() -> None:
    """By the list in its help (QUANT_OPTIONS, tools/quantize/quantize.cpp), without COPY."""
    names = """Q1_0 Q2_0 Q4_0 Q4_1 MXFP4_MOE Q5_0 Q5_1 IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ1_S IQ1_M TQ1_0 TQ2_0 Q2_K Q2_K_S
        IQ3_XXS IQ3_S IQ3_M Q3_K IQ3_XS Q3_K_S Q3_K_M Q3_K_L IQ4_NL IQ4_XS Q4_K Q4_K_S Q4_K_M Q5_K Q5_K_S Q5_K_M Q6_K
        Q8_0 F16 BF16 F32"""
    assert {*RECIPES, *ALIASES} == set(names.lower().split())
    assert len({recipe.file_type for recipe in RECIPES.values()}) == len(RECIPES)


def test_names_in_any_case_and_aliases() -> None:
    assert find_recipe("Q4_K_M") is find_recipe("q4_k") is RECIPES["q4_k_m"]
    with pytest.raises(UnsupportedError, match="unknown quantization 'q4_k_x'") as raised:
        find_recipe("q4_k_x")
    assert "q4_k_m" in raised.value.hint


def test_types_that_can_be_chosen() -> None:
    assert find_type("q6_k") is TYPES["Q6_K"]
    with pytest.raises(UnsupportedError, match="unknown tensor type 'q4_k_m'") as raised:
        find_type("q4_k_m")
    assert "q4_k," in raised.value.hint
    assert "q8_1" not in raised.value.hint
    with pytest.raises(UnsupportedError, match="cannot quantize to Q8_1"):
        find_type("q8_1")


def test_tensor_types_as_people_type_them() -> None:
    assert parse_tensor_types(["ffn_down=q6_k", r"BLK\.[0-3]\.attn_v=Q8_0"]) == (
        ("ffn_down", "Q6_K"),
        (r"blk\.[0-3]\.attn_v", "Q8_0"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "tensor type 'ffn_down': expected NAME=TYPE"),
        ("=q6_k", "tensor type '=q6_k': expected NAME=TYPE"),
        ("ffn_down=", "tensor type 'ffn_down=': expected NAME=TYPE"),
        ("ffn_down=q6", "unknown tensor type 'q6'"),
        ("ffn_down=i8", "llama.cpp cannot quantize to I8"),
        ("ffn_(down=q6_k", "tensor type 'ffn_\\(down': not a regular expression"),
        ("ffn_[[:alpha:]]=q6_k", "POSIX character classes"),
    ],
)
def test_tensor_types_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as raised:
        parse_tensor_types([text])
    assert raised.value.hint


def test_all_problems_of_tensor_types_at_once() -> None:
    with pytest.raises(UnsupportedError) as raised:
        parse_tensor_types(["a=q6_k", "b=q6", "c"])
    assert "'q6'" in raised.value.message
    assert "'c'" in raised.value.message


def test_overrides_check_themselves() -> None:
    for broken in ({"output": "q4"}, {"token_embedding": "q8_k"}, {"tensor_types": (("(", "q4_0"),)}):
        with pytest.raises(UnsupportedError):
            Overrides(**broken)  # type: ignore[arg-type]


def test_overrides_without_effect_are_said() -> None:
    names, overrides = ["blk.0.ffn_down.weight"], Overrides((("ffn_down", "q4_0"), ("ffn_dwon", "q4_0")))
    assert without_effect(overrides, RECIPES["q8_0"], names) == ["no tensor's name has 'ffn_dwon' in it"]
    assert without_effect(overrides, RECIPES["f16"], names) == [
        "tensor types and pure are for recipes that quantize, f16 does not"
    ]
    assert without_effect(Overrides(output="q8_0"), RECIPES["f16"], names) == []


@pytest.mark.parametrize("field", ["output", "token_embedding"])
def test_a_type_chosen_for_one_tensor_has_no_stand_in(field: str) -> None:
    shapes = {**layers(1, 300), "output.weight": (512, 300)}
    name = {"output": "output.weight", "token_embedding": "token_embd.weight"}[field]
    with pytest.raises(UnsupportedError, match=f"{name}: its rows of 300 do not fill Q4_K's blocks of 256"):
        choose_types(shapes, RECIPES["q8_0"], ModelShape("llama", 1, 4, 4), overrides=Overrides(**{field: "q4_k"}))


def test_fallbacks_are_counted() -> None:
    shapes = {**layers(2), **{f"blk.{layer}.ffn_down.weight": (256, 300) for layer in range(2)}}
    shapes["blk.0.attn_q.weight"] = (256, 288)
    plan = plan_types(shapes, RECIPES["q4_k_s"], ModelShape("llama", 2, 4, 4))
    assert plan.notices() == [
        "1 tensor: rows of 288 are not a multiple of 256 (Q4_K), stored as Q5_0",
        "2 tensors: rows of 300 are not a multiple of 256 (Q4_K), stored as F16",
    ]
    assert {item.name for item in plan.fallbacks} == {
        "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.1.ffn_down.weight"
    }  # fmt: skip
    assert plan_types(layers(2), RECIPES["q4_k_m"], ModelShape("llama", 2, 4, 4)).notices() == []


def test_q1_0_has_no_stand_in() -> None:
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_k\.weight: its rows of 288 .* blocks of 128"):
        choose_types({"blk.0.attn_k.weight": (4, 288)}, RECIPES["q1_0"], ModelShape("llama", 1, 4, 4))


def test_what_is_not_quantized_keeps_its_type() -> None:
    shapes = {"blk.0.ffn_norm.weight": (256,), "blk.0.ffn_gate_inp.weight": (8, 256), "blk.0.ffn_up.weight": (8, 256)}
    plan = plan_types(
        shapes, RECIPES["q8_0"], ModelShape("llama", 1, 4, 4), source_types=dict.fromkeys(shapes, TYPES["F16"])
    )
    assert {name: kind.name for name, kind in plan.types.items()} == {
        "blk.0.ffn_norm.weight": "F16", "blk.0.ffn_gate_inp.weight": "F16", "blk.0.ffn_up.weight": "Q8_0"
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_needing_an_imatrix_is_known_by_recipe_and_by_tensor(name: str) -> None:
    recipe = RECIPES[name]
    shapes = {**layers(8), "output.weight": (512, 256)}
    needing = needs_imatrix(choose_types(shapes, recipe, ModelShape("llama", 8, 8, 8)), recipe)
    assert bool(needing) == recipe.needs_imatrix
    assert not {"output.weight", "token_embd.weight"} & set(needing)


def test_embeddings_need_an_imatrix_only_where_llama_cpp_would_abort() -> None:
    types = {"token_embd.weight": TYPES["IQ2_S"], "output.weight": TYPES["IQ2_XS"]}
    assert needs_imatrix(types, RECIPES["q8_0"]) == ["output.weight"]


def test_a_models_shape_from_its_metadata() -> None:
    pairs = {"general.architecture": "llama", "llama.block_count": 4, "llama.attention.head_count": 8}
    assert ModelShape.from_metadata(pairs) == ModelShape("llama", 4, 8, 8)
    pairs |= {"llama.attention.head_count_kv": [0, 2, 2, 2], "llama.expert_count": 8}
    shape = ModelShape.from_metadata(pairs)
    assert shape == ModelShape("llama", 4, 8, (0, 2, 2, 2), 8)
    assert shape.n_gqa == 0
    with pytest.raises(UnsupportedError, match=r"no llama\.block_count"):
        ModelShape.from_metadata({"general.architecture": "llama"})


def test_sizes() -> None:
    """Exact bytes of a plan, which a disk check adds up."""
    assert TYPES["Q4_K"].tensor_bytes((8, 512)) == 8 * 2 * 144
    assert TYPES["MXFP4"].tensor_bytes((4, 2, 64)) == 4 * 2 * 2 * 17


def test_recipes_and_types_are_light() -> None:
    """The command line lists recipes in its help: no numpy for that."""
    folder = Path(__file__).parents[2] / "converters"
    for name in ("quant_types", "block_types", "tensor_kinds", "type_overrides", "model_shape"):
        assert "import numpy" not in (folder / f"{name}.py").read_text()
