"""The best checkpoint by the loss on held-out rows, and when a run stops early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgelora.contract import Contract
from edgelora.errors import SettingsError
from edgelora.train import Recipe, train
from edgelora.train.folder import RunFolder
from edgelora.train.progress import SilentProgress

from .conftest import chat, read_metrics, write_rows
from .test_method_runs import result, stop_after
from .test_run import SAME_RUN, largest_difference

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

# So fast that the loss on other rows soon rises.
RECIPE = Recipe(
    rank=4,
    max_steps=12,
    batch_size=4,
    gradient_accumulation=1,
    learning_rate=0.2,
    scheduler="constant",
    warmup_ratio=0.0,
    save_steps=5,
    eval_steps=1,
    certificate_probes=0,
    keep_best=True,
)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"messages": chat(f"Who made lamp {n}?", "Nobody knows that any more.")} for n in range(4)]
    return write_rows(tmp_path_factory.mktemp("held-out") / "rows.jsonl", rows)


def evaluations(folder: Path) -> Mapping[int, float]:
    return {line["step"]: line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line}


def test_the_best_checkpoint_is_what_a_run_ends_with(base: Path, data: Path, held_out: Path, tmp_path: Path) -> None:
    report = train(data, str(base), tmp_path / "best", RECIPE, eval_data=held_out)
    seen = evaluations(tmp_path / "best")
    step = min(seen, key=lambda each: seen[each])
    assert 1 <= step < 12, "the loss has to rise again for this to show anything"
    assert (report.best_step, report.steps) == (step, 12)
    assert report.eval_loss == pytest.approx(seen[step], abs=SAME_RUN)
    assert any(note.startswith(f"step {step} of 12 had the lowest eval loss") for note in report.notes)
    contract = Contract.load(tmp_path / "best")
    assert contract is not None
    assert contract.training["best_step"] == step
    run = RunFolder(tmp_path / "best")
    assert step in run.checkpoint_steps()  # kept, though others came later
    assert largest_difference(result(run.path), result(run.checkpoint(step))) == 0
    last = replace(RECIPE, keep_best=False)
    train(data, str(base), tmp_path / "last", last, eval_data=held_out)
    assert largest_difference(result(run.path), result(tmp_path / "last")) > 1e-3


def test_a_run_that_gets_no_better_stops_and_resuming_changes_nothing(
    base: Path, data: Path, held_out: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, keep_best=False, early_stopping_patience=2, max_steps=40)
    report = train(data, str(base), tmp_path / "early", recipe, eval_data=held_out)
    assert report.best_step is not None
    assert report.steps == report.best_step + 2 < 40
    assert any(note.startswith("stopped early") for note in report.notes)
    with pytest.raises(KeyboardInterrupt):
        train(
            data, str(base), tmp_path / "broken", recipe, eval_data=held_out, progress=stop_after(report.best_step + 1)
        )
    resumed = train(data, str(base), tmp_path / "broken", recipe, eval_data=held_out, resume=True)
    assert (resumed.steps, resumed.best_step) == (report.steps, report.best_step)
    assert largest_difference(result(tmp_path / "early"), result(tmp_path / "broken")) < SAME_RUN
    # killed after it had stopped, before the adapter was saved
    (tmp_path / "broken/adapter_model.safetensors").unlink()
    again = train(data, str(base), tmp_path / "broken", recipe, eval_data=held_out, resume=True)
    assert (again.steps, again.best_step) == (report.steps, report.best_step)
    assert largest_difference(result(tmp_path / "early"), result(tmp_path / "broken")) < SAME_RUN


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState

    from edgelora.train.run_callback import RunCallback

    callback, state = RunCallback(RunFolder(tmp_path), RECIPE, SilentProgress()), TrainerState()
    for step, loss in enumerate((float("nan"), 3.0, float("nan"), 2.0, 2.5), start=1):
        state.global_step = step
        callback.on_evaluate(None, state, TrainerControl(), {"eval_loss": loss})
    assert (state.best_global_step, state.best_metric) == (4, 2.0)


def test_there_is_no_best_without_evaluation_data(base: Path, data: Path, tmp_path: Path) -> None:
    recipes: list[Any] = [RECIPE, replace(RECIPE, keep_best=False, early_stopping_patience=3)]
    for recipe in recipes:
        with pytest.raises(SettingsError, match="lowest loss on evaluation data, and there is none") as caught:
            train(data, str(base), tmp_path / "out", recipe)
        assert "--eval-data" in caught.value.hint
    with pytest.raises(SettingsError, match="eval_steps is given, and there is no evaluation data"):
        train(data, str(base), tmp_path / "out", replace(RECIPE, keep_best=False))
    rare = train(data, str(base), tmp_path / "rare", replace(RECIPE, max_steps=2, eval_steps=9), eval_data=data)
    assert rare.best_step == 2  # a run ends with an evaluation
