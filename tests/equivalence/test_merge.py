"""PEFT in torch and a merged base in llama.cpp change the logits alike, for whatever PEFT trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.base import convert_base
from converters.errors import UnsupportedAdapterError, UnsupportedError
from converters.imatrix import Importance, ImportanceMatrix
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from converters.reader import read_header
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case, nudged
from tests.equivalence.tiny_models import some_ids

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

TOLERANCE = 0.005  # relative error of the change in logits; measured 1e-6 to 4e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8}

# What is saved beside a method, or only there: a GGUF adapter cannot hold it.
BESIDE: Mapping[str, Case] = {
    "lora with a bias on B": Case("LoraConfig", {**LORA, "lora_bias": True}, model="llama-biases"),
    "lora with a bias on B of a base without": Case("LoraConfig", {**LORA, "lora_bias": True}),
    "trained biases of the layers": Case("LoraConfig", {**LORA, "bias": "lora_only"}, model="llama-biases"),
    "all trained biases": Case("LoraConfig", {**LORA, "bias": "all", "target_modules": ["q_proj"]}, model="qwen2"),
    "trained norms": Case(
        "LoraConfig", {**LORA, "modules_to_save": ["input_layernorm", "norm"]}, model="llama", randomize=nudged(0.3)
    ),
    "trained norms that are stored less one": Case(
        "LoraConfig", {**LORA, "modules_to_save": ["input_layernorm"]}, model="gemma-2", randomize=nudged(0.3)
    ),
    "a trained output": Case("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}, randomize=nudged(0.1)),
    "trained embeddings": Case("LoraConfig", {**LORA, "modules_to_save": ["embed_tokens"]}, randomize=nudged(0.1)),
    "a trained output of tied embeddings": Case(
        "LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}, model="qwen2-tied", randomize=nudged(0.1)
    ),
    "lora on tied embeddings": Case(
        "LoraConfig", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}, model="qwen2-tied", randomize=nudged(0.3)
    ),
    "lora on a tied output": Case(
        "LoraConfig", {**LORA, "target_modules": ["lm_head", "q_proj"]}, model="qwen2-tied", randomize=nudged(0.1)
    ),
    "trained tokens": Case("LoraConfig", {**LORA, "trainable_token_indices": [5, 6, 100]}, randomize=nudged(0.3)),
    "trained tokens of tied embeddings": Case(
        "LoraConfig", {**LORA, "trainable_token_indices": [5, 6, 100]}, model="qwen2-tied", randomize=nudged(0.3)
    ),
    "layer norms": Case("LNTuningConfig", {"target_modules": ["input_layernorm"]}, randomize=nudged(0.3)),
}
FAMILIES = ("llama", "qwen2", "gemma-2", "phi-3", "gpt2", "gpt-neox", "falcon-40b", "qwen3.5", "starcoder2")


@dataclass(frozen=True)
class Trained:
    """A base, an adapter on it, and how the logits change."""

    base: Path
    folder: Path
    ids: list[int]
    effect: np.ndarray[Any, Any]

    def error(self, plain: Path, merged: Path) -> float:
        change = llamacpp.logits(merged, self.ids) - llamacpp.logits(plain, self.ids)
        return float(np.linalg.norm(change - self.effect) / np.linalg.norm(self.effect))


def train(case: Case, tmp_path: Path, **sizes: int) -> Trained:
    import peft

    base, folder = tiny_models.build(case.model, tmp_path / "base", **sizes), tmp_path / "adapter"
    ids = some_ids(base, 60)
    torch.manual_seed(1)
    model = load_model(base)

    def logits() -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()  # type: ignore[no-any-return]

    plain = logits()
    config = getattr(peft, case.config)(**{"task_type": "CAUSAL_LM", "target_modules": LINEARS, **case.settings})
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            case.randomize(name, parameter)
    model.save_pretrained(folder)
    effect = logits() - plain
    assert np.abs(effect).max() > 0.1, "an adapter that does nothing would prove nothing"
    return Trained(base, folder, ids, effect)


@pytest.mark.parametrize("name", BESIDE)
def test_what_no_adapter_can_hold(name: str, tmp_path: Path) -> None:
    trained = train(BESIDE[name], tmp_path)
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="f32").path
    of_folder = merge(trained.base, [Merged(trained.folder)], tmp_path / "a.gguf", QuantizeOptions("f32"))
    of_file = merge(plain, [Merged(trained.folder)], tmp_path / "b.gguf")
    assert trained.error(plain, of_folder.path) < TOLERANCE
    assert trained.error(plain, of_file.path) < TOLERANCE
    assert of_folder.fingerprint == of_file.fingerprint != read_header(plain).metadata["edgelora.fingerprint"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_of_a_family(name: str, tmp_path: Path) -> None:
    """Rows and columns in another order, matrices stored transposed or fused."""
    settings = {"target_modules": "all-linear", "use_dora": name not in ("gpt2",), "fan_in_fan_out": name == "gpt2"}
    trained = train(Case("LoraConfig", {**LORA, **settings}, model=name), tmp_path)
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="f32").path
    merged = merge(plain, [Merged(trained.folder)], tmp_path / "merged.gguf")
    assert trained.error(plain, merged.path) < TOLERANCE
    of_folder = merge(trained.base, [Merged(trained.folder)], tmp_path / "a.gguf", QuantizeOptions("f32"))
    assert trained.error(plain, of_folder.path) < TOLERANCE


def test_half_an_adapter_is_seen(tmp_path: Path) -> None:
    trained = train(Case("LoraConfig", LORA), tmp_path)
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="f32").path
    merged = merge(plain, [Merged(trained.folder, scale=0.5)], tmp_path / "merged.gguf")
    assert trained.error(plain, merged.path) > 20 * TOLERANCE


def test_two_adapters_one_after_the_other(tmp_path: Path) -> None:
    """The second changes what the first has left, and is not told apart from one that was merged later."""
    for number, settings in enumerate(({"use_dora": True}, {"r": 2, "use_dora": True})):
        trained = train(Case("LoraConfig", {**LORA, **settings}), tmp_path / str(number))
    first, second = (Merged(tmp_path / str(number) / "adapter") for number in range(2))
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="f32").path
    together = merge(plain, [first, second], tmp_path / "together.gguf")
    before = merge(plain, [first], tmp_path / "before.gguf").path
    after = merge(before, [second], tmp_path / "after.gguf")
    difference = llamacpp.logits(after.path, trained.ids) - llamacpp.logits(together.path, trained.ids)
    assert np.abs(difference).max() < 1e-3
    assert after.fingerprint == together.fingerprint


def test_a_quantized_base_keeps_its_types(tmp_path: Path) -> None:
    trained = train(Case("LoraConfig", {**LORA, "use_dora": True}), tmp_path)
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="q8_0").path
    merged = merge(plain, [Merged(trained.folder)], tmp_path / "merged.gguf").path
    before, after = read_header(plain), read_header(merged)
    assert {n: t.type_name for n, t in before.tensors.items()} == {n: t.type_name for n, t in after.tensors.items()}
    assert trained.error(plain, merged) < 0.05  # Q8_0 rounds twice


def test_types_that_need_an_importance_matrix_keep_them_with_one(tmp_path: Path) -> None:
    trained = train(Case("LoraConfig", LORA, model="llama"), tmp_path, hidden_size=256, intermediate_size=256)
    matrices = {
        name: Importance(np.ones(view.shape[-1], np.float32), np.ones(1, np.int64))
        for name, view in read_header(
            convert_base(trained.base, tmp_path / "f32.gguf", quant="f32").path
        ).tensors.items()
        if name.startswith("blk.")
    }
    options = QuantizeOptions("iq2_xxs", imatrix=ImportanceMatrix(matrices, ("text",), 1, 512))
    plain = convert_base(trained.base, tmp_path / "plain.gguf", options=options).path
    with pytest.raises(UnsupportedError, match="too few bits"):
        merge(plain, [Merged(trained.folder)], tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()
    merged = merge(plain, [Merged(trained.folder)], tmp_path / "merged.gguf", options, keep_types=True)
    before, after = read_header(plain), read_header(merged.path)
    assert {n: t.type_name for n, t in before.tensors.items()} == {n: t.type_name for n, t in after.tensors.items()}
    assert merged.quant == "iq2_xxs"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained = train(Case("LoraConfig", LORA), tmp_path)
    other = tiny_models.build("qwen2", tmp_path / "other", hidden_size=32)
    with pytest.raises(UnsupportedAdapterError, match=r"the adapter is for 64x64, blk\.0\.attn_q\.weight is 32x32"):
        merge(other, [Merged(trained.folder)], tmp_path / "merged.gguf", QuantizeOptions("f32"))
    assert not (tmp_path / "merged.gguf").exists()
