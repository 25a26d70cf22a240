"""Every PEFT method: the weight that our reading of its tensors gives is the one that PEFT's layer computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, LowRank, Replaced, Shifted, read_modules
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.equivalence import tiny_models
from tests.equivalence.methods import CASES
from tests.equivalence.peft_methods import Case, Floats, base_weight, computed_weight, layers, make_peft

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def base_of(case: Case, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if case.model not in bases:
        bases[case.model] = tiny_models.build(case.model, tmp_path_factory.mktemp(case.model))
    return bases[case.model]


def changed(change: Change, weight: Floats) -> Floats:
    """The base's tensor after a change."""
    if isinstance(change, LowRank):
        b, a = change.load()
        return weight + b @ a
    if isinstance(change, Replaced):
        return change.load()
    if isinstance(change, Shifted):
        return weight + change.load()
    if not change.by_rows:
        return change.apply(weight, 0)
    half = len(weight) // 2
    return np.concatenate([change.apply(weight[:half], 0), change.apply(weight[half:], half)])


def errors(case: Case, base: Path, folder: Path) -> Iterator[tuple[str, float]]:
    """Of every layer that PEFT changes: how far its change is from ours, relative to it."""
    adapted = make_peft(case, base, folder)
    config = read_peft_config(folder)
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors:
        shapes = {f"{name}.weight": base_weight(layer)[0].shape for name, layer in layers(adapted).items()}
        values = {f"{name}.weight": base_weight(layer)[0] for name, layer in layers(adapted).items()}
        reading = read_modules(config, METHODS[config.peft_type], tensors, shapes.get, values.__getitem__)
        assert not reading.problems
        ours = {change.tensor: change for change in reading.changes}
        for name, layer in layers(adapted).items():
            (wanted, wanted_bias), (weight, bias) = computed_weight(layer), base_weight(layer)
            assert np.abs(wanted - weight).max() > 1e-3, "an adapter that does nothing would prove nothing"
            found = changed(ours[f"{name}.weight"], weight) if f"{name}.weight" in ours else weight
            yield name, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - weight))
            found_bias = bias
            if f"{name}.bias" in ours:
                found_bias = changed(ours[f"{name}.bias"], bias[None]).reshape(-1)
            yield f"{name}.bias", float(np.abs(found_bias - wanted_bias).max())


@pytest.mark.parametrize("name", CASES)
def test_layers(name: str, bases: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    case = CASES[name]
    found = dict(errors(case, base_of(case, bases, tmp_path_factory), tmp_path))
    assert found
    assert max(found.values()) < case.tolerance, {key: value for key, value in found.items() if value >= case.tolerance}
