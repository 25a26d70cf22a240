"""Training on a GGUF's own weights: the same run as on a folder, and an adapter that finds its way back to the file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.base import convert_base
from converters.fingerprint import fingerprint
from converters.reader import read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.contract import Contract
from edgelora.conversion import convert
from edgelora.errors import ModelFileError, SettingsError
from edgelora.store import Store
from edgelora.train import Recipe, TrainStatus, train
from edgelora.train.gguf_base import GGUFBase
from edgelora.verify import verify
from tests.edgelora.train.conftest import Watcher, make_base
from tests.equivalence.gguf_models import write_gguf

pytestmark = pytest.mark.train
STEPS = 4


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """With dropout, which a certificate must not see."""
    return Recipe(
        rank=4, max_steps=STEPS, batch_size=4, gradient_accumulation=1, learning_rate=1e-2, save_steps=2,
        logging_steps=1, dropout=0.2, certificate_probes=2, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(base, tmp_path_factory.mktemp("gguf") / "tiny-q4_0.gguf", quant="q4_0").path


@pytest.fixture(scope="module")
def finished(gguf: Path, data: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "lamps"
    train(data, str(gguf), out, recipe)
    return out


def test_the_adapter_knows_its_base(finished: Path, base: Path, gguf: Path) -> None:
    """The fingerprint is that of the folder and of every quantization; the file is named for who converts it."""
    contract = Contract.load(finished)
    assert contract is not None
    assert contract.base_fingerprint == fingerprint(base) == fingerprint(gguf)
    assert contract.certificate
    named = json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(gguf.resolve())


def test_it_converts_and_verifies_without_a_word_about_its_base(finished: Path, gguf: Path, tmp_path: Path) -> None:
    report = convert(finished, tmp_path / "lamps.gguf", store=Store(tmp_path / "store"))
    assert getattr(report, "kind", "") == "exact"
    checks = verify(AdapterRef("lamps", tmp_path / "lamps.gguf"), gguf)
    assert checks.passed, checks.failed
    weights = next(check for check in checks.checks if check.name == "weights")
    assert weights.outcome == "ok"


def test_a_certificate_is_of_the_quantized_base(finished: Path, base: Path, gguf: Path, tmp_path: Path) -> None:
    """What was recorded in torch is nearer to the file that was trained on than to the model that it was made from."""
    convert(finished, tmp_path / "lamps.gguf", store=Store(tmp_path / "store"))
    before = convert_base(base, tmp_path / "tiny-f32.gguf", quant="f32").path
    assert 0 < 5 * base_divergence(tmp_path / "lamps.gguf", gguf) < base_divergence(tmp_path / "lamps.gguf", before)


def base_divergence(adapter: Path, base: Path) -> float:
    """KL of the bare base here from what the certificate recorded of it, in nats a token."""
    report = verify(AdapterRef("lamps", adapter), base)
    return next(check.number for check in report.checks if check.name == "kl" and check.number is not None)


def test_a_run_goes_on_as_if_it_had_not_stopped(
    finished: Path, gguf: Path, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    def stop(status: TrainStatus) -> None:
        if status.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data, str(gguf), tmp_path / "run", recipe, progress=Watcher(stop))
    train(data, str(gguf), tmp_path / "run", recipe, resume=True)
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (finished, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(resumed[name], values, rtol=0, atol=1e-6)


def test_another_quantization_is_another_run(finished: Path, base: Path, data: Path, recipe: Recipe) -> None:
    other = convert_base(base, finished.parent / "tiny-f16.gguf", quant="f16").path
    with pytest.raises(SettingsError, match=r"tiny-f16\.gguf"):
        train(data, str(other), finished, recipe, resume=True)


def test_its_tokenizer_is_servings(gguf: Path, base: Path) -> None:
    from transformers import AutoTokenizer

    from edgelora.train.gguf_tokenizer import load_tokenizer

    ours, theirs = load_tokenizer(gguf), AutoTokenizer.from_pretrained(base)
    text = "<|im_start|>user\nHow long does it last?  30 hours<|im_end|>"
    assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (theirs.bos_token, theirs.eos_token, theirs.pad_token)
    assert ours.chat_template == theirs.chat_template


def changed(path: Path, out: Path, key: str, value: object) -> Path:
    """A copy of an F32 file with another value of one key."""
    header, data = read_header(path), path.read_bytes()
    weights = {
        name: np.frombuffer(data, np.float32, int(np.prod(tensor.shape)), tensor.offset).reshape(tensor.shape)
        for name, tensor in header.tensors.items()
    }
    return write_gguf(out, {**header.metadata, key: value}, weights)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.pre", "qwen2", "cuts .* into"),
        ("tokenizer.ggml.model", "bert", "'bert', and gpt2, llama, gemma4 can be made"),
    ],
)
def test_a_tokenizer_that_cuts_otherwise_is_refused(
    base: Path, tmp_path: Path, key: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the vocabulary's own words are believed, and what comes of them is compared with llama.cpp."""
    from converters import vocabulary_json
    from converters.pretokenizers import CUTS, Cut
    from edgelora.train.gguf_tokenizer import load_tokenizer

    out = changed(convert_base(base, tmp_path / "f32.gguf", quant="f32").path, tmp_path / "odd.gguf", key, value)
    monkeypatch.setattr(vocabulary_json, "CUTS", {**CUTS, "qwen2": Cut((r"[\s\S]",))})
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(out)
    assert "--base-config" in caught.value.hint


def test_a_folder_for_a_folder_is_refused(base: Path, data: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--base-config goes with a GGUF base"):
        train(data, str(base), tmp_path / "out", replace(recipe, base_config=str(base)))


def test_the_configuration_of_another_model_is_refused(gguf: Path, data: Path, recipe: Recipe, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", chat_template=None)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    with pytest.raises(ModelFileError, match=r"head_count is 4, and this configuration gives 2"):
        train(data, str(gguf), tmp_path / "out", replace(recipe, base_config=str(other), chat_template="chatml"))


def test_a_folder_without_a_configuration_is_told(gguf: Path, base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "tokenizer.json", tmp_path)
    with pytest.raises(ModelFileError, match="configuration cannot be read"):
        GGUFBase(gguf, tmp_path).load_config()
