"""LoRA initialisations of PEFT: what moved a part of the base into the adapter is undone, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import adapter_file
from converters.adapter import AdapterOptions, convert_adapter
from converters.base import convert_base
from converters.errors import UnsupportedAdapterError
from converters.initialisation import FOLDERS
from tests.equivalence.initialisations import UNDONE_BY_PEFT, initialised, loftq
from tests.equivalence.outcomes import EXACT, REFUSED, Adapted, Bases, adapter_outcome, merged_outcome
from tests.equivalence.peft_methods import LINEARS

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

TOLERANCE = 0.005  # relative error of the change in logits; measured 1e-6 to 9e-5 in F32
EFFECT = 0.01  # of the logits' size, at least
F32 = AdapterOptions("f32")
INITS = (True, "gaussian", "orthogonal", "mica", "eva", "pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
PLAIN = (True, "gaussian", "orthogonal", "mica", "eva")
RECOMPUTED = ("pissa", "olora")
PATTERNS: Mapping[str, Any] = {
    "r": 6, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 2}, "target_modules": list(LINEARS)
}  # fmt: skip


def adapted(init: Any, bases: Bases, folder: Path, **settings: Any) -> Adapted:
    found = initialised(init, bases["llama"], folder, **settings)
    assert np.linalg.norm(found.effect) > EFFECT * np.linalg.norm(found.base.logits)
    return found


def error(found: Adapted, options: AdapterOptions = F32) -> float:
    outcome = adapter_outcome(found, options)
    assert outcome.kind == EXACT, outcome.reason
    return outcome.error


@pytest.mark.parametrize("init", [init for init in INITS if init not in PLAIN])
def test_with_the_initial_state(init: Any, tiny_bases: Bases, tmp_path: Path) -> None:
    assert error(adapted(init, tiny_bases, tmp_path), AdapterOptions("f32", initial=tmp_path / "initial")) < TOLERANCE


@pytest.mark.parametrize("init", UNDONE_BY_PEFT)
def test_initial_states_beside_are_found(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    (tmp_path / "initial").rename(found.folder / FOLDERS[0])
    assert error(found) < TOLERANCE
    merged = merged_outcome(found)
    assert (merged.kind, merged.error < TOLERANCE) == (EXACT, True)


@pytest.mark.parametrize("init", [*PLAIN, *RECOMPUTED])
def test_without(init: Any, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    assert error(found) < TOLERANCE
    assert merged_outcome(found).error < TOLERANCE


@pytest.mark.parametrize("init", RECOMPUTED)
@pytest.mark.parametrize("rslora", [False, True])
def test_every_module_has_its_own_scale(init: str, rslora: bool, tiny_bases: Bases, tmp_path: Path) -> None:
    assert error(adapted(init, tiny_bases, tmp_path, use_rslora=rslora, **PATTERNS)) < TOLERANCE


@pytest.mark.parametrize("init", RECOMPUTED)
def test_recomputed_from_a_hugging_face_base(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    assert found.error(adapter=_converted(found, found.base.folder)) < TOLERANCE


@pytest.mark.parametrize("init", UNDONE_BY_PEFT)
def test_what_peft_undid_is_plain(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = replace(adapted(init, tiny_bases, tmp_path), folder=tmp_path / "converted")
    assert json.loads((found.folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert error(found) < TOLERANCE


@pytest.mark.parametrize("init", UNDONE_BY_PEFT)
def test_taken_for_a_plain_one_it_would_be_wrong(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    _configure(found.folder, init_lora_weights=True)
    assert adapter_outcome(found, F32).error > 20 * TOLERANCE


@pytest.mark.parametrize("init", sorted(set(UNDONE_BY_PEFT) - set(RECOMPUTED)))
def test_without_what_is_needed_it_is_refused(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    for outcome in (adapter_outcome(found), merged_outcome(found)):
        assert outcome.kind == REFUSED
        assert f"init_lora_weights is '{init}'" in outcome.reason
        assert "--initial" in outcome.reason
        assert "path_initial_model_for_weight_conversion" in outcome.reason


@pytest.mark.parametrize("init", RECOMPUTED)
def test_nothing_is_recomputed_from_a_quantized_base(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    halved = convert_base(found.base.folder, tmp_path / "f16.gguf", quant="f16").path
    quantized = convert_base(found.base.folder, tmp_path / "q8_0.gguf", quant="q8_0").path
    for base, why in ((halved, "is in half precision"), (quantized, "was quantized")):
        outcome = adapter_outcome(replace(found, base=replace(found.base, gguf=base)))
        assert outcome.kind == REFUSED
        assert f"{base} {why}" in outcome.reason
    with_initial = adapter_outcome(
        replace(found, base=replace(found.base, gguf=quantized)), AdapterOptions(initial=tmp_path / "initial")
    )
    assert with_initial.kind == EXACT


@pytest.mark.parametrize("init", PLAIN)
def test_an_initial_state_that_moved_nothing_is_refused(init: Any, tiny_bases: Bases, tmp_path: Path) -> None:
    """B @ A of it is zero, or was never taken out of the base: taken off, it would leave another adapter."""
    found = adapted(init, tiny_bases, tmp_path)
    assert error(found) < TOLERANCE
    outcome = adapter_outcome(found, AdapterOptions(initial=tmp_path / "initial"))
    assert outcome.kind == REFUSED
    assert f"and its own, {init!r}, did not" in outcome.reason


def test_another_adapters_initial_state_is_refused(tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted("pissa", tiny_bases, tmp_path / "own")
    adapted("pissa", tiny_bases, tmp_path / "fewer", target_modules=list(LINEARS[1:]))
    initialised("pissa", tiny_bases["qwen3"], tmp_path / "other")
    for name, reason in (("fewer", "q_proj.weight: is in one of the adapter and"), ("other", "its initial state (")):
        outcome = adapter_outcome(found, AdapterOptions(initial=tmp_path / name / "initial"))
        assert outcome.kind == REFUSED
        assert reason in outcome.reason


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_dora_on_a_moved_base_is_refused(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    """Its lengths are of the base that the initialisation left: no change of the released one says the same."""
    found = adapted(init, tiny_bases, tmp_path, use_dora=True)
    for options in (AdapterOptions(initial=tmp_path / "initial"), *([AdapterOptions()] if init == "pissa" else [])):
        outcome = adapter_outcome(found, options)
        assert outcome.kind == REFUSED
        assert f"q_proj.weight: init_lora_weights is '{init}', and its change is no plain LoRA" in outcome.reason


def test_loftq_is_refused_and_converts_against_the_base_it_made(tiny_bases: Bases, tmp_path: Path) -> None:
    found = loftq(tiny_bases["llama"], tmp_path)
    for options in (AdapterOptions(), AdapterOptions(initial=tmp_path / "initial")):
        outcome = adapter_outcome(found, options)
        assert outcome.kind == REFUSED
        assert "Save that base too" in outcome.reason
    _configure(found.folder, init_lora_weights=True)
    rounded = convert_base(tmp_path / "base", tmp_path / "base.gguf", quant="f32").path
    adapter = _converted(found, rounded)
    assert replace(found, base=replace(found.base, gguf=rounded)).error(adapter=adapter) < TOLERANCE
    assert found.error(adapter=adapter) > 20 * TOLERANCE


def _converted(found: Adapted, base: Path) -> Path:
    return convert_adapter(found.folder, base, found.beside("adapter"), F32, force=True).path


def _configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("init", UNDONE_BY_PEFT)
def test_what_cancels_is_not_lost_in_f16(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    """B @ A - B0 @ A0 is a twentieth of either: what F16 rounds of them would be 1 % of it."""
    found = adapted(init, tiny_bases, tmp_path)
    assert error(found, AdapterOptions(initial=tmp_path / "initial")) < TOLERANCE
    assert error(replace(found, folder=tmp_path / "converted"), AdapterOptions()) < TOLERANCE


def test_a_coarse_file_would_be_seen(tiny_bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_file, "_amplification", lambda pair, first, second: 1.0)
    found = replace(adapted("pissa", tiny_bases, tmp_path), folder=tmp_path / "converted")
    assert error(found, AdapterOptions()) > TOLERANCE


def _damage(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("init", RECOMPUTED)
@pytest.mark.parametrize("options", [AdapterOptions(), AdapterOptions(rank=2, max_error=1.0)])
def test_values_that_are_no_numbers_are_named(
    init: str, options: AdapterOptions, tiny_bases: Bases, tmp_path: Path
) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    _damage(found.folder, lambda tensors: {name: values * float("nan") for name, values in tensors.items()})
    outcome = adapter_outcome(found, options)
    assert outcome.kind == REFUSED
    assert "blk.0.attn_q.weight: A holds NaN or infinite values" in outcome.reason


@pytest.mark.parametrize("init", RECOMPUTED)
def test_another_base_is_refused_with_both_sides(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    found = adapted(init, tiny_bases, tmp_path)
    for outcome_of in (adapter_outcome, merged_outcome):
        outcome = outcome_of(replace(found, base=tiny_bases["phi-2"]))
        assert outcome.kind == REFUSED
        assert "gate_proj.weight: no tensor of a phi2 model" in outcome.reason
        outcome = outcome_of(replace(found, base=tiny_bases["qwen3"]))
        assert outcome.kind == REFUSED
        assert "the adapter is for 64x64, blk.0.attn_q.weight is 128x64" in outcome.reason


@pytest.mark.parametrize("init", RECOMPUTED)
def test_more_ranks_than_a_layer_has(init: str, tiny_bases: Bases, tmp_path: Path) -> None:
    """k_proj has 32 rows: PEFT's A and B are padded here as a hostile file's may be."""
    found = adapted(init, tiny_bases, tmp_path)

    def padded(name: str, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, 0, 0, 76) if "lora_A" in name else (0, 76))

    _damage(found.folder, lambda tensors: {name: padded(name, values) for name, values in tensors.items()})
    _configure(found.folder, r=80, lora_alpha=160)
    outcome = adapter_outcome(found, F32)
    assert outcome.kind == EXACT, outcome.reason


def test_a_base_without_a_largest_part_is_refused(tiny_bases: Bases, tmp_path: Path) -> None:
    """All singular values of a rotation are alike: which of them PEFT took, its library alone knows."""
    found = adapted("pissa", tiny_bases, tmp_path)
    base = tmp_path / "rotations"
    shutil.copytree(found.base.folder, base)
    tensors = load_file(base / "model.safetensors")
    rotation = torch.linalg.qr(torch.randn(64, 64)).Q.contiguous()
    square = {name: rotation.clone() for name in tensors if name.endswith(("q_proj.weight", "o_proj.weight"))}
    save_file({**tensors, **square}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedAdapterError, match="do not stand apart") as caught:
        convert_adapter(found.folder, base, tmp_path / "adapter.gguf")
    assert "--initial" in caught.value.hint
