"""Norms, biases and whole modules that were trained beside an adapter, merged into the bases of all families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from converters import row_edits
from converters.adapter import convert_adapter
from converters.errors import UnsupportedAdapterError
from tests.equivalence.effects import TOLERANCE, Adapted, adapt, mostly_slow
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case, nudged
from tests.equivalence.tiny_models import TINY, build

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

SEEN = 20 * TOLERANCE
AS_OTHERS = ("llama-2", "llama-3", "mistral", "qwen2-tied", "phi-3.5", "phi-4-mini", "exaone-4", "command-r-plus")
# PEFT cannot wrap norms in a list of modules
HEADWISE = "stablelm-12b"
WITH_NORMS = [name for name in TINY if name not in (*AS_OTHERS, HEADWISE)]
QUICK = ("gemma-2", "gpt2", "falcon-40b", "olmo2", "qwen3", "gemma-4", "gemma-4-moe", "stablelm")
LINEAR: Mapping[str, Any] = {"r": 2, "target_modules": "all-linear"}
# Biases that llama.cpp adds although the base has none, and modules where it adds none
BIASES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("q_proj", "o_proj", "gate_proj", "down_proj"), ()),
    "ministral-3": (("q_proj", "o_proj", "gate_proj", "down_proj"), ()),
    "granite": (("q_proj", "o_proj", "gate_proj", "down_proj"), ()),
    "mixtral": (("q_proj", "o_proj"), ()),
    "qwen2": (("q_proj",), ("o_proj", "up_proj")),
    "qwen3": (("k_proj",), ("o_proj", "up_proj")),
    "smollm3": (("q_proj", "k_proj"), ("o_proj", "gate_proj")),
    "ernie-4.5": (("q_proj", "v_proj"), ("o_proj", "down_proj")),
    "stablelm": (("v_proj",), ("o_proj",)),
    "glm-4": (("k_proj",), ("o_proj", "gate_up_proj")),
    "gemma-2": ((), ("q_proj", "down_proj")),
    "phi-3": ((), ("qkv_proj",)),
    "falcon": ((), ("query_key_value",)),
    "qwen3.5": ((), ("in_proj_z", "o_proj")),
}
MODULES: Mapping[str, tuple[str, ...]] = {
    "llama": ("q_proj", "down_proj"),
    "qwen2": ("k_proj",),
    "phi-3": ("qkv_proj", "gate_up_proj"),
    "glm-4": ("gate_up_proj",),
    "gpt2": ("c_attn", "c_fc"),
    "gpt-neox": ("query_key_value",),
    "falcon-40b": ("query_key_value",),
    "qwen3.5": ("linear_attn",),
    "qwen3-next": ("linear_attn", "self_attn"),
    "mixtral": ("experts",),
    "qwen2-moe": ("mlp",),
    "granite-moe": ("block_sparse_moe",),
    "gpt-oss": ("mlp",),
    "gemma-4-moe": ("experts", "router"),
    "gemma-4": ("per_layer_projection", "self_attn"),
    HEADWISE: ("q_layernorm", "k_layernorm"),
}


def norms(name: str, folder: Path) -> list[str]:
    """Short names of a model's norms that have weights."""
    found = set()
    for path, module in load_model(build(name, folder)).named_modules():
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False)):
            found.add(path.rpartition(".")[2])
    return sorted(found)


def trained(name: str, folder: Path, config: str = "LoraConfig", **settings: Any) -> Adapted:
    turned = {"fan_in_fan_out": True} if name == "gpt2" and config == "LoraConfig" else {}
    return adapt(Case(config, {**turned, **settings}, name, nudged(0.2)), folder)


@pytest.mark.parametrize("name", mostly_slow(WITH_NORMS, QUICK))
def test_norms_beside_an_adapter(name: str, tmp_path: Path) -> None:
    adapted = trained(name, tmp_path, **LINEAR, modules_to_save=norms(name, tmp_path / "seen"))
    assert adapted.merged_error() < TOLERANCE


# PEFT gives up on norms whose names begin with another's
@pytest.mark.parametrize("name", mostly_slow([name for name in WITH_NORMS if name != "gemma-4-moe"], QUICK[:3]))
def test_tuned_norms(name: str, tmp_path: Path) -> None:
    adapted = trained(name, tmp_path, "LNTuningConfig", target_modules=norms(name, tmp_path / "seen"))
    assert adapted.merged_error() < TOLERANCE
    with pytest.raises(UnsupportedAdapterError, match="it was trained as a whole, which has no place"):
        convert_adapter(adapted.folder, adapted.plain, tmp_path / "adapter.gguf")


def test_norms_without_their_one_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Gemma adds 1 to its norms, and the file holds the sum."""
    adapted = trained("gemma-2", tmp_path, "LNTuningConfig", target_modules=["input_layernorm"])
    monkeypatch.setattr(row_edits, "_ordered", lambda values, slot: values[slot.source][None])
    assert adapted.merged_error() > SEEN


@pytest.mark.parametrize("name", ["qwen2", "llama-biases", "gpt2", "gpt-neox", "phi-2", "starcoder2", "gpt-oss"])
def test_all_biases(name: str, tmp_path: Path) -> None:
    assert trained(name, tmp_path, **LINEAR, bias="all").merged_error() < TOLERANCE


@pytest.mark.parametrize("name", BIASES)
def test_biases_that_the_base_has_not(name: str, tmp_path: Path) -> None:
    """What llama.cpp loads and adds is merged; what it loads and leaves out, or cannot load, is refused."""
    added, refused = BIASES[name]
    if added:
        settings = {"r": 2, "target_modules": list(added), "lora_bias": True}
        assert trained(name, tmp_path / "added", **settings).merged_error() < TOLERANCE
    if refused:
        case = Case("LoraConfig", {"r": 2, "target_modules": list(refused), "lora_bias": True}, name, nudged(0.5))
        adapted = adapt(case, tmp_path / "refused")
        with pytest.raises(UnsupportedAdapterError, match=rf"{refused[0]}\.bias: llama.cpp's \S+ adds no bias there"):
            adapted.merged_error()
        with pytest.raises(UnsupportedAdapterError, match=r"\.bias: a bias, which has no place in a GGUF adapter"):
            convert_adapter(adapted.folder, adapted.plain, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("name", MODULES)
def test_whole_modules(name: str, tmp_path: Path) -> None:
    """Rows and columns in another order, transposed, split, stacked."""
    others = {"gpt2": "c_proj", "gpt-neox": "dense", "falcon-40b": "dense"}
    settings = {"r": 2, "target_modules": [others.get(name, "v_proj")], "modules_to_save": list(MODULES[name])}
    if name in ("phi-3", "qwen3-next", "gemma-4"):
        settings["target_modules"] = ["down_proj" if name == "gemma-4" else "o_proj"]
    if name == "qwen3-next":
        settings["target_modules"] = ["shared_expert_gate"]
    adapted = trained(name, tmp_path, **settings)
    assert adapted.merged_error() < TOLERANCE
    assert adapted.merged_error(adapted.base) < TOLERANCE
