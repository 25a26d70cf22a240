"""What PEFT saves beside a method's own tensors: transformers' model with our changes computes what PEFT's does.

Modules trained as a whole, biases, norms, rows of embeddings, and vocabularies that were enlarged before the training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, LowRank, Reading, Replaced, Shifted, read_modules
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.converters.folders import write_json
from tests.equivalence import tiny_models
from tests.equivalence.test_method_weights import changed

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

CLOSE = 1e-4  # of logits of size 1 to 10; float32 sums in another order
STRONG = 1e-2  # what an adapter changes them by at least
IDS = torch.tensor([[3, 17, 5, 200, 7, 5, 3, 319]])
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
LORA: Mapping[str, Any] = {"target_modules": ["q_proj"], "r": 2}
TOKENS = {"token_indices": [3, 5]}


@dataclass(frozen=True)
class Beside:
    """One adapter.

    Attributes:
        replaced: tensors of the first layer, and those that are in none, that come out as wholes.
        rows: likewise, tensors of which some rows do.
        vocabulary: what the embeddings are resized to before the adapter is made.
        is_untied: the base ties its output to its embeddings, and the adapter does not train both alike.
    """

    settings: Mapping[str, Any]
    replaced: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    model: str = "llama"
    config: str = "LoraConfig"
    vocabulary: int | None = None
    is_untied: bool = False
    also: Mapping[str, Any] = field(default_factory=lambda: LORA)


HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
LAYER = "model.layers.0."
ALL_BIASES = tuple(f"{LAYER}mlp.{name}_proj.bias" for name in ("down", "gate", "up")) + tuple(
    f"{LAYER}self_attn.{name}_proj.bias" for name in "koqv"
)

CASES: Mapping[str, Beside] = {
    "output": Beside({"modules_to_save": ["lm_head"]}, (HEAD,)),
    "embeddings": Beside({"modules_to_save": ["embed_tokens"]}, (EMBED,)),
    "both": Beside({"modules_to_save": ["embed_tokens", "lm_head"]}, (HEAD, EMBED)),
    "tied output": Beside({"modules_to_save": ["lm_head"]}, (HEAD,), model="qwen2-tied", is_untied=True),
    "tied embeddings": Beside({"modules_to_save": ["embed_tokens"]}, (EMBED,), model="qwen2-tied", is_untied=True),
    "tied embeddings, kept so": Beside(
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, (HEAD, EMBED), model="qwen2-tied"
    ),
    "norms": Beside({"modules_to_save": ["input_layernorm", "model.norm"]}, (f"{LAYER}input_layernorm.weight", NORM)),
    "a whole mlp": Beside(
        {"modules_to_save": ["mlp"]}, tuple(f"{LAYER}mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
    ),
    "all biases": Beside({"bias": "all"}, ALL_BIASES, model="llama-biases"),
    "own biases": Beside({"bias": "lora_only"}, (f"{LAYER}self_attn.q_proj.bias",), model="llama-biases"),
    "tokens": Beside({"trainable_token_indices": [3, 5]}, rows=(EMBED,)),
    "tokens of both": Beside({"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}, rows=(HEAD, EMBED)),
    "tokens, tied": Beside({"trainable_token_indices": [3, 5]}, rows=(EMBED,), model="qwen2-tied"),
    "tokens of both, tied": Beside(
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [3, 5]}}, rows=(EMBED,), model="qwen2-tied"
    ),
    "other tokens of both, tied": Beside(
        {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}},
        rows=(HEAD, EMBED),
        model="qwen2-tied",
        is_untied=True,
    ),
    "resized": Beside({}, (HEAD, EMBED), vocabulary=330),
    "resized, tied": Beside({}, (HEAD, EMBED), model="qwen2-tied", vocabulary=330),
    "resized, tokens": Beside({"trainable_token_indices": [5, 325]}, (HEAD, EMBED), (EMBED,), vocabulary=330),
    "resized, tokens, tied": Beside(
        {"trainable_token_indices": [5, 325]}, (HEAD, EMBED), (HEAD, EMBED), model="qwen2-tied", vocabulary=330
    ),
    "resized, tokens by module, tied": Beside(
        {"trainable_token_indices": {"embed_tokens": [5, 325]}},
        (HEAD, EMBED),
        (HEAD, EMBED),
        model="qwen2-tied",
        vocabulary=330,
    ),
    "resized, both": Beside({"modules_to_save": ["embed_tokens", "lm_head"]}, (HEAD, EMBED), vocabulary=330),
    "resized, lora on embeddings": Beside(
        {"target_modules": ["q_proj", "embed_tokens"]}, (EMBED,), vocabulary=330, also={"r": 2}
    ),
    "trainable tokens": Beside(
        {**TOKENS, "target_modules": ["embed_tokens"]}, rows=(EMBED,), config="TrainableTokensConfig", also={}
    ),
    "trainable tokens by default": Beside(TOKENS, rows=(EMBED,), config="TrainableTokensConfig", also={}),
    "trainable tokens, tied": Beside(
        TOKENS, rows=(HEAD, EMBED), model="qwen2-tied", config="TrainableTokensConfig", also={}
    ),
    "trainable tokens of gpt2": Beside(
        TOKENS, rows=(HEAD, "transformer.wte.weight"), model="gpt2", config="TrainableTokensConfig", also={}
    ),
    "trainable tokens, resized": Beside(
        {"token_indices": [5, 325]}, (EMBED,), (EMBED,), config="TrainableTokensConfig", vocabulary=330, also={}
    ),
    "layer norms": Beside(
        {"target_modules": ["input_layernorm", "norm"], "modules_to_save": ["lm_head"]},
        (HEAD, f"{LAYER}input_layernorm.weight", NORM),
        config="LNTuningConfig",
        also={},
    ),
    "layer norms of gpt2": Beside(
        {"target_modules": ["ln_1"]},
        ("transformer.h.0.ln_1.bias", "transformer.h.0.ln_1.weight"),
        model="gpt2",
        config="LNTuningConfig",
        also={},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    models = sorted({case.model for case in CASES.values()})
    return {model: tiny_models.build(model, tmp_path_factory.mktemp(model)) for model in models}


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def train(case: Beside, base: Path, folder: Path) -> torch.Tensor:
    """Logits of a random adapter that PEFT saved to `folder`; they differ from the base's."""
    import peft

    torch.manual_seed(1)
    model = load(base)
    if case.vocabulary:
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
    settings = {"task_type": "CAUSAL_LM", **case.also, **case.settings}
    adapted = peft.get_peft_model(model, getattr(peft, case.config)(**settings)).eval()
    for _, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.2
    adapted.save_pretrained(folder)
    with torch.no_grad():
        logits = adapted(ids(case)).logits
        assert (logits[..., :320] - load(base)(IDS).logits).abs().max() > STRONG
    return logits


