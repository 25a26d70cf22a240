"""A plain LoRA's tensors are those of llama.cpp's own convert_lora_to_gguf.py, with the scale in B."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters.adapter import AdapterOptions, convert_adapter
from converters.architectures import llama
from tests.equivalence.outcomes import Adapted, Bases, adapt
from tests.equivalence.peft_methods import Case, Floats
from tests.equivalence.reference import reference_root

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

RANK, ALPHA = 4, 10
SCALE = np.float32(ALPHA / RANK)
# Where a row of theirs is ours. Of experts it knows layers one by one, which transformers has no more.
MODELS = ("llama", "qwen2", "phi-3", "gemma-2", "qwen3-moe")
LAYERS = {"qwen3-moe": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ONE_PROCESS = """
import json, os, runpy, sys
SCRIPT = sys.argv[1]
sys.path.insert(0, os.path.dirname(SCRIPT))
for base, adapter, out in json.loads(sys.argv[2]):
    sys.argv = ["convert_lora_to_gguf.py", "--base", base, "--outfile", out, "--outtype", "f32", adapter]
    runpy.run_path(SCRIPT, run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(tiny_bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Adapted]:
    folder = tmp_path_factory.mktemp("adapters")
    settings = {"r": RANK, "lora_alpha": ALPHA}
    return {
        name: adapt(
            Case("LoraConfig", {**settings, "target_modules": LAYERS.get(name, "all-linear")}, model=name),
            tiny_bases[name],
            folder / name,
        )
        for name in MODELS
    }


@pytest.fixture(scope="module")
def theirs(trained: Mapping[str, Adapted]) -> Mapping[str, Path]:
    script = reference_root() / "convert_lora_to_gguf.py"
    outs = {name: each.beside("theirs") for name, each in trained.items()}
    jobs = [[str(each.base.folder), str(each.folder), str(outs[name])] for name, each in trained.items()]
    command = [sys.executable, "-c", ONE_PROCESS, str(script), json.dumps(jobs)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return outs


def tensors(path: Path) -> dict[str, Floats]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def difference(adapted: Adapted, reference: Path) -> float:
    """The largest of any value, with their scale applied."""
    out = adapted.beside("ours")
    convert_adapter(adapted.folder, adapted.base.gguf, out, AdapterOptions("f32"), force=True)
    ours, expected = tensors(out), tensors(reference)
    assert set(ours) == set(expected)
    fields = gguf.GGUFReader(reference).fields
    assert fields["adapter.lora.alpha"].contents() == ALPHA
    assert gguf.GGUFReader(out).fields["adapter.lora.alpha"].contents() == 0
    scaled = {name: data * (SCALE if name.endswith("lora_b") else 1) for name, data in expected.items()}
    return max(float(np.abs(ours[name] - scaled[name]).max()) for name in ours)


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_equal(name: str, trained: Mapping[str, Adapted], theirs: Mapping[str, Path]) -> None:
    assert difference(trained[name], theirs[name]) == 0.0


def test_rows_in_another_order_are_seen(
    trained: Mapping[str, Adapted], theirs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "interleaved_rows", lambda heads, head_dim: np.arange(heads * head_dim))
    assert difference(trained["llama"], theirs["llama"]) > 0.01
