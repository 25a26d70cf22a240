"""LoRA on the embeddings and on the output, of every family: exact where they are tensors of their own, and refused
with the one command that makes them so where they are one.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from converters import edits
from converters.adapter import convert_adapter
from converters.base import convert_base
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.merge import Merged, merge
from converters.reader import read_header
from edgelora.cli import cli
from tests.converters.folders import safetensors_bytes
from tests.equivalence import llamacpp
from tests.equivalence.effects import TOLERANCE, Adapted, adapt, mostly_slow
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case, nudged
from tests.equivalence.tiny_models import TINY, build

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

SEEN = 20 * TOLERANCE
NEVER_UNTIED = ("gemma", "gemma-2", "command-r", "command-r7b")
SAME = ("llama-2", "mistral", "exaone-4", "command-r-plus")  # as others here, or of 64 layers
QUICK = ("llama", "qwen2-tied", "phi-3", "phi-4-mini", "gemma-3", "gpt2", "falcon", "qwen3.5", "mixtral")
SOMETIMES_TIED = ("llama-3", "qwen2-tied", "qwen3", "phi-4-mini", "gemma-3", "gemma-4-dense", "gpt2", "falcon")


def everything(name: str, folder: Path, *, only: str = "", **settings: Any) -> Adapted:
    """LoRA on the embeddings, the output and every linear layer; or on one of the first two.

    Args:
        only: "input" or "output".
    """
    model = load_model(build(name, folder / "seen", **settings))
    both = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    ends = [module for key, module in both.items() if key == (only or key)]
    kinds = () if only else ("Linear", "Conv1D")
    names = [n for n, module in model.named_modules() if any(module is end for end in ends) or is_of(module, kinds)]
    names = [n for n in names if "per_layer_model_projection" not in n]  # which llama.cpp never adapts
    lora = {
        "r": 2,
        "lora_alpha": 16 if only else 4,
        "target_modules": sorted(set(names)),
        "fan_in_fan_out": name == "gpt2",
    }
    return adapt(Case("LoraConfig", lora, model=name), folder, **settings)


def is_of(module: object, kinds: tuple[str, ...]) -> bool:
    return type(module).__name__ in kinds


@pytest.mark.parametrize("name", mostly_slow([name for name in TINY if name not in (*NEVER_UNTIED, *SAME)], QUICK))
def test_embeddings_output_and_all_between(name: str, tmp_path: Path) -> None:
    adapted = everything(name, tmp_path)
    assert adapted.adapter_error(adapted.untied) < TOLERANCE


@pytest.mark.parametrize("name", mostly_slow(SOMETIMES_TIED, QUICK))
@pytest.mark.parametrize("only", ["input", "output"])
def test_one_of_two_that_were_one(only: str, name: str, tmp_path: Path) -> None:
    """Merged, the base is untied without being asked."""
    adapted = everything(name, tmp_path, only=only)
    assert adapted.adapter_error(adapted.untied) < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


def test_the_wrong_one_of_two_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = everything("qwen2-tied", tmp_path, only="output")
    monkeypatch.setattr(edits, "OUTPUT", "token_embd.weight")
    with pytest.raises((AssertionError, KeyError, UnsupportedAdapterError)):
        assert adapted.merged_error() < SEEN


@pytest.mark.parametrize("only", ["", "input", "output"])
@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_tied_ones_are_refused_with_the_command_that_helps(
    source: str, only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = everything("qwen2-tied", tmp_path, only=only)
    base = adapted.base if source == "folder" else adapted.plain
    with pytest.raises(BaseMismatchError) as caught:
        convert_adapter(adapted.folder, base, tmp_path / "adapter.gguf")
    assert "ties its embeddings to its output" in caught.value.message
    assert not (tmp_path / "adapter.gguf").exists()
    _, _, command = caught.value.hint.partition("--base: ")
    program, *arguments = shlex.split(command)
    assert (program, arguments[:2]) == ("edgelora", ["convert", str(base)])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    made = Path(result.stdout.split("  ")[0])
    assert convert_adapter(adapted.folder, made, tmp_path / "adapter.gguf").kind == "exact"


@pytest.mark.parametrize("name", NEVER_UNTIED)
def test_families_that_never_untie_say_so(name: str, tmp_path: Path) -> None:
    adapted = everything(name, tmp_path, only="input")
    with pytest.raises(BaseMismatchError, match="cannot adapt one tensor in two places") as caught:
        convert_adapter(adapted.folder, adapted.plain, tmp_path / "adapter.gguf")
    assert "always takes the embeddings for the output too" in caught.value.hint
    assert "--untie" not in caught.value.hint
    with pytest.raises(UnsupportedAdapterError, match="always takes one for both"):
        adapted.merged_error()


@pytest.mark.parametrize("name", ["gemma-2", "command-r"])
def test_families_that_never_untie_merge_what_keeps_the_tie(name: str, tmp_path: Path) -> None:
    """Tokens trained for the embeddings and the output alike."""
    settings = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 100]}
    adapted = adapt(Case("LoraConfig", settings, model=name), tmp_path)
    assert adapted.merged_error() < TOLERANCE


def test_an_untied_base_is_not_untied_twice(tmp_path: Path) -> None:
    adapted = everything("llama", tmp_path, only="output")
    out = convert_base(adapted.base, tmp_path / "again.gguf", quant="f32", untie=True)
    assert "this model has an output of its own" in "".join(out.notices)
    assert adapted.adapter_error(out.path) < TOLERANCE


def test_an_adapter_that_unties_comes_after_one_that_does_not(tmp_path: Path) -> None:
    """The output has what the first did to both."""
    settings = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 6, 100]}
    first = adapt(Case("LoraConfig", settings, model="qwen2-tied", randomize=nudged(0.3)), tmp_path / "first")
    second = everything("qwen2-tied", tmp_path / "second", only="input")
    both = [Merged(first.folder), Merged(second.folder)]
    together = merge(first.plain, both, tmp_path / "together.gguf").path
    one = merge(first.plain, both[:1], tmp_path / "one.gguf").path
    assert "output.weight" not in read_header(one).tensors
    apart = merge(one, both[1:], tmp_path / "apart.gguf").path
    difference = llamacpp.logits(together, first.ids) - llamacpp.logits(apart, first.ids)
    assert np.abs(difference).max() < 1e-4


def test_names_of_a_multimodal_model(tmp_path: Path) -> None:
    """transformers loads some text models inside of others: their tied embeddings are the same."""
    adapted = everything("qwen2-tied", tmp_path, only="input")
    arrays = load_file(adapted.folder / "adapter_model.safetensors")
    names = {name: name.replace("model.model.", "model.model.language_model.") for name in arrays}
    renamed = safetensors_bytes({names[name]: values for name, values in arrays.items()})
    (adapted.folder / "adapter_model.safetensors").write_bytes(renamed)
    assert adapted.merged_error() < TOLERANCE
    assert adapted.adapter_error(adapted.untied) < TOLERANCE
