"""HF and llama.cpp compute the same logits from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.architectures import llama
from converters.base import convert_base
from tests.converters.folders import CONFIG, make_model, safetensors_bytes, weights
from tests.equivalence import llamacpp
from tests.equivalence.conftest import REAL_MODELS, Builder
from tests.equivalence.tiny_models import LLAMA3, some_ids

pytestmark = pytest.mark.train

# Two float32 programs that add in another order; measured 6e-6 to 5e-5 over these models.
TOLERANCE = 1e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "sharded": {"max_shard_size": "100KB"},
    "bf16": {"dtype": "bfloat16"},
    "f16": {"dtype": "float16"},
    "head_dim": {"head_dim": 32},
    "no gqa": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


def difference(folder: Path, out: Path, count: int = 200) -> float:
    """The largest difference of a logit; the file is converted to F32 first."""
    from tests.equivalence.hf_logits import hf_logits

    ids = some_ids(folder, count)
    convert_base(folder, out, quant="f32", force=True)
    expected = hf_logits(folder, ids)
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    return float(np.abs(llamacpp.logits(out, ids) - expected).max())


@pytest.mark.parametrize("name", REAL_MODELS)
def test_trained_models(name: str, real_model: Callable[[str], Path], tmp_path: Path) -> None:
    assert difference(real_model(name), tmp_path / "base.gguf") < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_the_family(variant: str, build_llama: Builder, tmp_path: Path) -> None:
    folder = build_llama(**VARIANTS[variant])
    assert len(list(folder.glob("*.safetensors"))) > 1 or variant != "sharded"
    assert difference(folder, tmp_path / "base.gguf") < TOLERANCE


@pytest.mark.parametrize("copied", [True, False])
def test_an_output_beside_tied_embeddings(copied: bool, tmp_path: Path) -> None:
    """transformers ties what is a copy, and only that."""
    pytest.importorskip("torch")
    arrays = weights({**CONFIG, "tie_word_embeddings": copied})
    if copied:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays))
    assert difference(folder, tmp_path / "base.gguf", count=100) < TOLERANCE


@pytest.mark.parametrize("variant", ["untied", "biases"])
def test_rows_in_the_wrong_order_are_seen(
    variant: str, build_llama: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "interleaved_rows", lambda heads, head_dim: np.arange(heads * head_dim))
    assert difference(build_llama(**VARIANTS[variant]), tmp_path / "base.gguf") > 100 * TOLERANCE


def test_missing_rope_factors_are_seen(build_llama: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = build_llama(**VARIANTS["llama3 rope"]), tmp_path / "base.gguf"
    assert difference(folder, out) < TOLERANCE
    monkeypatch.setitem(llama.FAMILY.__dict__, "computed", lambda config: {})
    assert difference(folder, out) > TOLERANCE


def test_mistral_is_llama_under_another_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MistralConfig, MistralForCausalLM

    from tests.converters.folders import byte_level_tokenizer

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=512, sliding_window=None, bos_token_id=0, eos_token_id=1,
        initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path / "mistral"
    MistralForCausalLM(config).save_pretrained(folder)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    assert difference(folder, tmp_path / "base.gguf") < TOLERANCE
