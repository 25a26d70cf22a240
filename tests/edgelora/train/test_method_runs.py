"""Methods that begin in their own way: interrupted, killed and gone on with, they end as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.train import Recipe, TrainStatus, train
from edgelora.train.folder import RunFolder

from .conftest import Watcher
from .test_run import SAME_RUN, largest_difference

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SHORT: Mapping[str, Any] = {
    "max_steps": 4,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "certificate_probes": 0,
}
MOVED = 1e-3


def result(folder: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    (file,) = [*folder.glob("adapter_model.safetensors"), *folder.glob("model.safetensors")]
    tensors: Mapping[str, Any] = load_file(file)
    return tensors


def stop_after(step: int) -> Watcher:
    return Watcher(lambda status: signal.raise_signal(signal.SIGINT) if status.step == step else None)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("pissa", {"rank": 4}),
        ("eva", {"rank": 4}),
        ("loftq", {"rank": 4}),
        ("lora+", {"rank": 4}),
        ("full", {}),
        pytest.param("olora", {"rank": 4}, marks=pytest.mark.slow),
        pytest.param("qdora", {"rank": 4}, marks=pytest.mark.slow),
        pytest.param("vera", {"rank": 8}, marks=pytest.mark.slow),
        pytest.param("oft", {"block_size": 8}, marks=pytest.mark.slow),
        pytest.param("ia3", {}, marks=pytest.mark.slow),
        pytest.param("alora", {"rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_ends_the_same(
    method: str, own: Mapping[str, Any], base: Path, data: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method=method, **SHORT, **own)
    train(data, str(base), tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt, match="Step 2 of 4 is kept"):
        train(data, str(base), tmp_path / "broken", recipe, progress=stop_after(2))
    report = train(data, str(base), tmp_path / "broken", recipe, resume=True)
    assert "going on after step 2" in report.notes
    whole, resumed = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert largest_difference(whole, resumed) < SAME_RUN
    first = train(data, str(base), tmp_path / "first", Recipe(**{**SHORT, **own, "method": method, "max_steps": 2}))
    assert first.steps == 2
    assert largest_difference(whole, result(tmp_path / "first")) > MOVED  # the steps after the break count


@pytest.mark.parametrize(("method", "is_new"), [("pissa", True), ("olora", True), ("lora", False)])
def test_what_an_initialisation_took_from_the_base_is_given_back(
    method: str, is_new: bool, base: Path, data: Path, tmp_path: Path
) -> None:
    """PEFT's own adapter of a run with almost no learning rate changes nothing of the released base."""
    import json

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    still = {**SHORT, "learning_rate": 1e-9, "max_steps": 1, "rank": 4}
    train(data, str(base), tmp_path / "out", Recipe(method=method, **still))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8 if is_new else 4, True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        bare = model(ids).logits
        adapted = PeftModel.from_pretrained(model, tmp_path / "out").eval()(ids).logits
    assert float((adapted - bare).abs().max()) < 1e-4  # float32's rounding of what was taken and put back


def test_a_rank_that_a_layer_does_not_have_is_refused_before_training(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="pissa begins with as many singular values as ranks, and k_proj, v_proj"):
        train(data, str(base), tmp_path / "out", Recipe(method="pissa", **{**SHORT, "rank": 17}))
    assert not (tmp_path / "out/adapter_config.json").exists()


KILLED = """
import sys
from pathlib import Path
from edgelora.train import Recipe, train

class Steps:
    def note(self, text): pass
    def update(self, status): print("step", status.step, flush=True)

recipe = Recipe(**{settings})
train(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), recipe, progress=Steps())
"""


def test_kill_9_loses_at_most_save_steps(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "method": "pissa", "rank": 4, "save_steps": 5, "max_steps": 24}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(settings=settings), str(data), str(base), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 13"):
            process.kill()
            break
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL
    kept = RunFolder(tmp_path / "killed").checkpoint_steps()
    assert kept[-1] >= 10  # the process may have done some steps more until it was gone
    seen: list[TrainStatus] = []
    report = train(data, str(base), tmp_path / "killed", Recipe(**settings), resume=True, progress=Watcher(seen.append))
    assert (seen[0].step, report.steps) == (kept[-1] + 1, 24)
    train(data, str(base), tmp_path / "whole", Recipe(**settings))
    assert largest_difference(result(tmp_path / "whole"), result(tmp_path / "killed")) < SAME_RUN


def test_an_evaluation_does_not_change_a_run_on_a_quantized_base(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="qlora", **{**SHORT, "rank": 4, "max_steps": 3})
    train(data, str(base), tmp_path / "alone", recipe)
    train(data, str(base), tmp_path / "watched", replace(recipe, eval_steps=1), eval_data=data)
    assert largest_difference(result(tmp_path / "alone"), result(tmp_path / "watched")) < SAME_RUN
