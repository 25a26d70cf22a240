"""What the identity matrix cannot ask LoRA's relatives: embeddings, bases they cut, ranks they lost, wrong settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.checkpoint import Tensors
from converters.methods import METHODS, Reading, Transformed, read_modules
from converters.methods.activations import ACTIVATIONS
from converters.methods.kasa import without_smallest
from converters.methods.method import Module
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.converters.folders import safetensors_bytes, write_json
from tests.equivalence import test_method_weights, tiny_models
from tests.equivalence.methods.relatives_cases import CASES, dora, strong
from tests.equivalence.peft_methods import Case, Floats, base_weight, computed_weight, layers, make_peft

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

CLOSE = 1e-4  # as `Case.tolerance`: float32 sums in another order
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


def changed_weights(folder: Path, bases: Mapping[str, Floats]) -> dict[str, Floats]:
    """Our weight of every layer after the adapter in `folder`."""
    config = read_peft_config(folder)
    shapes = {f"{name}.weight": weight.shape for name, weight in bases.items()}
    with Tensors(read_tensors(folder / WEIGHTS)) as tensors:
        reading: Reading = read_modules(config, METHODS[config.peft_type], tensors, shapes.get)
        assert not reading.problems
        ours = {change.tensor: change for change in reading.changes}
        return {
            name: test_method_weights.changed(ours[f"{name}.weight"], weight) if f"{name}.weight" in ours else weight
            for name, weight in bases.items()
        }


def relative(found: Floats, wanted: Floats, base: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - base))


# A setting changed after saving, and what it was made with.
WRONG_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "dora": ("lora_alpha", 15),
    "bd-lora": ("lora_alpha", 15),
    "kasa": ("lora_alpha", 9),
    "adalora": ("lora_alpha", 30),
    "loha": ("alpha", 15),
    "lokr": ("alpha", 7),
    "gralora, hybrid": ("alpha", 60),
    "peanut": ("act_fn", "gelu"),
    "peanut with a network": ("act_fn", "silu"),
    "supra": ("lora_alpha", 15),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_wrong_setting_is_noticed(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = WRONG_SETTINGS[name]

    def with_wrong_setting(case: Case, base: Path, folder: Path) -> Any:
        adapted = make_peft(case, base, folder)
        config = json.loads((folder / CONFIG).read_text())
        assert config[key] != value
        write_json(folder / CONFIG, {**config, key: value})
        return adapted

    monkeypatch.setattr(test_method_weights, "make_peft", with_wrong_setting)
    assert max(dict(test_method_weights.errors(CASES[name], base, tmp_path)).values()) > 100 * CLOSE


@pytest.mark.parametrize("name", ["miss", "miss mini, wide", "miss bat", "supertuning", "velora"])
def test_values_out_of_place_are_noticed(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rolled(self: Any, role: str) -> Floats:
        return np.roll(load(self, role), 1, axis=-1)

    load = Module.load
    monkeypatch.setattr(Module, "load", rolled)
    assert max(dict(test_method_weights.errors(CASES[name], base, tmp_path)).values()) > 100 * CLOSE


def test_dora_on_embeddings_measures_columns(base: Path, tmp_path: Path) -> None:
    case = Case("LoraConfig", {"use_dora": True, "target_modules": ["embed_tokens"]}, randomize=dora)
    adapted = make_peft(case, base, tmp_path)
    layer = layers(adapted)["model.embed_tokens"]
    weight = layer.base_layer.weight.detach().numpy()
    with torch.no_grad():
        wanted = layer(torch.arange(len(weight))).numpy()
    config = read_peft_config(tmp_path)
    with Tensors(read_tensors(tmp_path / WEIGHTS)) as tensors:
        reading = read_modules(config, METHODS["LORA"], tensors)
        assert not reading.problems
        [change] = (change for change in reading.changes if isinstance(change, Transformed))
        assert (change.tensor, change.shape, change.by_rows) == ("model.embed_tokens.weight", weight.shape, False)
        assert relative(change.apply(weight, 0), wanted, weight) < CLOSE


def test_kasa_cuts_the_base_it_is_given(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    adapted = make_peft(CASES["kasa"], base, tmp_path)
    weights = {name: plain[f"{name}.weight"].numpy() for name in layers(adapted)}
    found = changed_weights(tmp_path, weights)
    for name, layer in layers(adapted).items():
        assert relative(found[name], computed_weight(layer)[0], weights[name]) < CLOSE
        cut = base_weight(layer)[0]  # by PEFT, when it made the adapter
        assert relative(without_smallest(weights[name], 8), cut, weights[name]) < CLOSE
        assert np.abs(without_smallest(weights[name], 7) - cut).max() > 1e-3


def test_qalora_pools_its_input(tmp_path: Path) -> None:
    """PEFT has it on GPTQ layers only; the layer takes any base."""
    from peft import LoraConfig
    from peft.tuners.lora.gptq import GPTQLoraLinear

    torch.manual_seed(0)
    settings = {"use_qalora": True, "qalora_group_size": 4, "r": 2, "lora_alpha": 6}
    inner = torch.nn.Linear(32, 24)
    layer = GPTQLoraLinear(inner, "default", LoraConfig(**settings), r=2, lora_alpha=6)
    for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        strong("", parameter)
    factors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    stored = {f"base_model.model.layer.lora_{name}.weight": value.detach().numpy() for name, value in factors.items()}
    (tmp_path / WEIGHTS).write_bytes(safetensors_bytes(stored))
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", **settings})
    weight = inner.weight.detach().numpy()
    with torch.no_grad():
        wanted = (layer(torch.eye(32)) - layer(torch.zeros(1, 32))).T.numpy()
    assert relative(changed_weights(tmp_path, {"layer": weight})["layer"], wanted, weight) < CLOSE
    write_json(tmp_path / CONFIG, {"peft_type": "LORA", **settings, "lora_alpha": 5})
    assert relative(changed_weights(tmp_path, {"layer": weight})["layer"], wanted, weight) > 0.1


def test_adalora_after_ranks_were_taken_away(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = make_peft(CASES["adalora"], base, tmp_path)
    names = list(layers(adapted))
    config = adapted.peft_config["default"]
    config.rank_pattern = {
        f"{name}.lora_E.default": [rank % 3 != 0 and index != 2 for rank in range(12)]
        for index, name in enumerate(names)
    }
    adapted.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = layers(PeftModel.from_pretrained(model, tmp_path).eval())
    found = changed_weights(tmp_path, {name: base_weight(layer)[0] for name, layer in loaded.items()})
    assert [loaded[name].lora_A["default"].shape[0] for name in names[:3]] == [8, 8, 0]
    for name, layer in loaded.items():
        wanted, weight = computed_weight(layer)[0], base_weight(layer)[0]
        if name == names[2]:
            assert np.array_equal(found[name], weight)
        else:
            assert relative(found[name], wanted, weight) < CLOSE


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 997, dtype=np.float32)
    with torch.no_grad():
        wanted = ACT2FN[name](torch.from_numpy(x)).numpy()
    found = ACTIVATIONS[name](x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-5)  # float32 functions of two libraries
