"""PEFT in torch and llama.cpp with the converted adapter change the logits alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from converters.adapter import AdapterOptions, convert_adapter
from converters.architectures import Place, llama
from converters.base import convert_base
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.merge import Merged, merge
from converters.methods import lora
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.conftest import Builder
from tests.equivalence.tiny_models import some_ids

pytestmark = [
    pytest.mark.train,
    # PEFT's own remarks: it calls a deprecated method of transformers, and warns of the cases that are refused here.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 6 LoRA tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

# Relative error of the change in logits. F16 adapters measure 4e-4 to 6e-4, F32 ones 1e-6 to 2e-5.
TOLERANCE = 0.005
F32_TOLERANCE = 1e-4
ALL_LINEAR = "all-linear"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"k_proj": 64, "^model.layers.0.mlp.up_proj": 3},
    },
    "rslora with patterns": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"v_proj": 16}},
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*\.(q_proj|down_proj)"},
    "embeddings": {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}


@dataclass(frozen=True)
class Trained:
    """A base, a PEFT folder on it, and what both compute."""

    base: Path
    base_gguf: Path
    folder: Path
    ids: list[int]
    effect: npt.NDArray[np.float32]

    def error(self, out: Path, **options: Any) -> float:
        convert_adapter(self.folder, self.base, out, force=True, **options)
        plain, adapted = llamacpp.logits(self.base_gguf, self.ids), llamacpp.logits(self.base_gguf, self.ids, out)
        return float(np.linalg.norm(adapted - plain - self.effect) / np.linalg.norm(self.effect))


Train = Callable[..., Trained]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Give a base a LoRA of random, non-zero weights and save it as PEFT does."""

    def make(base: Path, settings: Mapping[str, Any]) -> Trained:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ALL_LINEAR, **settings})
        adapted = get_peft_model(model, config).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folder, gguf = tmp_path / "adapter", tmp_path / "base.gguf"
        adapted.save_pretrained(folder)
        convert_base(base, gguf, quant="f32", force=True)
        ids = some_ids(base, 60)
        with torch.no_grad():
            logits = adapted(torch.tensor([ids])).logits[0].numpy()
        from tests.equivalence.hf_logits import hf_logits

        effect = logits - hf_logits(base, ids)
        assert np.abs(effect).max() > 0.3, "an adapter that does nothing would prove nothing"
        return Trained(base, gguf, folder, ids, effect)

    return make


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_change_in_logits_is_equal(settings: str, build_llama: Builder, train: Train, tmp_path: Path) -> None:
    trained = train(build_llama(tie_word_embeddings=False), SETTINGS[settings])
    assert trained.error(tmp_path / "adapter.gguf") < TOLERANCE
    assert trained.error(tmp_path / "adapter.gguf", options=AdapterOptions(dtype="f32")) < F32_TOLERANCE


def test_bf16_adapters_are_coarser_but_right(build_llama: Builder, train: Train, tmp_path: Path) -> None:
    trained = train(build_llama(), SETTINGS["plain"])
    assert (
        F32_TOLERANCE < trained.error(tmp_path / "adapter.gguf", options=AdapterOptions(dtype="bf16")) < 4 * TOLERANCE
    )


@pytest.mark.parametrize("name", ["tiny-base", "tinystories-656k", "stories-260k"])
def test_adapters_on_trained_models(name: str, real_model: Callable[[str], Path], train: Train, tmp_path: Path) -> None:
    assert train(real_model(name), SETTINGS["patterns"]).error(tmp_path / "adapter.gguf") < TOLERANCE


def test_a_gguf_base_of_any_quantization_gives_the_same_file(
    build_llama: Builder, train: Train, tmp_path: Path
) -> None:
    trained = train(build_llama(tie_word_embeddings=False), SETTINGS["patterns"])
    quantized, outs = tmp_path / "q8.gguf", [tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "c.gguf"]
    convert_base(trained.base, quantized, quant="q8_0")
    for base, out in zip((trained.base, trained.base_gguf, quantized), outs, strict=True):
        convert_adapter(trained.folder, base, out)
    assert len({out.read_bytes() for out in outs}) == 1


