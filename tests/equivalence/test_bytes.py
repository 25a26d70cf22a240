"""Our quantized files hold the bytes that llama-quantize makes, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import quant_types
from converters.base import convert_base
from converters.fingerprint import fingerprint
from converters.quant_types import RECIPES
from converters.reader import GGUFHeader, read_header
from tests.equivalence import llamacpp
from tests.equivalence.conftest import Builder

pytestmark = pytest.mark.train

# Shapes that take each branch of the Q4_K_M recipe: rows of 256 and not, tied and not, few and many layers.
SHAPES: dict[str, dict[str, Any]] = {
    "untied, 256-blocks, 9 layers": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9},
    "tied, 256-blocks, 17 layers": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 17,
        "tie_word_embeddings": True,
    },
    "rows of 320 and 352": {"hidden_size": 320, "intermediate_size": 352, "num_attention_heads": 10, "head_dim": 32},
    "rows that fit no block": {"hidden_size": 256, "intermediate_size": 300, "num_attention_heads": 8},
    "one layer": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
}


def tensor_bytes(header: GGUFHeader) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = header.path.read_bytes()
    return {
        name: (tensor.type_name, tensor.shape, data[tensor.offset : tensor.offset + tensor.size_bytes])
        for name, tensor in header.tensors.items()
    }


def both(folder: Path, quant: str, tmp_path: Path) -> tuple[GGUFHeader, GGUFHeader]:
    """(our direct conversion, llama-quantize of our F32 file)"""
    ours, full, theirs = tmp_path / "ours.gguf", tmp_path / "f32.gguf", tmp_path / "theirs.gguf"
    convert_base(folder, full, quant="f32", force=True)
    convert_base(folder, ours, quant=quant, force=True)
    llamacpp.quantize(full, theirs, RECIPES[quant].file_type)
    return read_header(ours), read_header(theirs)


# One of a kind: test_recipes.py compares every recipe, on more models.
@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q5_0", "q4_k_m", "q3_k_l", "q2_k", "iq4_xs", "mxfp4_moe"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_llama_quantize(shape: str, quant: str, build_llama: Builder, tmp_path: Path) -> None:
    folder = build_llama(**{"num_key_value_heads": 2, "num_attention_heads": 4, **SHAPES[shape]})
    ours, theirs = both(folder, quant, tmp_path)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert list(ours.tensors) == list(theirs.tensors), "not in the same order"
    assert dict(ours.metadata) == dict(theirs.metadata)


@pytest.mark.parametrize("name", ["tiny-base", "tinystories-656k", "stories-260k"])
@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_equal_on_trained_models(name: str, quant: str, real_model: Callable[[str], Path], tmp_path: Path) -> None:
    ours, theirs = both(real_model(name), quant, tmp_path)
    assert tensor_bytes(ours) == tensor_bytes(theirs)
    assert fingerprint(ours.path) == fingerprint(theirs.path) == fingerprint(real_model(name))


def test_a_recipe_that_differs_is_seen(build_llama: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_llama(**SHAPES["untied, 256-blocks, 9 layers"])
    monkeypatch.setattr(quant_types, "_more_bits", lambda layer, n_layer: layer % 2 == 0)
    ours, theirs = both(folder, "q4_k_m", tmp_path)
    assert tensor_bytes(ours) != tensor_bytes(theirs)


def test_both_kinds_of_blocks_occur(build_llama: Builder, tmp_path: Path) -> None:
    report = convert_base(build_llama(**SHAPES["tied, 256-blocks, 17 layers"]), tmp_path / "base.gguf", quant="q4_k_m")
    assert report.types["Q4_K"] > 50
    assert report.types["Q6_K"] > 10
