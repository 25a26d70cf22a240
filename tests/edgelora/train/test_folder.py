"""The folder of a run: what a checkpoint may hold, and what a folder may not be."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora.errors import SettingsError
from edgelora.train.folder import RunFolder
from edgelora.train.report import read_metrics


def test_a_checkpoint_may_hold_folders(tmp_path: Path) -> None:
    """DeepSpeed keeps the states of its processes in one (`global_step3/`), FSDP too."""
    partial = tmp_path / "checkpoints" / ".partial-3" / "checkpoint-3"
    (partial / "global_step3").mkdir(parents=True)
    (partial / "global_step3" / "rank_0.pt").write_bytes(b"states")
    run = RunFolder(tmp_path)
    run.keep_checkpoint(partial, 3)
    assert (run.checkpoint(3) / "global_step3" / "rank_0.pt").read_bytes() == b"states"


def test_a_file_is_no_folder_to_go_on_in(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(SettingsError, match="a file, expected a folder"), RunFolder(path).locked():
        pass
    assert path.read_text() == "mine"


def test_metrics_are_json_whatever_a_loss_becomes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log_metrics({"step": 1, "eval_loss": float("nan"), "grad_norm": float("inf"), "loss": 2.5})
    assert run.metrics_path.read_text() == '{"step": 1, "eval_loss": null, "grad_norm": null, "loss": 2.5}\n'
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.5]
