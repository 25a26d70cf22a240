"""Every PEFT method, and everything else that an adapter may be: exact, approximate with a true report, or refused.

The classes and errors are those of measured.json, which the README's tables are made from (`make adapters-table`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from converters.adapter import DEFAULT_MAX_ERROR, AdapterOptions
from converters.methods import METHODS, lora
from tests.contracts.adapter_tables import MEASURED
from tests.equivalence.outcomes import (
    APPROXIMATE,
    EXACT,
    REFUSED,
    Adapted,
    Bases,
    Outcome,
    adapt,
    adapter_outcome,
    merged_outcome,
)
from tests.equivalence.peft_methods import Floats, computed_weight, layers, plain_weight
from tests.equivalence.table_cases import CASES, NO_CHANGE, named_rows, peft_type, save_no_change
from tests.equivalence.table_rows import OTHERS

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

TOLERANCE = 0.005  # relative error of the change in logits; F16 measures 2e-4 to 1e-3, merged ones 1e-6 to 2e-4
AMPLIFIED = 3  # what the network makes of an error in its weights: measured 0.2 to 1.9 times as much in the logits
NOISE = 1e-5  # of a tensor's energy: float32 in PEFT's layers
NOT_IN_PEFT = {"BONE"}  # what PEFT 0.14 to 0.17 saved
MEASUREMENTS: Mapping[str, Mapping[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))
METHOD_ROWS, OTHER_ROWS = MEASUREMENTS["methods"], MEASUREMENTS["others"]


def once_each() -> list[Any]:
    """All cases; those of a method and a base that another stands for already are slow."""
    seen: set[tuple[str, str]] = set()
    found = []
    for name, case in CASES.items():
        is_first = name in named_rows() or (case.config, case.model) not in seen
        seen.add((case.config, case.model))
        found.append(pytest.param(name, marks=() if is_first else pytest.mark.slow))
    return found


def of_kind(kind: str) -> list[Any]:
    return [
        param for param in once_each() if METHOD_ROWS.get(param.values[0], {}).get("adapter", {}).get("kind") == kind
    ]


@pytest.fixture(scope="module")
def adapted(tiny_bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    made: dict[str, Adapted] = {}

    def make(name: str) -> Adapted:
        if name not in made:
            made[name] = adapt(CASES[name], tiny_bases[CASES[name].model], tmp_path_factory.mktemp("case") / "adapter")
        return made[name]

    return make


def test_every_method_of_peft_and_every_case_is_in_a_class() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    registered = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert registered == {peft_type(case) for case in CASES.values()} | set(NO_CHANGE)
    assert registered == {kind for kind in METHODS if kind not in NOT_IN_PEFT}
    assert {kind for kind, method in METHODS.items() if method.read is None} == set(NO_CHANGE)
    assert set(METHOD_ROWS) == set(CASES), "run: make adapters-table"
    assert set(OTHER_ROWS) == set(OTHERS), "run: make adapters-table"
    for row in (*METHOD_ROWS.values(), *OTHER_ROWS.values()):
        assert row["adapter"]["kind"] in (EXACT, APPROXIMATE, REFUSED)
        assert row["merged"]["kind"] in (EXACT, REFUSED)


@pytest.mark.parametrize("name", once_each())
def test_merged(name: str, adapted: Callable[[str], Adapted]) -> None:
    assert METHOD_ROWS[name]["merged"]["kind"] == EXACT
    outcome = merged_outcome(adapted(name))
    assert outcome.kind == EXACT, outcome.reason
    assert outcome.error < TOLERANCE


@pytest.mark.parametrize("name", of_kind(EXACT))
def test_exact_as_an_adapter(name: str, adapted: Callable[[str], Adapted]) -> None:
    outcome = adapter_outcome(adapted(name))
    assert (outcome.kind, outcome.residual) == (EXACT, {}), outcome.reason
    assert outcome.error < TOLERANCE


@pytest.mark.parametrize("name", of_kind(APPROXIMATE))
def test_approximate_as_an_adapter(name: str, adapted: Callable[[str], Adapted]) -> None:
    """Within the error asked for, and exact where that is none."""
    trained = adapted(name)
    outcome = adapter_outcome(trained)
    assert outcome.kind == APPROXIMATE, outcome.reason
    assert 0 < outcome.stated <= DEFAULT_MAX_ERROR
    assert outcome.error < AMPLIFIED * outcome.stated
    everything = adapter_outcome(trained, AdapterOptions("f32", max_error=1e-5))
    assert everything.error < TOLERANCE
    assert outcome.error > everything.error


@pytest.mark.parametrize("name", of_kind(APPROXIMATE))
def test_the_error_that_is_reported_is_true(name: str, adapted: Callable[[str], Adapted]) -> None:
    trained = adapted(name)
    outcome = adapter_outcome(trained, AdapterOptions("f32", rank=2, max_error=1.0))
    assert outcome.kind == APPROXIMATE, outcome.reason
    wrong = misreported(trained, outcome)
    assert wrong == {}
    assert misreported(trained, Outcome(**{**vars(outcome), "residual": {}})) != {}


@pytest.mark.parametrize("name", of_kind(APPROXIMATE))
def test_too_rough_is_refused_with_both_ways_out(name: str, adapted: Callable[[str], Adapted]) -> None:
    outcome = adapter_outcome(adapted(name), AdapterOptions(rank=1))
    assert outcome.kind == REFUSED
    assert "--merge" in outcome.reason
    assert "--max-error" in outcome.reason
    assert re.search(r"- [\w.]+\.weight: [\d.]+% of its change is left out at rank 1", outcome.reason)


@pytest.mark.parametrize("name", of_kind(REFUSED))
def test_refused_as_an_adapter(name: str, adapted: Callable[[str], Adapted]) -> None:
    trained = adapted(name)
    outcome = adapter_outcome(trained)
    assert outcome.kind == REFUSED
    assert set(named_in(outcome.reason)) <= whole_tensors(trained), "another tensor than those that were trained"
    assert count_in(outcome.reason) == len(whole_tensors(trained)), "a tensor is neither named nor counted"
    assert "--merge" in outcome.reason


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_an_adapter_may_be(name: str, tiny_bases: Bases, tmp_path: Path) -> None:
    for outcome, measured in zip(OTHERS[name](tiny_bases, tmp_path), OTHER_ROWS[name].values(), strict=True):
        assert outcome.kind == measured["kind"], outcome.reason
        assert outcome.error < TOLERANCE
        assert outcome.kind != REFUSED or outcome.why == measured["reason"]


@pytest.mark.parametrize("kind", NO_CHANGE)
def test_what_is_no_change_of_weights_is_refused_by_name(kind: str, tiny_bases: Bases, tmp_path: Path) -> None:
    base = tiny_bases["llama"]
    save_no_change(kind, copy.deepcopy(base.network), base.folder, tmp_path / "adapter")
    saved = Adapted(base, tmp_path / "adapter", None, base.logits)
    for outcome in (adapter_outcome(saved), merged_outcome(saved)):
        assert outcome.kind == REFUSED
        assert f"peft_type is {kind!r}, {METHODS[kind].refusal}" in outcome.reason


@pytest.mark.parametrize("outcome_of", [adapter_outcome, merged_outcome])
def test_a_wrong_scale_is_seen(
    outcome_of: Callable[[Adapted], Outcome], adapted: Callable[[str], Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "scale_of", lambda module: module.config["lora_alpha"] / module.config["r"])
    assert outcome_of(adapted("rslora")).error > 20 * TOLERANCE


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "oft"])
@pytest.mark.parametrize("outcome_of", [adapter_outcome, merged_outcome])
def test_a_dropped_module_is_refused(
    name: str, outcome_of: Callable[[Adapted], Outcome], adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    trained = adapted(name)
    damaged = Adapted(trained.base, tmp_path / "damaged", trained.network, trained.effect)
    tensors = load_file(trained.folder / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1.self_attn.v_proj" not in key}
    assert len(kept) < len(tensors)
    damaged.folder.mkdir()
    (damaged.folder / "adapter_config.json").write_bytes((trained.folder / "adapter_config.json").read_bytes())
    save_file(kept, damaged.folder / "adapter_model.safetensors")
    outcome = outcome_of(damaged)
    assert outcome.kind == REFUSED
    assert "layers.1.self_attn.v_proj.weight: no tensor belongs to it, as to other layers" in outcome.reason


def misreported(trained: Adapted, outcome: Outcome) -> dict[str, tuple[float, float]]:
    """Tensors whose reported share is not what the best matrix of the file's rank leaves out of PEFT's change."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(trained.beside("adapter")).tensors}
    wrong = {}
    for name, change in changes(trained).items():
        b, a = (stored[f"{name}.lora_{side}"].astype(np.float64) for side in "ba")
        values = np.square(np.linalg.svd(change.astype(np.float64), compute_uv=False))
        left, reported = values[len(a) :].sum() / values.sum(), outcome.residual.get(name, 0.0)
        missing = 1 - np.square(b @ a).sum() / values.sum()
        if max(abs(left - reported), abs(missing - reported)) > NOISE:
            wrong[name] = (float(left), reported)
    return wrong


