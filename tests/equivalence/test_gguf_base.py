"""A GGUF's own weights in torch compute what llama.cpp computes from that file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.base import convert_base
from converters.base_file import BaseFile
from converters.reader import read_header
from edgelora.errors import ModelFileError
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.gguf_models import write_gguf
from tests.equivalence.tiny_models import TINY, some_ids

pytestmark = pytest.mark.train
Logits = npt.NDArray[np.float32]

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}  # rows that K-quants can take
ROUNDED = (
    ("llama", "f16"), ("llama", "q8_0"), ("llama", "q4_k_m"), ("llama", "q2_k"), ("qwen3", "q8_0"), ("qwen3", "iq4_xs"),
    ("gemma-2", "q4_k_m"), ("gemma-2", "q2_k"), ("phi-3", "q8_0"), ("phi-3", "q2_k"), ("olmo2", "q4_k_m"),
)  # fmt: skip
MINUTES = ("command-r-plus", "exaone-4", "qwen3-next", "qwen3.5", "qwen3.5-moe")  # 64 layers; a slow kernel
N_TOKENS = 24
# Relative to the logits' norm, one token at a time. Two float32 programs that add in another order: measured 3e-7.
EQUAL = 1e-5
# An activation that lies between two values of 8 bits may go to either, which the layers after it then carry on. Of a
# dozen thousand activations of a token, one does in about every third token; the others must be equal.
SHARE_EQUAL = 0.3
# What one such activation does to random weights, measured up to 0.04.
NEAR_A_TIE = 0.2
# Half precision: sums of products of float16 are float16 in part (ggml_vec_dot_f16); measured 8e-4.
HALF = 5e-3
# Activations rounded to 8 bits, half a step of 1/127 of a block's largest, in each of a dozen products of a model
# whose random weights amplify it: measured up to 0.12. Weights that were not quantized are 0.3 to 1.2 away.
ROUNDED_ACTIVATIONS = 0.2


def load(path: Path, config_folder: Path | None = None) -> Any:
    from edgelora.train.base import Placement
    from edgelora.train.gguf_base import GGUFBase
    from tests.equivalence.hf_logits import TableGelu

    model = GGUFBase(path, config_folder).load_model(Placement("cpu", "float32")).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, TableGelu())
    return model


def logits_of(model: Any, ids: list[int]) -> Logits:
    import torch

    with torch.no_grad():
        logits: Logits = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def one_by_one(model: Any, path: Path, ids: list[int]) -> npt.NDArray[np.float64]:
    """Relative difference of torch's logits and llama.cpp's, of each token alone."""
    ours = np.concatenate([logits_of(model, [token]) for token in ids])
    theirs = np.concatenate([llamacpp.logits(path, [token]) for token in ids])
    difference: npt.NDArray[np.float64] = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    return difference


def relative(one: Logits, other: Logits) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in MINUTES else name for name in TINY]
)
def test_every_family_from_its_own_metadata(name: str, tmp_path: Path) -> None:
    folder, tiny = tiny_models.build(name, tmp_path / "model"), TINY[name]
    out = convert_base(folder, tmp_path / "base.gguf", quant="f32").path
    ids = some_ids(folder, tiny.tokens)
    expected = llamacpp.logits(out, ids, context=tiny.context)
    assert expected.std() > 0.05, "logits that are all alike would prove nothing"
    assert float(np.abs(logits_of(load(out), ids) - expected).max()) < tiny.tolerance


@pytest.mark.parametrize(("name", "quant"), ROUNDED)
def test_quantized_weights_are_the_files_own(name: str, quant: str, tmp_path: Path) -> None:
    """With activations rounded as llama.cpp rounds them, the two are equal; without, as near as that rounding."""
    from tests.equivalence.activation_rounding import round_activations

    folder = tiny_models.build(name, tmp_path / "model", **WIDE)
    out, ids = convert_base(folder, tmp_path / "base.gguf", quant=quant).path, some_ids(folder, N_TOKENS)
    model = load(out)
    plain = relative(logits_of(model, ids), llamacpp.logits(out, ids))
    with BaseFile(out) as file:
        round_activations(model, file)
    found = one_by_one(model, out, ids)
    if quant == "f16":
        assert plain < HALF
        assert found.max() < HALF
        return
    assert plain < ROUNDED_ACTIVATIONS
    assert float(np.mean(found < EQUAL)) > SHARE_EQUAL
    assert found.max() < NEAR_A_TIE


@pytest.mark.parametrize("quant", ["q8_0", "q2_k"])
def test_a_damaged_tensor_is_seen(quant: str, tmp_path: Path) -> None:
    """The twin: one row of one matrix of the file is swapped with another after torch has read it."""
    from tests.equivalence.activation_rounding import round_activations

    folder = tiny_models.build("llama", tmp_path / "model", **WIDE)
    out, ids = convert_base(folder, tmp_path / "base.gguf", quant=quant).path, some_ids(folder, N_TOKENS)
    model = load(out)
    with BaseFile(out) as file:
        round_activations(model, file)
    damage(out, "blk.0.ffn_down.weight")
    found = one_by_one(model, out, ids)
    assert float(np.mean(found < EQUAL)) < SHARE_EQUAL


def damage(path: Path, name: str) -> None:
    """Swap the first two rows of a tensor, in place."""
    tensor = read_header(path).tensors[name]
    row = tensor.size_bytes // tensor.shape[0]
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        first, second = file.read(row), file.read(row)
        file.seek(tensor.offset)
        file.write(second + first)


def test_it_is_not_the_unquantized_model(tmp_path: Path) -> None:
    from tests.equivalence.hf_logits import hf_logits

    folder = tiny_models.build("llama", tmp_path / "model", **WIDE)
    out, ids = convert_base(folder, tmp_path / "base.gguf", quant="q2_k").path, some_ids(folder, N_TOKENS)
    served = llamacpp.logits(out, ids)
    assert relative(logits_of(load(out), ids), served) < ROUNDED_ACTIVATIONS
    assert relative(hf_logits(folder, ids), served) > 4 * ROUNDED_ACTIVATIONS


def test_bfloat16_weights_are_the_nearest(tmp_path: Path) -> None:
    """On a GPU the weights are bfloat16: each is the float32 value rounded, so that none is off by more than 2**-9."""
    import torch

    from edgelora.train.base import Placement
    from edgelora.train.gguf_base import GGUFBase

    folder = tiny_models.build("qwen3", tmp_path / "model")
    base = GGUFBase(convert_base(folder, tmp_path / "base.gguf", quant="q8_0").path)
    full, half = (base.load_model(Placement("cpu", dtype)).state_dict() for dtype in ("float32", "bfloat16"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in full.items())


def rewritten(path: Path, out: Path, **changes: Any) -> Path:
    """A copy of an F32 file with other metadata; None takes a key away."""
    header, data = read_header(path), path.read_bytes()
    metadata = {key.replace("__", "."): value for key, value in changes.items()}
    weights = {
        name: np.frombuffer(data, np.float32, int(np.prod(tensor.shape)), tensor.offset).reshape(tensor.shape)
        for name, tensor in header.tensors.items()
    }
    kept = {**header.metadata, **metadata}
    return write_gguf(out, {key: value for key, value in kept.items() if value is not None}, weights)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    folder = tiny_models.build("llama-3", tmp_path / "model")
    return folder, convert_base(folder, tmp_path / "base.gguf", quant="f32").path


def test_a_key_that_no_configuration_gives_is_named(llama: tuple[Path, Path], tmp_path: Path) -> None:
    out = rewritten(llama[1], tmp_path / "odd.gguf", llama__logit_scale=2.0)
    with pytest.raises(ModelFileError, match=r"llama\.logit_scale is 2\.0, and this configuration gives None") as error:
        load(out)
    assert "--base-config" in str(error.value.hint)


def test_keys_that_older_files_lack(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """llama.cpp takes the vocabulary and the rotated part of a head for itself where a file does not say them."""
    out = rewritten(llama[1], tmp_path / "old.gguf", llama__vocab_size=None, llama__rope__dimension_count=None)
    ids = some_ids(llama[0], 50)
    assert float(np.abs(logits_of(load(out), ids) - llamacpp.logits(out, ids)).max()) < 1e-3


def test_the_configuration_may_come_from_a_folder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = llama
    given = tmp_path / "given"
    given.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, given)
    ids = some_ids(folder, 50)
    assert float(np.abs(logits_of(load(out, given), ids) - llamacpp.logits(out, ids)).max()) < 1e-3
    config = json.loads((given / "config.json").read_text())
    (given / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3, "num_attention_heads": 8}))
    with pytest.raises(ModelFileError, match=r"head_count is 4(.|\n)*layer_norm_rms_epsilon is 1e-06"):
        load(out, given)
