"""What the identity matrix cannot ask methods that scale and turn: embeddings, norms, biases alone, wrong settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, Reading, Replaced, Shifted, read_modules
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.converters.folders import write_json
from tests.equivalence import test_method_weights, tiny_models
from tests.equivalence.methods import rotation_cases, scaling_cases
from tests.equivalence.peft_methods import Case, base_weight, computed_weight, layers, make_peft, nudged

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

CLOSE = 1e-4  # as `Case.tolerance`: float32 sums in another order
CASES = {**scaling_cases.CASES, **rotation_cases.CASES}
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama-biases", tmp_path_factory.mktemp("llama-biases"))


@contextmanager
def read(folder: Path) -> Iterator[Reading]:
    config = read_peft_config(folder)
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors:
        yield read_modules(config, METHODS[config.peft_type], tensors)


def by_tensor(reading: Reading) -> dict[str, Change]:
    assert not reading.problems
    return {change.tensor: change for change in reading.changes}


# A setting changed after saving, with which the tensors still fit.
WRONG_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "deft": ("decomposition_method", "qr"),
    "deft with an alpha": ("alpha", 15),
    "oft": ("num_cayley_neumann_terms", 3),
    "oft with Cayley's rotation": ("use_cayley_neumann", True),
    "constrained oft": ("coft", False),
    "constrained oft with a shared block": ("eps", 0.2),
    "hra": ("apply_GS", True),
    "road 1": ("group_size", 8),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_wrong_setting_is_noticed(
    name: str, llama: Path, biases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, value = WRONG_SETTINGS[name]

    def with_wrong_setting(case: Case, base: Path, folder: Path) -> Any:
        adapted = make_peft(case, base, folder)
        config = json.loads((folder / CONFIG).read_text())
        assert config[key] != value
        write_json(folder / CONFIG, {**config, key: value})
        return adapted

    monkeypatch.setattr(test_method_weights, "make_peft", with_wrong_setting)
    base = biases if CASES[name].model == "llama-biases" else llama
    assert max(dict(test_method_weights.errors(CASES[name], base, tmp_path)).values()) > 10 * CLOSE


@pytest.mark.parametrize(
    "name", ["ia3", "hira", "delora", "glora without biases", "osf", "deft", "oft", "boft", "hra", "road 2"]
)
def test_values_out_of_place_are_noticed(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rolled(self: Tensors, stored: str, start: int = 0, stop: int | None = None) -> Any:
        rows = stored_rows(self, stored, start, stop)
        return np.roll(rows, 1, axis=-1 if rows.shape[-1] > 1 else 0)

    stored_rows = Tensors.rows
    monkeypatch.setattr(Tensors, "rows", rolled)
    assert max(dict(test_method_weights.errors(CASES[name], llama, tmp_path)).values()) > 100 * CLOSE


def test_oft_turns_embeddings(llama: Path, tmp_path: Path) -> None:
    case = Case("OFTConfig", {"target_modules": ["embed_tokens", "q_proj"], "use_cayley_neumann": False})
    layer = layers(make_peft(case, llama, tmp_path))["model.embed_tokens"]
    with read(tmp_path) as reading, torch.no_grad():
        wanted, base = layer(torch.arange(320)).numpy(), layer.get_base_layer().weight.numpy()
        copy, turned = [change for change in reading.changes if change.tensor == "model.embed_tokens.weight"]
        assert isinstance(copy, Replaced)  # PEFT saves embeddings that it changes
        assert np.array_equal(copy.load(), base)
        assert np.abs(wanted - base).max() > 0.01
        assert np.abs(test_method_weights.changed(turned, base) - wanted).max() < CLOSE


class BlockDiagonal:
    """What PEFT's CUDA extension computes: the blocks of each factor along a diagonal."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*of_factor) for of_factor in blocks])]


@pytest.mark.parametrize("settings", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 8}])
@pytest.mark.parametrize("factors", [2, 3])
def test_boft_of_several_factors(
    settings: dict[str, int], factors: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", BlockDiagonal)
    case = Case("BOFTConfig", {**settings, "boft_n_butterfly_factor": factors}, randomize=nudged(0.3))
    found = dict(test_method_weights.errors(case, llama, tmp_path))
    assert max(found.values()) < CLOSE
    with read(tmp_path) as reading:
        assert not reading.problems
    monkeypatch.setattr("converters.methods.boft.permutation", lambda columns, size, factor: np.arange(columns))
    assert max(dict(test_method_weights.errors(case, llama, tmp_path)).values()) > 100 * CLOSE


@pytest.mark.parametrize("model", ["llama", "biases"])
def test_beft_moves_biases(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    adapted = make_peft(Case("BeftConfig"), request.getfixturevalue(model), tmp_path)
    with read(tmp_path) as reading:
        ours = by_tensor(reading)
        assert len(ours) == len(layers(adapted))
        for name, layer in layers(adapted).items():
            shift = ours[f"{name}.bias"]
            assert isinstance(shift, Shifted)
            bias, wanted = base_weight(layer)[1], computed_weight(layer)[1]
            assert np.abs(wanted - bias).max() > 0.01
            assert np.abs(bias + shift.load() - wanted).max() < CLOSE


def test_embeddings_of_hira_are_refused(llama: Path, tmp_path: Path) -> None:
    make_peft(Case("HiraConfig", {"target_modules": ["embed_tokens"]}), llama, tmp_path)
    with read(tmp_path) as reading:
        assert len(reading.problems) == 1
        assert "model.embed_tokens: is an embedding" in reading.problems[0]


@pytest.mark.parametrize("bias", ["boft", "oft", "hra", "delora"])
def test_biases_trained_beside_a_method(bias: str, biases: Path, tmp_path: Path) -> None:
    config = {"boft": "BOFTConfig", "oft": "OFTConfig", "hra": "HRAConfig", "delora": "DeloraConfig"}[bias]
    case = Case(config, {"target_modules": ["q_proj"], "bias": f"{bias}_only"}, randomize=nudged(0.3))
    adapted = make_peft(case, biases, tmp_path)
    with read(tmp_path) as reading:
        ours = by_tensor(reading)
        for name, layer in layers(adapted).items():
            trained = ours[f"{name}.bias"]
            assert isinstance(trained, Replaced)
            assert np.abs(trained.load() - computed_weight(layer)[1]).max() < CLOSE


def psoft_weight(folder: Path, base: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layer = layers(PeftModel.from_pretrained(model, folder))["model.layers.0.self_attn.q_proj"]
    return computed_weight(layer)[0]


def test_psoft_is_another_adapter_with_other_signs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused: PEFT itself computes another weight where the decomposition has other, equally right signs."""
    case = Case("PsoftConfig", {"r": 8, "target_modules": ["q_proj"]}, randomize=nudged(0.3))
    layer = layers(make_peft(case, llama, tmp_path))["model.layers.0.self_attn.q_proj"]
    trained = computed_weight(layer)[0]
    assert np.abs(psoft_weight(tmp_path, llama) - trained).max() < CLOSE

    decompose = torch.linalg.svd

    def other_signs(matrix: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
        u, s, vh = decompose(matrix, full_matrices=full_matrices)
        signs = torch.where(torch.arange(len(s)) % 2 == 0, 1.0, -1.0)
        assert torch.allclose((u * signs * s) @ (signs[:, None] * vh), matrix, atol=CLOSE)
        return u * signs, s, signs[:, None] * vh

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    assert np.abs(psoft_weight(tmp_path, llama) - trained).max() > 0.1
    assert METHODS["PSOFT"].read is None
