"""A PEFT configuration of one's own, and what is said or refused before a run begins."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converters.base import convert_base
from converters.merge import Merged, merge
from converters.outlook import outlook
from edgelora.contract import Contract
from edgelora.errors import EdgeloraError, MissingExtraError, SettingsError
from edgelora.train import Recipe, train
from edgelora.train.folder import RunFolder
from edgelora.train.run_facts import RunFacts

from .conftest import Watcher, make_base, write_rows
from .test_method_runs import SHORT

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def recipe(folder: Path, config: Mapping[str, Any], **own: Any) -> Recipe:
    file = folder / "method.json"
    file.write_text(json.dumps(config))
    return Recipe(**{**SHORT, "max_steps": 1, "peft_config": str(file), **own})


def test_what_only_a_base_can_hold_is_merged(base: Path, data: Path, tmp_path: Path) -> None:
    """Trained norms, which no GGUF adapter has a place for: said before the first step, true after the last."""
    from converters.adapter import convert_adapter
    from converters.errors import UnsupportedAdapterError

    seen_before_step_1: list[str] = []
    watcher = Watcher(lambda status: seen_before_step_1.extend(watcher.notes))
    settings = recipe(tmp_path, {"peft_type": "ln_tuning", "target_modules": ["input_layernorm", "norm"]}, max_steps=3)
    report = train(data, str(base), tmp_path / "out", settings, progress=watcher)
    assert report.export == "merge"
    said = next(note for note in watcher.notes if note.startswith("peft-config: becomes part of a GGUF base"))
    assert "model.layers.0.input_layernorm.weight: it was trained as a whole" in said
    assert said in seen_before_step_1
    with pytest.raises(UnsupportedAdapterError, match="trained as a whole"):
        convert_adapter(tmp_path / "out", base, tmp_path / "adapter.gguf")
    gguf = convert_base(base, tmp_path / "base.gguf", quant="f16").path
    merge(gguf, [Merged(tmp_path / "out")], tmp_path / "merged.gguf")


def test_what_nothing_here_runs_is_refused_before_the_base_is_loaded(base: Path, data: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4})
    watcher = Watcher()
    with pytest.raises(SettingsError, match="puts trained vectors before the text") as caught:
        train(data, str(base), tmp_path / "out", settings, progress=watcher)
    assert "--torch-only" in caught.value.hint
    assert (watcher.notes, (tmp_path / "out").exists()) == ([], False)


def test_what_the_converter_refuses_is_refused_before_training(base: Path, data: Path, tmp_path: Path) -> None:
    """PSOFT is read by no converter; of a method that is, one layer may still have no place."""
    config = {"peft_type": "PSOFT", "r": 4, "target_modules": ["q_proj"]}
    with pytest.raises(SettingsError, match=r"becomes nothing that llama\.cpp runs"):
        train(data, str(base), tmp_path / "out", recipe(tmp_path, config))
    watcher = Watcher()
    alone = recipe(tmp_path, config, torch_only=True, certificate_probes=4)
    report = train(data, str(base), tmp_path / "alone", alone, progress=watcher)
    assert report.export == "refused"
    contract = Contract.load(tmp_path / "alone")
    assert contract is not None
    assert contract.certificate == ""  # nothing will replay it
    assert outlook(tmp_path / "alone", base).kind == "refused"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "has no peft_type"),
        ({"peft_type": "LORE", "r": 4}, "this PEFT has no method 'LORE'|knows no method 'LORE'"),
        ({"peft_type": "LORA", "ranks": 4, "alpha": 2}, "LoraConfig has no alpha, ranks"),
        ({"peft_type": "LORA", "init_lora_weights": "corda"}, "CorDA begins with covariances"),
        ({"peft_type": "ADALORA", "total_step": 4}, "a training loop of its own: its ranks are moved between layers"),
        ({"peft_type": "LORA", "kasa_config": {"beta": 0.1}}, "a training loop of its own: it adds two penalties"),
        ({"peft_type": "LORA", "target_modules": ["query"]}, "PEFT cannot put peft-config on this base: .*query"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1], "use_dora": True}, "PEFT refuses it|cannot put"),
    ],
)
def test_files_that_describe_nothing(
    config: Mapping[str, Any], message: str, base: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        train(data, str(base), tmp_path / "out", recipe(tmp_path, config))


def test_a_file_that_has_changed_does_not_go_on(base: Path, data: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path, {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"})
    train(data, str(base), tmp_path / "out", settings)
    (tmp_path / "elsewhere.json").write_text((tmp_path / "method.json").read_text())
    moved = replace(settings, peft_config=str(tmp_path / "elsewhere.json"))
    assert train(data, str(base), tmp_path / "out", moved, resume=True).notes == ("already finished: nothing to do",)
    other = recipe(tmp_path, {"peft_type": "LORA", "r": 8, "target_modules": "all-linear"})
    with pytest.raises(SettingsError, match="the file of --peft-config is not the same"):
        train(data, str(base), tmp_path / "out", other, resume=True)


@pytest.mark.parametrize(
    ("own", "module", "message"),
    [
        ({"method": "qlora"}, "bitsandbytes", "--method qlora needs bitsandbytes"),
        ({"liger": True}, "liger_kernel", "--liger needs liger-kernel"),
        ({"attention": "flash_attention_2"}, "flash_attn", "--attention flash_attention_2 needs flash-attn"),
        ({"report_to": "tensorboard,wandb"}, "wandb", "--report-to wandb needs wandb"),
    ],
)
def test_packages_of_single_settings_are_named(
    own: Mapping[str, Any],
    module: str,
    message: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=message) as caught:
        train(data, str(base), tmp_path / "out", Recipe(**{**SHORT, **own}))
    assert caught.value.hint.startswith("pip install ")


def test_an_implementation_of_attention_reaches_the_model(base: Path, data: Path, tmp_path: Path) -> None:
    from edgelora.train.base import find_base, placement

    for attention, wanted in (("eager", "eager"), ("sdpa", "sdpa")):
        model = find_base(str(base)).load_model(placement(Recipe(attention=attention)))
        assert model.config._attn_implementation == wanted


def test_a_loss_that_is_no_number_names_the_step_and_its_rows(data: Path, tmp_path: Path) -> None:
    broken = make_base(tmp_path / "broken", norms=float("inf"))
    settings = Recipe(**{**SHORT, "rank": 4, "batch_size": 2})
    with pytest.raises(EdgeloraError, match=r"became nan at step 1 of 4, on .*train\.jsonl:\d+, .*train\.jsonl:\d+$"):
        train(data, str(broken), tmp_path / "out", settings)


def test_a_gradient_that_is_no_number_stops_before_it_spoils_the_weights(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of these rows is a number; that of the next ones would not be, whatever they are."""
    from edgelora.train.run_trainer import RunTrainer

    n_batches, training_step = 0, RunTrainer.training_step

    def spoilt(trainer: Any, *args: Any, **options: Any) -> Any:
        nonlocal n_batches
        n_batches += 1
        loss = training_step(trainer, *args, **options)
        if n_batches == 3:
            next(p for p in trainer.model.parameters() if p.grad is not None).grad[0] = float("nan")
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", spoilt)
    settings = Recipe(**{**SHORT, "rank": 4, "batch_size": 1, "gradient_accumulation": 2, "save_steps": 1})
    with pytest.raises(EdgeloraError, match=r"norm of the gradient became nan at step 2 of 4, on (\S+:\d+, )\S+:\d+$"):
        train(data, str(base), tmp_path / "out", settings)
    assert RunFolder(tmp_path / "out").checkpoint_steps() == [1]


