"""MLX adapter folders, written in mlx-lm's layout, against mlx-lm's formulas computed with numpy on their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.errors import FormatError, MissingFileError, UnsupportedError
from converters.mlx_adapter import MlxAdapter, MlxModule, open_mlx
from converters.mlx_config import detect_mlx

EXACT = 1e-5  # float32 products summed in another order
CONFIG: dict[str, Any] = {
    "adapter_path": "adapters", "batch_size": 4, "data": "data/", "fine_tune_type": "lora", "iters": 100, "seed": 0,
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0}, "model": "mlx-community/tiny-4bit", "num_layers": 16,
    "train": True,
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj"
Tensors = Mapping[str, np.ndarray]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def written(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapters.safetensors")
    return folder


def linear(name: str = Q, rows: int = 6, columns: int = 5, rank: int = 4) -> dict[str, np.ndarray]:
    return {f"{name}.lora_a": numbers(columns, rank), f"{name}.lora_b": numbers(rank, rows)}


def read(folder: Path) -> MlxAdapter:
    """Its modules' matrices stay readable after the file is closed."""
    with open_mlx(folder) as adapter:
        return adapter


def changed(module: MlxModule, weight: np.ndarray) -> np.ndarray:
    """W as the adapter changes it."""
    a, b = module.load_a(), module.load_b()
    assert (a.dtype, b.dtype) == (np.float32, np.float32)
    assert weight.shape == module.shape
    assert a.shape[-2:] == (module.rank, module.shape[-1])
    assert b.shape[-2:] == (module.shape[-2], module.rank)
    merged = weight + np.float32(module.scale) * (b @ a)
    if module.load_magnitude is None:
        return merged
    return (module.load_magnitude() / np.linalg.norm(merged, axis=1))[:, None] * merged


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_linear_layer_computes_what_mlx_computes(tmp_path, dtype):
    tensors = {name: values.astype(dtype) for name, values in linear().items()}
    weight, x = numbers(6, 5), numbers(3, 5)
    a, b = (tensors[f"{Q}.{part}"].astype(np.float32) for part in ("lora_a", "lora_b"))
    expected = x @ weight.T + 20.0 * ((x @ a) @ b)
    with open_mlx(written(tmp_path, tensors)) as adapter:
        (module,) = adapter.modules
        found = x @ changed(module, weight).T
    assert (module.name, module.kind, module.shape, module.rank, module.scale) == (Q, "linear", (6, 5), 4, 20.0)
    assert (adapter.method, adapter.base_model) == ("LoRA", "mlx-community/tiny-4bit")
    assert (adapter.problems, adapter.notices, adapter.whole) == ((), (), ())
    np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT * np.abs(expected).max())
    assert np.abs(found - x @ weight.T).max() > 1  # the adapter's effect is large


def test_another_scale_is_noticed(tmp_path):
    weight = numbers(6, 5)
    with open_mlx(written(tmp_path, linear())) as adapter:
        first = changed(adapter.modules[0], weight)
    with open_mlx(written(tmp_path, linear(), lora_parameters={"rank": 4, "scale": 10, "dropout": 0.1})) as adapter:
        second = changed(adapter.modules[0], weight)
    np.testing.assert_allclose(first - weight, 2 * (second - weight), rtol=EXACT, atol=1e-4)
    assert np.abs(first - second).max() > 1


def test_an_embedding_computes_what_mlx_computes_both_ways(tmp_path):
    name = "model.embed_tokens"
    tensors = {f"{name}.lora_a": numbers(11, 4), f"{name}.lora_b": numbers(4, 5)}
    weight, ids, x = numbers(11, 5), np.array([0, 3, 10, 3]), numbers(2, 5)
    a, b = tensors.values()
    with open_mlx(written(tmp_path, tensors)) as adapter:
        (module,) = adapter.modules
        merged = changed(module, weight)
    assert (module.name, module.kind, module.shape) == (name, "embedding", (11, 5))
    np.testing.assert_allclose(merged[ids], weight[ids] + 20.0 * (a[ids] @ b), rtol=EXACT, atol=1e-4)
    np.testing.assert_allclose(x @ merged.T, x @ weight.T + 20.0 * ((x @ b.T) @ a.T), rtol=EXACT, atol=1e-3)


