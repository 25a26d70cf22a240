"""Adapters made smaller: fewer ranks by energy, and every storage type, with the error that is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from converters.adapter import AdapterOptions, AdapterReport, convert_adapter
from tests.equivalence.outcomes import APPROXIMATE, EXACT, REFUSED, Adapted, Bases, adapt, adapter_outcome
from tests.equivalence.peft_methods import Case
from tests.equivalence.test_peft_table import misreported

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

TOLERANCE = 0.005  # relative error of the change in logits
# Relative error of the change in logits, at most, and of the stored values, at least and at most; uniform rounding of
# 11 bits leaves 2e-4, of 8 bits 1.7e-3, and of 127 steps to the largest of 32 normal values 5e-3.
TYPES = {"f32": (1e-4, 0.0, 0.0), "f16": (2e-3, 1e-4, 5e-4), "bf16": (0.01, 1e-3, 4e-3), "q8_0": (0.02, 3e-3, 0.02)}


def lora(bases: Bases, folder: Path, rank: int, *, decay: float = 1.0) -> Adapted:
    """A LoRA whose ranks have a share of one another's size each."""

    def randomize(name: str, parameter: torch.nn.Parameter) -> None:
        torch.nn.init.normal_(parameter, std=0.1)
        if "lora_B" in name:
            parameter.data *= decay ** torch.arange(rank)

    case = Case("LoraConfig", {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}, randomize=randomize)
    return adapt(case, bases["llama"], folder / "adapter")


def converted(adapted: Adapted, options: AdapterOptions) -> AdapterReport:
    return convert_adapter(adapted.folder, adapted.base.gguf, adapted.beside("adapter"), options, force=True)


def types(path: Path, ending: str) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if tensor.name.endswith(ending)}


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("dtype", TYPES)
def test_types(dtype: str, rank: int, tiny_bases: Bases, tmp_path: Path) -> None:
    adapted = lora(tiny_bases, tmp_path, rank)
    report = converted(adapted, AdapterOptions(dtype))
    most, least_rounding, most_rounding = TYPES[dtype]
    assert least_rounding <= report.max_relative_error <= most_rounding
    assert report.max_relative_error / 2 <= adapted.error(adapter=report.path) < most
    assert types(report.path, "lora_a") == {dtype.upper()}
    fits = rank % 32 == 0 or dtype != "q8_0"
    assert types(report.path, "lora_b") == {dtype.upper() if fits else "F16"}
    assert any("no multiple of 32 values are f16 (rank 8)" in notice for notice in report.notices) != fits


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_reports_what_it_leaves_out(rank: int, tiny_bases: Bases, tmp_path: Path) -> None:
    adapted = lora(tiny_bases, tmp_path, 8)
    outcome = adapter_outcome(adapted, AdapterOptions("f32", rank=rank, max_error=1.0))
    assert outcome.kind == APPROXIMATE
    assert misreported(adapted, outcome) == {}
    assert misreported(adapted, replace(outcome, residual={})) != {}
    assert outcome.stated / 5 < outcome.error < 2 * outcome.stated


def test_a_cut_that_costs_too_much_is_refused(tiny_bases: Bases, tmp_path: Path) -> None:
    outcome = adapter_outcome(lora(tiny_bases, tmp_path, 8), AdapterOptions(rank=7))
    assert outcome.kind == REFUSED
    assert "rank 7 is too low for an error of 1.0%" in outcome.reason
    assert "blk.0.attn_q.weight: " in outcome.reason
    assert "--max-error" in outcome.reason


def test_ranks_that_do_little_are_cut(tiny_bases: Bases, tmp_path: Path) -> None:
    adapted = lora(tiny_bases, tmp_path, 8, decay=0.1)
    outcome = adapter_outcome(adapted, AdapterOptions(rank=4))
    assert outcome.kind == APPROXIMATE, outcome.reason
    assert 0 < outcome.stated < 0.001
    assert outcome.error < TOLERANCE
    assert misreported(adapted, adapter_outcome(adapted, AdapterOptions("f32", rank=4))) == {}


def test_a_rank_that_is_high_enough_changes_nothing(tiny_bases: Bases, tmp_path: Path) -> None:
    adapted = lora(tiny_bases, tmp_path, 4)
    whole = converted(adapted, AdapterOptions()).path.read_bytes()
    report = converted(adapted, AdapterOptions(rank=4))
    assert (report.kind, report.path.read_bytes()) == (EXACT, whole)
