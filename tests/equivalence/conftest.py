"""Models that transformers made, small enough to build in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import SHARED, TINY_BASE
from tests.converters.folders import byte_level_tokenizer

if TYPE_CHECKING:
    from tests.equivalence.outcomes import Bases

Builder = Callable[..., Path]
REAL_MODELS = {
    "tiny-base": TINY_BASE,
    "tinystories-656k": SHARED / "models" / "tinystories-656k",
    "stories-260k": SHARED / "models" / "stories-260k",
}


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """A trained model's folder by name; skips where it is absent."""

    def find(name: str) -> Path:
        if not (REAL_MODELS[name] / "config.json").is_file():
            pytest.skip(f"{REAL_MODELS[name]} is not there")
        return REAL_MODELS[name]

    return find


@pytest.fixture(scope="session")
def build_llama(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A random Llama model as `save_pretrained` writes it, with a byte-level tokenizer."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    def build(*, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **settings: Any) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        given = {"num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512, **sizes, **settings}
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=1, **given))
        for name, parameter in model.named_parameters():
            scale, mean = (0.2, 1.0) if "norm" in name else (0.1, 0.0)  # norms that are not all one, biases not zero
            torch.nn.init.normal_(parameter, mean=mean, std=scale)
        folder = tmp_path_factory.mktemp("llama")
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        byte_level_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Tiny models by name, each built and converted once for all tests."""
    pytest.importorskip("torch")
    from tests.equivalence.outcomes import Bases

    return Bases(tmp_path_factory.mktemp("bases"))