@pytest.mark.parametrize("is_flat", [False, True])
def test_experts_compute_what_mlx_computes(tmp_path, is_flat):
    """Also as they were before 2025, with the lora_a of all experts below one another."""
    name = "model.layers.3.mlp.switch_mlp.gate_proj"
    a, b, weight, x = numbers(3, 4, 5), numbers(3, 6, 4), numbers(3, 6, 5), numbers(7, 5)
    chosen = np.array([0, 2, 1, 1, 0, 2, 2])
    low = (
        np.take_along_axis((x @ a.reshape(12, 5).T).reshape(7, 3, 4), chosen[:, None, None], axis=1)[:, 0]
        if is_flat
        else np.einsum("nc,nrc->nr", x, a[chosen])
    )
    expected = np.einsum("nc,noc->no", x, weight[chosen]) + 20.0 * np.einsum("nr,nor->no", low, b[chosen])
    tensors = {f"{name}.lora_a": a.reshape(12, 5) if is_flat else a, f"{name}.lora_b": b}
    with open_mlx(written(tmp_path, tensors)) as adapter:
        (module,) = adapter.modules
        found = np.einsum("nc,noc->no", x, changed(module, weight)[chosen])
    assert (module.name, module.kind) == ("model.layers.3.mlp.experts.*.gate_proj", "experts")
    assert module.shape == (3, 6, 5)
    np.testing.assert_allclose(found, expected, rtol=EXACT, atol=1e-3)


@pytest.mark.parametrize("old", [False, True])
def test_dora_computes_what_mlx_computes(tmp_path, old):
    tensors = linear() | {f"{Q}.m": np.abs(numbers(6))}
    how = (
        {"fine_tune_type": ..., "use_dora": True, "num_layers": ..., "lora_layers": 4}
        if old
        else {"fine_tune_type": "dora"}
    )
    weight, x, bias = numbers(6, 5), numbers(3, 5), numbers(6)
    a, b, m = tensors.values()
    out = x @ weight.T + 20.0 * ((x @ a) @ b)
    expected = m / np.linalg.norm(weight + (20.0 * b.T) @ a.T, axis=1) * out + bias
    with open_mlx(written(tmp_path, tensors, **how)) as adapter:
        found = x @ changed(adapter.modules[0], weight).T + bias
    assert (adapter.method, adapter.problems) == ("DoRA", ())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_full_fine_tuning_gives_whole_weights(tmp_path):
    tensors = {f"{Q}.weight": numbers(6, 5), "model.layers.0.input_layernorm.weight": numbers(5)}
    with open_mlx(written(tmp_path, tensors, fine_tune_type="full")) as adapter:
        assert (adapter.method, adapter.modules, adapter.problems) == ("full fine-tuning", (), ())
        assert {tensor.name: tensor.shape for tensor in adapter.whole} == {
            name: values.shape for name, values in tensors.items()
        }
        for tensor in adapter.whole:
            np.testing.assert_array_equal(tensor.load(), tensors[tensor.name])


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("model.language_model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        ("language_model.lm_head", "lm_head"),
        ("model.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
        ("model.h.0.mlp.c_fc", "transformer.h.0.mlp.c_fc"),
        ("model.h.0.attention.query_key_value", "gpt_neox.layers.0.attention.query_key_value"),
        ("model.h.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_h_to_4h"),
        ("model.embed_out", "embed_out"),
        ("lm_head", "lm_head"),
    ],
)
def test_modules_have_transformers_names(tmp_path, stored, name):
    assert read(written(tmp_path, linear(stored))).modules[0].name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fine_tune_type": "ia3"}, "fine_tune_type is 'ia3', known are lora, dora, full"),
        ({"fine_tune_type": ["lora"]}, "fine_tune_type is ['lora']"),
        ({"lora_parameters": ...}, "has no lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "scale is 1000"),
        ({"lora_parameters": {"rank": 4, "dropout": 0.0}}, "scale is None"),
        ({"lora_parameters": {"rank": 4, "scale": "20"}}, "scale is '20'"),
        ({"lora_parameters": {"rank": 4, "scale": 1e300}}, "scale is 1e+300"),
        ({"lora_parameters": {"rank": 4, "scale": float("nan")}}, "scale is nan"),
        ({"lora_parameters": {"rank": 4, "scale": True}}, "scale is True"),
        ({"lora_parameters": {"rank": -4, "scale": 1}}, "rank is -4"),
        ({"lora_parameters": {"rank": 8, "scale": 1}}, f"{Q}: has rank 4, lora_parameters.rank is 8"),
        ({"lora_parameters": {"rank": 4, "scale": 1, "rslora": True}}, "unknown in lora_parameters: rslora"),
        ({"fine_tune_type": "dora"}, f"{Q}: has lora_a, lora_b, and dora has lora_a, lora_b, m"),
    ],
)
def test_settings_that_do_not_fit_are_problems(tmp_path, changes, words):
    problems = read(written(tmp_path, linear(), **changes)).problems
    assert any(words in problem for problem in problems), problems


