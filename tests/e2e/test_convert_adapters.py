"""`edgelora convert` of adapters as people type it: every kind of source, what is printed, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from converters.gguf_adapter import open_gguf_adapter
from converters.reader import read_header
from tests.conftest import TINY_BASE
from tests.peft_folders import write_lora

CHANGED = "model.layers.0.input_layernorm.weight"


def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base-q8_0.gguf"
    run("convert", TINY_BASE, "--quant", "q8_0", "-o", path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "support", TINY_BASE, seed=1)


def products(path: Path) -> dict[str, np.ndarray]:
    with open_gguf_adapter(path) as adapter:
        return {pair.tensor: np.matmul(*pair.load()) for pair in adapter.pairs}


def test_an_adapter_says_how_exact_it_is(folder: Path, base: Path, tmp_path: Path) -> None:
    done = run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf")
    assert "LoRA adapter for" in done.stderr
    assert "exact (f16, which rounds by" in done.stderr
    cut = run("convert", folder, "--base", base, "-o", tmp_path / "b.gguf", "--rank", 4, "--max-error", 0.9)
    assert "approximate: up to" in cut.stderr
    exactness = json.loads(read_header(tmp_path / "b.gguf").metadata["edgelora.exactness"])
    assert 0 < exactness["max_error"] < 0.9
    assert len(exactness["residual_energy"]) == 28
    refused = run("convert", folder, "--base", base, "-o", tmp_path / "c.gguf", "--rank", 4, code=3)
    assert "rank 4 is too low for an error of 1.0%" in refused.stderr
    assert not (tmp_path / "c.gguf").exists()


def test_a_gguf_adapter_gets_another_type_and_keeps_what_was_said_of_it(
    folder: Path, base: Path, tmp_path: Path
) -> None:
    run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf", "--rank", 4, "--max-error", 0.9)
    run("convert", tmp_path / "a.gguf", "-o", tmp_path / "b.gguf", "--dtype", "f32")
    before, after = products(tmp_path / "a.gguf"), products(tmp_path / "b.gguf")
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])
    said = [json.loads(read_header(tmp_path / f"{name}.gguf").metadata["edgelora.exactness"]) for name in "ab"]
    assert said[1]["kind"] == "approximate"
    assert said[1]["max_error"] == pytest.approx(said[0]["max_error"])
    assert (said[0]["dtype"], said[1]["dtype"]) == ("f16", "f32")


def test_blends_are_the_weighted_sum(folder: Path, base: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "billing", TINY_BASE, seed=2, rank=4)
    for each in (folder, other):
        run("convert", each, "--base", base, "-o", tmp_path / f"{each.name}.gguf", "--dtype", "f32")
    files = [tmp_path / "support.gguf", tmp_path / "billing.gguf"]
    out = tmp_path / "both.gguf"
    run("convert", "--blend", f"{files[0]}@0.7", "--blend", f"{files[1]}@-0.3", "-o", out, "--dtype", "f32")
    of_folders = tmp_path / "folders.gguf"
    run("convert", "--blend", f"{folder}@0.7", "--blend", f"{files[1]}@-0.3", "--base", base, "-o", of_folders)
    first, second, both, mixed = (products(path) for path in (*files, out, of_folders))
    for name, values in both.items():
        expected = 0.7 * first[name] - 0.3 * second[name]
        np.testing.assert_allclose(values, expected, atol=1e-5)
        np.testing.assert_allclose(mixed[name], expected, atol=3e-3)  # F16
    refused = run("convert", "--blend", files[0], "--blend", files[1], "--blend-way", "linear", "-o", out, code=3)
    assert "has different ranks, 8 and 4" in refused.stderr
    assert "name a SOURCE, or the adapters to --blend" in run("convert", code=2).stderr
    assert "--blend takes no SOURCE" in run("convert", folder, "--blend", files[0], code=2).stderr


def test_merging_into_a_base(folder: Path, base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    norm = np.full(json.loads((TINY_BASE / "config.json").read_text())["hidden_size"], 1.5, np.float32)
    save_file({**load_file(weights), f"base_model.model.{CHANGED}": norm}, weights)
    refused = run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf", code=3)
    assert f"{CHANGED}: it was trained as a whole" in refused.stderr
    assert "--merge" in refused.stderr
    done = run("convert", base, "--merge", f"{folder}@1", cwd=tmp_path)
    assert done.stdout.startswith("base-support-q8_0.gguf")
    merged = read_header(tmp_path / "base-support-q8_0.gguf")
    assert merged.metadata["edgelora.merged"][0].startswith("support@1 sha256:")
    assert {t.type_name for t in merged.tensors.values()} == {"Q8_0", "F32"}
    run("convert", TINY_BASE, "--merge", folder, "--quant", "q4_k_m", cwd=tmp_path)
    assert (tmp_path / f"{TINY_BASE.name}-support-q4_k_m.gguf").is_file()
    plan = run("convert", TINY_BASE, "--merge", folder, "--quant", "q4_k_m", "--dry-run", "--json", cwd=tmp_path)
    assert json.loads(plan.stdout)["files"]
    wrong = run("convert", folder, "--merge", folder, code=2)
    assert "--merge goes with a base" in wrong.stderr


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")  # of PEFT, about tied embeddings
def test_the_command_that_unties_a_quantized_base_is_the_one_that_is_printed(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(tmp_path / "words")
    refused = run("convert", tmp_path / "words", "--base", base, cwd=tmp_path, code=3)
    command = next(line for line in refused.stderr.splitlines() if "--untie" in line).partition("edgelora ")[2].split()
    untied = tmp_path / run(*command, cwd=tmp_path).stdout.split()[0]
    assert untied.name == "base-untied-q8_0.gguf"
    assert {t.type_name for t in read_header(untied).tensors.values()} == {"Q8_0", "F32"}
    run("convert", tmp_path / "words", "--base", untied, cwd=tmp_path)


def test_a_merged_base_is_another_base(folder: Path, base: Path, tmp_path: Path) -> None:
    run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf")
    run("convert", base, "--merge", tmp_path / "a.gguf", "-o", tmp_path / "merged.gguf")
    refused = run("chat", "Hi", "--adapter", tmp_path / "a.gguf", "--base", tmp_path / "merged.gguf", code=3)
    assert "was made for" in refused.stderr


def test_pickles_only_where_they_are_allowed(folder: Path, base: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf")
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    refused = run("convert", folder, "--base", base, "-o", tmp_path / "b.gguf", code=3)
    assert "--allow-bin" in refused.stderr
    run("convert", folder, "--base", base, "-o", tmp_path / "b.gguf", "--allow-bin")
    first, second = products(tmp_path / "a.gguf"), products(tmp_path / "b.gguf")
    assert all(np.array_equal(values, second[name]) for name, values in first.items())


def test_an_mlx_folder(folder: Path, base: Path, tmp_path: Path) -> None:
    """MLX holds A and B transposed, with a scale of its own."""
    from safetensors.numpy import load_file, save_file

    mlx, tensors = tmp_path / "mlx", {}
    mlx.mkdir()
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        module, _, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensors[f"{module}.lora_{factor.lower()}"] = np.ascontiguousarray(values.T)
    save_file(tensors, mlx / "adapters.safetensors")
    settings = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 8, "scale": 3.0, "dropout": 0.0},
        "num_layers": -1,
    }
    (mlx / "adapter_config.json").write_text(json.dumps({**settings, "model": str(TINY_BASE)}))
    run("convert", folder, "--base", base, "-o", tmp_path / "a.gguf", "--dtype", "f32")
    done = run("convert", mlx, "--base", base, "-o", tmp_path / "b.gguf", "--dtype", "f32")
    assert "MLX LoRA adapter for" in done.stderr
    first, second = products(tmp_path / "a.gguf"), products(tmp_path / "b.gguf")
    for name, values in first.items():
        np.testing.assert_allclose(second[name], 3 * values, rtol=1e-4, atol=1e-5)


@pytest.mark.train
def test_a_certificate_is_recorded_where_that_is_asked_for(folder: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    run("convert", folder, "--base", TINY_BASE, "-o", out, "--certify", "general")
    assert "passed in" in run("verify", out, "--base", base).stdout
    refused = run("convert", folder, "--base", base, "-o", tmp_path / "b.gguf", "--certify", "general", code=2)
    assert "needs the base's own folder" in refused.stderr
