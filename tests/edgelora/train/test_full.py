"""All weights trained: the folder is a base, and its GGUF computes and answers what torch does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.fingerprint import fingerprint
from edgelora.contract import Contract
from edgelora.errors import SettingsError
from edgelora.template import BUILTIN
from edgelora.train import Recipe, train

from .conftest import chat
from .test_method_runs import SHORT

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# Float32 in torch and in llama.cpp: sums in another order.
SAME_LOGITS = 1e-3


@pytest.fixture(scope="module")
def tuned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "tuned"
    recipe = Recipe(**{**SHORT, "method": "full", "max_steps": 80, "save_steps": 100, "learning_rate": 1e-2})
    report = train(data, str(base), folder, recipe)
    assert report.trained_parameters == report.total_parameters
    assert (report.export, report.loss < 1.0) == ("base", True)
    return folder


def test_the_folder_is_a_model_with_its_tokenizer_and_contract(tuned: Path, base: Path) -> None:
    names = {file.name for file in tuned.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "edgelora.json", "run.json"} <= names
    assert "adapter_config.json" not in names
    assert (tuned / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    contract = Contract.load(tuned)
    assert contract is not None
    assert (contract.base_fingerprint, contract.certificate) == (fingerprint(base), "")
    assert contract.training["method"] == "full"
    assert fingerprint(tuned) != fingerprint(base)  # its norms were trained: adapters of the base do not fit it


def test_its_gguf_computes_what_torch_does(tuned: Path, base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.equivalence import llamacpp

    gguf = convert_base(tuned, tmp_path / "tuned.gguf", quant="f32").path
    ids = list(range(20, 60))
    found = llamacpp.logits(gguf, ids, context=64)
    with torch.no_grad():
        wanted, before = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy()
            for folder in (tuned, base)
        )
    assert np.abs(found - wanted).max() < SAME_LOGITS
    assert np.abs(found - before).max() > 100 * SAME_LOGITS


def test_it_is_chatted_with(tuned: Path, tmp_path: Path) -> None:
    from edgelora import Engine

    gguf = convert_base(tuned, tmp_path / "tuned.gguf", quant="f16").path
    with Engine(gguf, n_ctx=128, threads=1) as engine:
        messages = chat("What colour is lamp 3?", system="Be brief.")
        reply = engine.chat(messages, sampling={"temperature": 0.0, "max_tokens": 24})
    assert reply.text.startswith("Lamp "), reply.text


def test_another_template_goes_along(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(**{**SHORT, "method": "full", "max_steps": 1, "chat_template": "llama2"})
    train(data, str(base), tmp_path / "out", recipe)
    assert (tmp_path / "out/chat_template.jinja").read_text() == BUILTIN["llama2"]
    gguf = convert_base(tmp_path / "out", tmp_path / "out.gguf", quant="f16").path
    from converters.reader import read_header

    assert read_header(gguf).metadata["tokenizer.chat_template"] == BUILTIN["llama2"]


def test_a_finished_model_is_neither_overwritten_nor_trained_again(
    tuned: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tuned, out)
    recipe = Recipe(**json.loads((out / "run.json").read_text())["recipe"])
    with pytest.raises(SettingsError, match="holds a finished run"):
        train(data, str(base), out, recipe)
    report: Any = train(data, str(base), out, recipe, resume=True)
    assert report.notes == ("already finished: nothing to do",)
    assert (report.steps, report.export) == (80, "base")
