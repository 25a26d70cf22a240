"""Every method of the table, end to end: trained for a few steps, converted, verified on the base as F16.

Two paths are compared: what PEFT computes with the trained folder, and llama.cpp with the GGUF file made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.base import convert_base
from edgelora.adapter_conversion import AdapterRequest, convert_adapter_source
from edgelora.adapter_ref import AdapterRef
from edgelora.contract import Contract
from edgelora.store import Store
from edgelora.train import METHODS, Recipe, TrainReport, train
from edgelora.train.methods import EXPORTS
from edgelora.verify import VerifySettings, verify

from .conftest import Watcher

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TRAINING: Mapping[str, Any] = {
    "max_steps": 4,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "learning_rate": 1e-2,
    "save_steps": 100,
    "certificate_probes": 4,
}
# Small enough for matrices of 16 rows: of LoHa and LoKr, products of ranks.
OWN: Mapping[str, Mapping[str, Any]] = {
    **{name: {"rank": 4} for name in METHODS},
    "ia3": {"learning_rate": 0.2},
    "loha": {"rank": 3, "learning_rate": 0.1},
    "lokr": {"rank": 2, "learning_rate": 0.1},
    "oft": {"block_size": 8},
    "vera": {"rank": 8, "learning_rate": 0.2},
    "full": {},
    "peft-config": {},
}
KINDS = {"adapter": "exact", "approximate": "approximate"}
# A GGUF adapter holds A and B as F16 (2**-11 each), which a strong adapter multiplies through two layers; what is
# approximated may be off by 1 % in each tensor, and through two layers by a little more.
ERRORS = {"adapter": 5e-3, "approximate": 3e-2}
MOVED = 1e-3  # of the logits: training did something


@dataclass(frozen=True)
class Trained:
    folder: Path
    report: TrainReport
    watcher: Watcher


Train = Callable[[str], Trained]


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(base, tmp_path_factory.mktemp("gguf") / "tiny.gguf", quant="f16").path


@pytest.fixture(scope="module")
def gguf_f32(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(base, tmp_path_factory.mktemp("gguf") / "tiny-f32.gguf", quant="f32").path


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a method once."""
    runs: dict[str, Trained] = {}

    def of(name: str) -> Trained:
        if name not in runs:
            folder, watcher = tmp_path_factory.mktemp("trained") / name, Watcher()
            settings = {**TRAINING, **OWN[name], "method": name}
            if name == "peft-config":
                file = folder.parent / "hra.json"
                file.write_text(json.dumps({"peft_type": "hra", "r": 4, "target_modules": "all-linear"}))
                settings["peft_config"] = str(file)
            runs[name] = Trained(folder, train(data, str(base), folder, Recipe(**settings), progress=watcher), watcher)
        return runs[name]

    return of


def effect_in_torch(base: Path, adapter: Path, ids: list[int], **options: Any) -> npt.NDArray[np.float32]:
    """How PEFT's adapter changes the logits, float32 (tokens, vocabulary)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        bare = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, adapter).eval()(tokens, **options).logits
    change: npt.NDArray[np.float32] = (adapted - bare)[0].numpy()
    return change


def relative(error: npt.NDArray[np.float32], of: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.trains_base])
def test_a_method_becomes_what_it_says(
    name: str, trained: Train, base: Path, gguf: Path, gguf_f32: Path, tmp_path: Path
) -> None:
    from tests.equivalence import llamacpp

    run, method = trained(name), METHODS[name]
    made = tmp_path / f"{name}.gguf"
    report = convert_adapter_source(run.folder, made, AdapterRequest(base=base), Store(tmp_path / "store"))
    export = run.report.export
    assert method.exports_to in (export, "asked")
    assert report.kind == KINDS[export]
    if name in ("pissa", "olora", "loftq"):  # what they began with has cancelled out before F16 could round it
        assert report.dtype == "f16"
    assert any(note.startswith(f"{name}: {EXPORTS[export]}") for note in run.watcher.notes)  # said before the steps

    verified = verify(AdapterRef(name, made), gguf, VerifySettings(threads=1))
    assert verified.passed, verified.failed
    # An activated LoRA is no change of a weight on its own: there, the weights are not sampled.
    assert [check.name for check in verified.unchecked] == (["weights"] if name == "alora" else [])

    ids = list(range(20, 60))
    contract = Contract.load(run.folder)
    assert contract is not None
    begins = 0
    if name == "alora":
        config = json.loads((run.folder / "adapter_config.json").read_text())
        begins = 10
        ids[begins : begins + len(config["alora_invocation_tokens"])] = config["alora_invocation_tokens"]
    wanted = effect_in_torch(base, run.folder, ids)
    found = llamacpp.logits(gguf_f32, ids, made, context=64, begins=begins) - llamacpp.logits(gguf_f32, ids, context=64)
    assert np.abs(wanted).max() > MOVED
    assert relative(found - wanted, wanted) < ERRORS[export]