def ids(case: Beside) -> torch.Tensor:
    return torch.where(IDS == 319, 325, IDS) if case.vocabulary else IDS


def read(folder: Path, tensors: Tensors, base: Any) -> Reading:
    config = read_peft_config(folder)
    parameters = dict(base.named_parameters())
    return read_modules(
        config,
        METHODS[config.peft_type],
        tensors,
        lambda name: tuple(parameters[name].shape) if name in parameters else None,
    )


def apply(model: Any, change: Change) -> None:
    """Put a changed tensor into transformers' model."""
    module = model.get_submodule(change.tensor.rpartition(".")[0])
    parameter = change.tensor.rpartition(".")[2]
    before = getattr(module, parameter).detach().numpy()
    after = changed(change, before)
    assert isinstance(change, Replaced) or after.shape == before.shape
    is_shared = not isinstance(change, Shifted) and change.keeps_tie
    if is_shared and change.tensor in EMBEDDINGS and model.lm_head.weight is module.weight:
        model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(after.copy()))
    setattr(module, parameter, torch.nn.Parameter(torch.from_numpy(after)))


def logits_of(case: Beside, base: Path, folder: Path) -> torch.Tensor:
    """Those of the base after our changes."""
    model = load(base)
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors, torch.no_grad():
        reading = read(folder, tensors, model)
        assert not reading.problems
        for change in reading.changes:
            apply(model, change)
        return model(ids(case)).logits