def test_a_wrong_scale_is_seen(
    build_llama: Builder, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(build_llama(), SETTINGS["rslora"])
    monkeypatch.setattr(lora, "scale_of", lambda module: module.config["lora_alpha"] / module.config["r"])
    assert trained.error(tmp_path / "adapter.gguf") > 20 * TOLERANCE


def test_rows_in_the_wrong_order_are_seen(
    build_llama: Builder, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(build_llama(), {**SETTINGS["plain"], "target_modules": ["q_proj", "k_proj"]})
    assert trained.error(tmp_path / "adapter.gguf") < TOLERANCE
    monkeypatch.setattr(llama, "interleaved_rows", lambda heads, head_dim: np.arange(heads * head_dim))
    assert trained.error(tmp_path / "adapter.gguf") > 20 * TOLERANCE


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_bias": True}, "q_proj.bias: a bias, which has no place"),
        ({"bias": "all"}, "k_proj.bias: it was trained as a whole"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: it was trained as a whole"),
        ({"modules_to_save": ["input_layernorm"]}, "input_layernorm.weight: it was trained as a whole"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.weight: the base ties its embeddings"),
    ],
)
def test_what_peft_saves_and_gguf_cannot_hold_is_refused(
    settings: dict[str, Any], reason: str, build_llama: Builder, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = build_llama(tie_word_embeddings=True, attention_bias="bias" in settings)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((UnsupportedAdapterError, BaseMismatchError)) as caught:
        convert_adapter(tmp_path / "adapter", base, tmp_path / "adapter.gguf")
    assert reason in caught.value.message
    assert not (tmp_path / "adapter.gguf").exists()


FAMILIES_WITH_LORA = (
    "qwen2", "qwen2-moe", "qwen3", "qwen3.5", "gemma-2", "gemma-3", "gemma-4-dense", "phi-2", "phi-3", "smollm3",
    "granite", "olmo2", "stablelm", "gpt2", "gpt-neox", "falcon-40b", "starcoder2", "command-r", "glm-4",
    "exaone-4-1.2b", "ernie-4.5", "gpt-oss",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES_WITH_LORA)
def test_every_linear_layer_of_a_family(name: str, tmp_path: Path) -> None:
    """Rows in another order, columns in another order, matrices stored transposed or fused: A and B follow."""
    assert delta_error(name, tmp_path) < TOLERANCE


def test_an_adapter_whose_columns_stay_as_they_were_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "column_order", lambda self, sizes: None)
    assert delta_error("qwen3.5", tmp_path) > 10 * TOLERANCE


def test_what_the_graph_never_adapts_is_refused(tmp_path: Path) -> None:
    """Gemma 4's projection of per-layer inputs: llama.cpp would load the adapter and leave it out there."""
    with pytest.raises(
        UnsupportedAdapterError, match=r"per_layer_model_projection.weight: llama.cpp's gemma4 never applies"
    ):
        delta_error("gemma-4", tmp_path)


def delta_error(name: str, tmp_path: Path, **targets: Any) -> float:
    """How far llama.cpp's change of the logits is from PEFT's, relative to it, with LoRA on every linear layer.

    Args:
        targets: settings of PEFT's that say where else it is.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.equivalence.hf_logits import load_model

    folder = tiny_models.build(name, tmp_path / "model")
    model = load_model(folder)
    ids = some_ids(folder, 60)

    def hf() -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    plain = hf()
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "init_lora_weights": False,
        "fan_in_fan_out": name == "gpt2",
    }  # whose layers are stored transposed
    settings |= {"target_modules": ALL_LINEAR, **targets}
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config).eval()
    expected = hf() - plain
    assert np.abs(expected).max() > 0.1
    model.save_pretrained(tmp_path / "lora")
    base = convert_base(folder, tmp_path / "base.gguf", quant="f32").path
    adapter = convert_adapter(tmp_path / "lora", base, tmp_path / "lora.gguf", options=AdapterOptions(dtype="f32")).path
    change = llamacpp.logits(base, ids, adapter) - llamacpp.logits(base, ids)
    return float(np.linalg.norm(change - expected) / np.linalg.norm(expected))


USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "excluded": ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
    "excluded in a layer": ("llama", {"target_modules": USUAL, "exclude_modules": r".*layers\.1\..*_proj"}),
    "an expression": ("llama", {"target_modules": r".*\.(0|2)\..*(q|down)_proj"}),
    "experts that are no modules": ("mixtral", {"target_modules": USUAL}),
    "experts of the usual names": ("qwen3-moe", {"target_modules": USUAL}),
    "two kinds of layers": ("qwen3-next", {"target_modules": ["q_proj", "in_proj_qkvz", "out_proj"]}),
    "layers of one kind": (
        "qwen3-next",
        {"target_modules": ["q_proj", "in_proj_qkvz"], "layers_to_transform": [0, 1]},
    ),
}


@pytest.mark.parametrize("what", TARGETS)
def test_modules_that_were_left_out_are_not_missing(what: str, tmp_path: Path) -> None:
    name, targets = TARGETS[what]
    assert delta_error(name, tmp_path, **targets) < TOLERANCE
    report = convert_adapter(tmp_path / "lora", tmp_path / "base.gguf", tmp_path / "again.gguf")
    assert all("no tensor belongs to it; the model" in notice for notice in report.notices)
    assert bool(report.notices) == (what == "experts that are no modules")
    assert merge(tmp_path / "base.gguf", [Merged(tmp_path / "lora")], tmp_path / "merged.gguf").n_tensors


@pytest.mark.parametrize("what", TARGETS)
def test_a_layer_that_is_missing_is_seen(what: str, tmp_path: Path) -> None:
    name, targets = TARGETS[what]
    delta_error(name, tmp_path, **targets)
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(sorted(tensors))).rpartition(".lora_")[0]
    save_file({name: values for name, values in tensors.items() if not name.startswith(first)}, weights)
    with pytest.raises(UnsupportedAdapterError, match="no tensor belongs to it"):
        convert_adapter(tmp_path / "lora", tmp_path / "base.gguf", tmp_path / "again.gguf")