def changes(trained: Adapted) -> dict[str, Floats]:
    """GGUF name to what PEFT's layer adds to its base's weight; a GGUF adapter has its rows in another order."""
    names = gguf.get_tensor_name_map(_architecture(trained), trained.base.network.config.num_hidden_layers)
    return {
        f"{names.get_name(name)}.weight": computed_weight(layer)[0] - untouched(trained, name, layer)[0]
        for name, layer in layers(trained.network).items()
    }


def untouched(trained: Adapted, name: str, layer: Any) -> tuple[Floats, Floats]:
    """Weight and bias of a layer in the base; what PEFT calls its base layer it may have changed."""
    return plain_weight(trained.base.network.get_submodule(name), layer.in_features)


def _architecture(trained: Adapted) -> gguf.MODEL_ARCH:
    return {"gpt2": gguf.MODEL_ARCH.GPT2}.get(trained.base.name, gguf.MODEL_ARCH.LLAMA)


def whole_tensors(trained: Adapted) -> set[str]:
    """Biases, norms and the like that PEFT changed."""
    found = set()
    for name, layer in layers(trained.network).items():
        if getattr(layer, "in_features", None) is None:
            found.add(f"{name}.weight")
        elif np.abs(computed_weight(layer)[1] - untouched(trained, name, layer)[1]).max() > 1e-6:
            found.add(f"{name}.bias")
    return found


def named_in(reason: str) -> list[str]:
    return re.findall(r"\n  - ([\w.]+): ", reason)


def count_in(reason: str) -> int:
    more = re.search(r"- and (\d+) more", reason)
    return len(named_in(reason)) + (int(more[1]) if more else 0)