def test_alpha_is_a_problem_where_a_release_may_have_counted_it(tmp_path):
    lora = {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    old = {"fine_tune_type": ..., "num_layers": ..., "lora_layers": 16}
    assert read(written(tmp_path, linear(), lora_parameters=lora)).problems == ()
    assert read(written(tmp_path, linear(), lora_parameters=lora | {"alpha": 4}, **old)).problems == ()
    (problem,) = read(written(tmp_path, linear(), lora_parameters=lora, **old)).problems
    assert "lora_parameters.alpha is 16" in problem
    assert "alpha / rank" in problem


def test_unknown_options_are_told(tmp_path):
    (notice,) = read(written(tmp_path, linear(), shiny_new_option=1)).notices
    assert "shiny_new_option" in notice


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no tensor"),
        (linear() | {"model.norm.weight": numbers(5)}, "model.norm.weight: no tensor of a LoRA"),
        (linear() | {f"{Q}.lora_a_scales": numbers(5)}, f"{Q}.lora_a_scales: no tensor of a LoRA"),
        (linear() | linear(f"language_model.{Q}"), f"{Q}: is there 2 times"),
        ({f"{Q}.lora_a": numbers(5, 4)}, f"{Q}: has lora_a, and lora has lora_a, lora_b"),
        (linear() | {f"{Q}.m": numbers(6)}, "has lora_a, lora_b, m, and lora has"),
        ({f"{Q}.lora_a": numbers(5, 4), f"{Q}.lora_b": numbers(3, 6)}, "lora_a (5, 4) and lora_b (3, 6) do not fit"),
        ({f"{Q}.lora_a": numbers(0, 4), f"{Q}.lora_b": numbers(4, 6)}, "lora_a (0, 4)"),
        ({f"{Q}.lora_a": numbers(4), f"{Q}.lora_b": numbers(4, 6)}, "lora_a (4,)"),
        ({f"{Q}.lora_a": numbers(2, 4, 5), f"{Q}.lora_b": numbers(3, 6, 4)}, "lora_a (2, 4, 5)"),
        ({f"{Q}.lora_a": numbers(13, 5), f"{Q}.lora_b": numbers(3, 6, 4)}, "lora_a (13, 5)"),
        ({f"{Q}.lora_a": np.arange(20).reshape(5, 4), f"{Q}.lora_b": numbers(4, 6)}, "is I64, and no float"),
    ],
)
def test_tensors_that_do_not_fit_are_problems(tmp_path, tensors, words):
    problems = read(written(tmp_path, tensors)).problems
    assert any(words in problem for problem in problems), problems


def test_magnitudes_that_do_not_fit_are_problems(tmp_path):
    (problem,) = read(written(tmp_path, linear() | {f"{Q}.m": numbers(5)}, fine_tune_type="dora")).problems
    assert "m (5,) is not one number for each of the 6 rows" in problem


def test_folders_of_mlx_are_told_from_others(tmp_path):
    assert detect_mlx(written(tmp_path, linear()))
    assert detect_mlx(written(tmp_path, linear(), fine_tune_type=..., num_layers=..., lora_layers=4))
    (tmp_path / "adapters.safetensors").unlink()
    assert detect_mlx(tmp_path)
    with pytest.raises(MissingFileError, match=r"no adapters\.safetensors"), open_mlx(tmp_path):
        pass
    (tmp_path / "adapters.npz").write_bytes(b"PK")
    with pytest.raises(UnsupportedError, match="MLX or numpy weights"), open_mlx(tmp_path):
        pass
    for text in ('{"peft_type": "LORA", "lora_parameters": {}}', "{", "[]", '{"hidden_size": 3}'):
        (tmp_path / "adapter_config.json").write_text(text)
        assert not detect_mlx(tmp_path)
    assert not detect_mlx(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(FormatError), open_mlx(tmp_path):
        pass