def test_a_model_that_cannot_be_reckoned_with_is_trained_all_the_same(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unheard_of(*_arguments: Any, **_options: Any) -> Any:
        raise NotImplementedError("aten::_unheard_of on tensors without values")

    monkeypatch.setattr("edgelora.train.run_reporting.memory_plan", unheard_of)
    train(data, str(base), tmp_path / "out", Recipe(**{**SHORT, "rank": 4, "max_steps": 1}))
    assert RunFacts.load(tmp_path / "out").plan == {}


def test_rows_beyond_the_models_window_are_told_and_refused_where_it_has_no_positions(
    base: Path, tmp_path: Path
) -> None:
    """GPT-2 would end with an IndexError, and a rotary model learns at positions that it never saw."""
    from transformers import GPT2Config, GPT2LMHeadModel

    data = write_rows(tmp_path / "long.jsonl", [{"prompt": "Hi", "completion": "word " * 200}])
    settings = Recipe(**{**SHORT, "rank": 4, "max_steps": 1, "max_length": 1024})
    report = train(data, str(base), tmp_path / "rotary", settings)
    assert any(re.search(r"a row has \d+ tokens, .* 256 at most: --max-length 256 cuts", note) for note in report.notes)
    learned = shutil.copytree(base, tmp_path / "learned")
    tiny = {
        "vocab_size": 320,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }
    GPT2LMHeadModel(GPT2Config(**tiny)).save_pretrained(learned)
    with pytest.raises(
        SettingsError, match=r"training data: a row has \d+ tokens, and learned .* 64 at most"
    ) as caught:
        train(data, str(learned), tmp_path / "out", settings)
    assert "--max-length 64" in caught.value.hint
    assert not (tmp_path / "out").exists()