def outside_of_later_layers(changes: list[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name in changes if ".1." not in name and ".2." not in name))


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    wanted = train(case, bases[case.model], tmp_path)
    found = logits_of(case, bases[case.model], tmp_path)
    is_enlarged = case.vocabulary and HEAD in case.replaced  # PEFT leaves the output out where it only knows embeddings
    assert found.shape[-1] == (case.vocabulary if is_enlarged else 320)
    assert (found - wanted[..., : found.shape[-1]]).abs().max() < CLOSE


@pytest.mark.parametrize("name", CASES)
def test_changes(name: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    train(case, bases[case.model], tmp_path)
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors:
        changes = read(tmp_path, tensors, load(bases[case.model])).changes
    beside = [change for change in changes if not isinstance(change, LowRank)]
    whole = [change.tensor for change in beside if isinstance(change, Replaced)]
    rows = [change for change in beside if not isinstance(change, Replaced)]
    assert outside_of_later_layers(whole) == tuple(sorted(case.replaced))
    assert tuple(sorted(change.tensor for change in rows)) == tuple(sorted(case.rows))
    assert [change.tensor for change in beside[: len(whole)]] == whole, "rows go into what is whole already"
    if case.model in ("qwen2-tied", "gpt2") and case.config != "LNTuningConfig":
        assert {change.keeps_tie for change in beside if not isinstance(change, Shifted)} == {not case.is_untied}


@pytest.mark.parametrize("name", ["tokens", "trainable tokens", "tokens of both"])
def test_other_tokens_are_noticed(name: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    wanted = train(case, bases[case.model], tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    for key in ("token_indices", "trainable_token_indices"):
        if isinstance(config.get(key), list):
            config[key] = config[key][::-1]
        elif config.get(key):
            config[key]["lm_head"] = [8]
    write_json(tmp_path / "adapter_config.json", config)
    assert (logits_of(case, bases[case.model], tmp_path) - wanted).abs().max() > 100 * CLOSE


def test_untied_rows_would_be_noticed(
    bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["tokens, tied"]
    wanted = train(case, bases[case.model], tmp_path)
    monkeypatch.setattr("converters.methods.trained._Trained._keeps_tie", lambda self, module: False)
    assert (logits_of(case, bases[case.model], tmp_path) - wanted).abs().max() > 100 * CLOSE


def test_a_token_beyond_the_vocabulary_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    train(CASES["tokens"], bases["llama"], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    write_json(tmp_path / "adapter_config.json", {**config, "trainable_token_indices": [3, 320]})
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors:
        (problem,) = read(tmp_path, tensors, load(bases["llama"])).problems
    assert problem.endswith("trains token 320, and there are 320")


def test_values_are_those_of_peft(bases: Mapping[str, Path], tmp_path: Path) -> None:
    """A file in the order of its names, whatever that is: the trained output, not PEFT's copies of it."""
    case = CASES["resized, both"]
    train(case, bases[case.model], tmp_path)
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors:
        reading = read(tmp_path, tensors, load(bases[case.model]))
        stored = {name: tensors.rows(name) for name in tensors.tensors if "lm_head" in name}
        (output,) = (change for change in reading.changes if change.tensor == HEAD)
        assert isinstance(output, Replaced)
        assert np.array_equal(output.load(), stored["base_model.model.lm_head.weight"])
        assert not np.array_equal(output.load(), stored["base_model.model.lm_head.original_module.weight"])
