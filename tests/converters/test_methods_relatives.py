"""LoRA's variants and relatives out of arrays alone: what does not fit together is named, and nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, LowRank, Reading, Transformed, read_modules
from converters.methods.activations import ACTIVATIONS
from converters.methods.factored import recent
from converters.methods.lora_variants import diagonal
from converters.methods.refused import REFUSED
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.converters.folders import safetensors_bytes, write_json

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 12, 8
Sizes = Mapping[str, tuple[int, ...]]


@contextmanager
def read_arrays(
    folder: Path, method: str, settings: Mapping[str, Any], arrays: Mapping[str, Any], known: bool = True
) -> Iterator[Reading]:
    """What an adapter of one module is read as; the base's layer has 12 outputs and 8 inputs."""
    stored = {f"base_model.model.{MODULE}.{name}": array for name, array in arrays.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    write_json(folder / "adapter_config.json", {"peft_type": method, **settings})
    shapes = {f"{MODULE}.weight": (ROWS, COLUMNS)} if known else {}
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors:
        yield read_modules(read_peft_config(folder), METHODS[method], tensors, shapes.get)


def ones(sizes: Sizes) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ones(shape, np.float32) for name, shape in sizes.items()}


def weight_after(change: Change, weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(change, LowRank):
        b, a = change.load()
        with np.errstate(over="ignore", invalid="ignore"):
            return weight + b @ a
    assert isinstance(change, Transformed)
    return change.apply(weight, 0)


PAIR: Sizes = {"lora_A.weight": (2, COLUMNS), "lora_B.weight": (ROWS, 2)}
ADALORA: Sizes = {"lora_A": (3, COLUMNS), "lora_E": (3, 1), "lora_B": (ROWS, 3)}
LOHA: Sizes = {"hada_w1_a": (ROWS, 2), "hada_w1_b": (2, COLUMNS), "hada_w2_a": (ROWS, 2), "hada_w2_b": (2, COLUMNS)}
LOKR: Sizes = {"lokr_w1": (3, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
GRALORA: Sizes = {"gralora_A": (2, 4, 2), "gralora_B": (2, 2, 6)}
GENERAL: Sizes = {"gralora_A_general.weight": (1, COLUMNS), "gralora_B_general.weight": (ROWS, 1)}
PEANUT: Sizes = {"peanut_A.weight": (2, ROWS), "peanut_B.weight": (ROWS, 2)}
NETWORK: Sizes = {**PEANUT, "peanut_encoders.0.weight": (2, 2), "peanut_decoders.0.weight": (2, 2)}
BLOCKS = {"target_modules_bd_a": ["up_proj"], "nblocks": 2}
DORA: Sizes = {**PAIR, "lora_magnitude_vector": (ROWS,)}

# What is wrong: method, settings, shapes, and a part of the message.
WRONG: Mapping[str, tuple[str, Mapping[str, Any], Sizes, str]] = {
    "dora without lengths": ("LORA", {"r": 2, "use_dora": True}, PAIR, "must be (12,), and is none"),
    "dora of the inputs": (
        "LORA", {"r": 2, "use_dora": True}, {**PAIR, "lora_magnitude_vector": (COLUMNS,)}, "must be (12,), and is (8,)"
    ),
    "lengths without dora": ("LORA", {"r": 2}, DORA, "has a magnitude, and use_dora is off"),
    "dora of one factor": ("LORA", {"r": 2, "use_dora": True}, {"lora_magnitude_vector": (ROWS,)}, "has only its"),
    "two variants": ("LORA", {"r": 2, "use_dora": True, "use_qalora": True}, DORA, "use_dora and use_qalora at once"),
    "dora with a bias": (
        "LORA", {"r": 2, "use_dora": True, "lora_bias": True}, {**DORA, "lora_B.bias": (ROWS,)}, "has a bias on B"
    ),
    "dora of a parameter": (
        "LORA", {"r": 2, "use_dora": True, "target_parameters": ["up_proj.weight"]}, DORA, "names this one's parameters"
    ),
    "a layer and an embedding": ("LORA", {"r": 2}, {**PAIR, "lora_embedding_A": (2, 8)}, "and of an embedding"),
    "arrow": ("LORA", {"r": 2, "arrow_config": {"top_k": 3}}, PAIR, "Arrow picks adapters token by token"),
    "kasa without its diagonal": ("LORA", {"r": 2, "kasa_config": {"beta": 1.0}}, PAIR, "must be (2,), and is none"),
    "kasa that leaves nothing": (
        "LORA", {"r": 8, "kasa_config": {"beta": 1.0}},
        {"lora_A.weight": (8, 8), "lora_B.weight": (12, 8), "lora_diag": (8,)}, "takes 8 of 8 singular values away",
    ),
    "kasa's diagonal alone": ("LORA", {"r": 2}, {**PAIR, "lora_diag": (2,)}, "has a diagonal, and kasa_config is off"),
    "kasa with an unknown key": ("LORA", {"r": 2, "kasa_config": {"cut": 1}}, PAIR, "expected its settings"),
    "group size 0": ("LORA", {"r": 2, "use_qalora": True, "qalora_group_size": 0}, PAIR, "1 or more"),
    "blocks that do not divide": (
        "LORA", {"r": 2, "use_bdlora": {**BLOCKS, "nblocks": 5}}, PAIR, "must be a matrix of 5 blocks"
    ),
    "blocks of both": (
        "LORA", {"r": 2, "use_bdlora": {**BLOCKS, "target_modules_bd_b": ["up_proj"]}}, PAIR, "for A and for B"
    ),
    "blocks that are no number": ("LORA", {"r": 2, "use_bdlora": {"nblocks": "2"}}, PAIR, "1 or more"),
    "blocks with an unknown key": ("LORA", {"r": 2, "use_bdlora": {"blocks": 2}}, PAIR, "expected match_strict"),
    "blocks of other ranks": ("LORA", {"r": 2, "use_bdlora": BLOCKS}, {**PAIR, "lora_B.weight": (12, 3)}, "B 3"),
    "blocks of another rank": ("LORA", {"r": 4, "use_bdlora": BLOCKS}, PAIR, "has rank 2, adapter_config.json says 4"),
    "adalora, other ranks": ("ADALORA", {"init_r": 3}, {**ADALORA, "lora_E": (2, 1)}, "do not fit together"),
    "adalora, kept ranks": (
        "ADALORA", {"init_r": 4, "rank_pattern": {f"{MODULE}.lora_E": [True, False, True, False]}}, ADALORA,
        "has rank 3, adapter_config.json says 2",
    ),
    "adalora, ranks that are no flags": ("ADALORA", {"init_r": 3, "rank_pattern": {"x": [1]}}, ADALORA, "and false"),
    "adalora, alpha 0": ("ADALORA", {"init_r": 3, "lora_alpha": 0}, ADALORA, "expected a number above 0"),
    "adalora, dora": ("ADALORA", {"init_r": 3, "use_dora": True}, ADALORA, "AdaLoRA has no DoRA"),
    "loha, one matrix": ("LOHA", {"r": 2}, {"hada_w1_a": (12, 2)}, "has no w1b, w2a, w2b"),
    "loha, other shapes": ("LOHA", {"r": 2}, {**LOHA, "hada_w2_a": (11, 2)}, "do not fit together"),
    "loha, another rank": ("LOHA", {"r": 3}, LOHA, "says 3"),
    "loha of a convolution": ("LOHA", {"r": 2}, {**LOHA, "hada_t1": (2, 2, 3, 3)}, "hada_t1: no tensor of an adapter"),
    "lokr, nothing for w1": ("LOKR", {"r": 2}, {"lokr_w2": (4, 4)}, "has nothing for its w1"),
    "lokr, both forms": ("LOKR", {"r": 2}, {**LOKR, "lokr_w2": (4, 4)}, "for its w2"),
    "lokr, other ranks": ("LOKR", {"r": 2}, {**LOKR, "lokr_w2_b": (3, 4)}, "w2 has ranks 2 and 3"),
    "lokr, three dimensions": ("LOKR", {"r": 2}, {**LOKR, "lokr_w1": (3, 2, 1)}, "for its w1"),
    "miss, another rank": ("MISS", {"r": 4}, {"miss_block": (3, ROWS)}, "it must be (4, 12)"),
    "miss, a rank above the inputs": ("MISS", {"r": 9}, {"miss_block": (9, ROWS)}, "for a weight (12, 8)"),
    "miss mini that does not divide": (
        "MISS", {"r": 4, "mini_r": 5, "init_weights": "mini"}, {"miss_block": (4, 5)}, "for a weight (12, 8)"
    ),
    "miss bat that does not divide": (
        "MISS", {"r": 3, "init_weights": "bat"}, {"miss_block": (4, 3, 3)}, "cannot be cut into parts (3, 3)"
    ),
    "bone of an unknown kind": ("BONE", {"r": 4, "init_weights": "mini"}, {"bone_block": (4, ROWS)}, "expected one of"),
    "gralora, other parts": ("GRALORA", {"r": 2, "gralora_k": 4}, GRALORA, "are not 4 blocks"),
    "gralora, odd ranks": ("GRALORA", {"r": 3}, {"gralora_A": (2, 4, 3), "gralora_B": (2, 3, 6)}, "of rank 3"),
    "gralora, no general factors": ("GRALORA", {"r": 2, "hybrid_r": 1}, GRALORA, "asks for [(1, 8), (12, 1)]"),
    "gralora, general factors": ("GRALORA", {"r": 2}, {**GRALORA, **GENERAL}, "asks for []"),
    "peanut of an unknown function": ("PEANUT", {"r": 2, "act_fn": "xielu"}, PEANUT, "act_fn is 'xielu': expected"),
    "peanut, deeper than it says": ("PEANUT", {"r": 2}, NETWORK, "has 2 encoders and decoders, and depth 0"),
    "peanut, deeper than it is": ("PEANUT", {"r": 2, "depth": 10**9}, PEANUT, "has 0 encoders and decoders"),
    "peanut, another rank": ("PEANUT", {"r": 2, "depth": 1}, {**NETWORK, "peanut_encoders.0.weight": (2, 3)}, "(2, 3)"),
    "peanut, B of another shape": ("PEANUT", {"r": 2}, {**PEANUT, "peanut_B.weight": (12, 3)}, "are not of rank 2"),
    "supertuning without indices": (
        "SUPERTUNING", {"save_precomputed_indices": False}, {"supertuning_values": (5,)}, "which weights it changes"
    ),
    "supertuning, other counts": (
        "SUPERTUNING", {}, {"supertuning_values": (5,), "supertuning_indices": (4,)}, "(5,) values for (4,) indices"
    ),
    "supra without factors": (
        "SUPERTUNING", {"r": 2}, {"supertuning_values": (0,), "supertuning_indices": (0,)}, "has factors []"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    method, settings, sizes, message = WRONG[name]
    with read_arrays(tmp_path, method, settings, ones(sizes)) as reading:
        assert message in "\n".join(reading.problems)


RIGHT: Mapping[str, tuple[str, Mapping[str, Any], Sizes]] = {
    "lora": ("LORA", {"r": 2}, PAIR),
    "dora": ("LORA", {"r": 2, "use_dora": True}, DORA),
    "dora as a module": ("LORA", {"r": 2, "use_dora": True}, {**PAIR, "lora_magnitude_vector.weight": (ROWS,)}),
    "kasa": ("LORA", {"r": 2, "kasa_config": {}}, {**PAIR, "lora_diag": (2,)}),
    "velora": ("LORA", {"r": 2, "velora_config": {"num_groups": 4}}, {**PAIR, "lora_velora_embed": (2,)}),
    "qa-lora": (
        "LORA", {"r": 2, "use_qalora": True, "qalora_group_size": 2}, {**PAIR, "lora_A.weight": (2, COLUMNS // 2)}
    ),
    "bd-lora": ("LORA", {"r": 2, "use_bdlora": BLOCKS}, {**PAIR, "lora_A.weight": (2, COLUMNS // 2)}),
    "adalora": ("ADALORA", {"init_r": 3}, ADALORA),
    "loha": ("LOHA", {"r": 2}, LOHA),
    "lokr": ("LOKR", {"r": 2}, LOKR),
    "miss": ("MISS", {"r": 4}, {"miss_block": (4, ROWS)}),
    "miss of all inputs": ("MISS", {"r": 8}, {"miss_block": (8, ROWS)}),
    "miss mini": ("MISS", {"r": 4, "mini_r": 2, "init_weights": "mini"}, {"miss_block": (4, 2)}),
    "miss bat": ("MISS", {"r": 4, "init_weights": "bat"}, {"miss_block": (3, 4, 4)}),
    "bone": ("BONE", {"r": 4}, {"bone_block": (4, ROWS)}),
    "bone bat": ("BONE", {"r": 4, "init_weights": "bat"}, {"bone_block": (3, 4, 4)}),
    "gralora": ("GRALORA", {"r": 2}, GRALORA),
    "gralora, hybrid": ("GRALORA", {"r": 2, "hybrid_r": 1}, {**GRALORA, **GENERAL}),
    "peanut": ("PEANUT", {"r": 2}, PEANUT),
    "peanut with a network": ("PEANUT", {"r": 2, "depth": 1}, NETWORK),
    "supertuning": ("SUPERTUNING", {}, {"supertuning_values": (1,), "supertuning_indices": (1,)}),
}  # fmt: skip


def random_arrays(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: np.zeros(shape, np.int64) if "indices" in name else rng.standard_normal(shape).astype(np.float32)
        for name, shape in sizes.items()
    }


@pytest.mark.parametrize("name", RIGHT)
def test_rows_do_not_depend_on_how_they_are_asked_for(name: str, tmp_path: Path) -> None:
    method, settings, sizes = RIGHT[name]
    weight = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    before = weight.copy()
    with read_arrays(tmp_path, method, settings, random_arrays(sizes)) as reading:
        assert not reading.problems
        [change] = reading.changes
        whole = weight_after(change, weight)
        assert whole.shape == weight.shape
        assert whole.dtype == np.float32
        assert np.abs(whole - weight).max() > 1e-3
        assert np.array_equal(weight, before)
        if isinstance(change, Transformed) and change.by_rows:
            parts = [change.apply(weight[row : row + 5], row) for row in range(0, ROWS, 5)]
            np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-6)  # sums in another order


# As factors, and as a sum where these would be no thinner than the weight: r and shapes of both.
TWICE: Mapping[str, tuple[str, Mapping[str, Any], Sizes]] = {
    "loha": ("LOHA", {"r": 3}, {"hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 3), "hada_w2_b": (3, 8)}),
    "lokr": ("LOKR", {"r": 2}, {"lokr_w1": (3, 2), "lokr_w2": (4, 4)}),
    "lokr, decomposed": (
        "LOKR", {"r": 4}, {"lokr_w1_a": (4, 4), "lokr_w1_b": (4, 4), "lokr_w2_a": (3, 4), "lokr_w2_b": (4, 2)}
    ),
    "miss": ("MISS", {"r": 8}, {"miss_block": (8, ROWS)}),
    "gralora": ("GRALORA", {"r": 4, "hybrid_r": 1}, {"gralora_A": (2, 4, 4), "gralora_B": (2, 4, 6), **GENERAL}),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_factors_and_sums_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, settings, sizes = TWICE[name]
    found = []
    for kind in (LowRank, Transformed):
        if kind is LowRank:
            monkeypatch.setattr(f"{METHODS[method].read.__module__}.factored", lambda *of: LowRank(*of[:-1]))
        with read_arrays(tmp_path, method, settings, random_arrays(sizes)) as reading:
            assert not reading.problems
            [change] = reading.changes
            assert isinstance(change, kind)
            found.append(weight_after(change, np.zeros((ROWS, COLUMNS), np.float32)))
        monkeypatch.undo()
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("index", [-1, ROWS * COLUMNS, 2**40])
def test_an_index_beyond_the_weight_is_refused(index: int, tmp_path: Path) -> None:
    arrays = {"supertuning_values": np.ones(2, np.float32), "supertuning_indices": np.array([0, index])}
    with read_arrays(tmp_path, "SUPERTUNING", {}, arrays) as reading:
        assert f"names weight {index} of 96" in reading.problems[0]


def test_an_index_twice_is_added_twice(tmp_path: Path) -> None:
    values = np.array([1, 2, 4], np.float32)
    arrays = {"supertuning_values": values, "supertuning_indices": np.array([95, 3, 95])}
    with read_arrays(tmp_path, "SUPERTUNING", {}, arrays) as reading:
        found = weight_after(reading.changes[0], np.zeros((ROWS, COLUMNS), np.float32))
    assert (found[0, 3], found[-1, -1], np.count_nonzero(found)) == (2, 5, 2)


@pytest.mark.parametrize("name", ["miss", "bone bat", "supertuning"])
def test_sizes_that_only_the_base_knows(name: str, tmp_path: Path) -> None:
    method, settings, sizes = RIGHT[name]
    with read_arrays(tmp_path, method, settings, random_arrays(sizes), known=False) as reading:
        assert "as large as the base's" in reading.problems[0]


def test_a_rank_that_adalora_took_away_is_no_change(tmp_path: Path) -> None:
    sizes = {"lora_A": (0, COLUMNS), "lora_E": (0, 1), "lora_B": (ROWS, 0)}
    settings = {"init_r": 2, "rank_pattern": {f"{MODULE}.lora_E": [False, False]}}
    with read_arrays(tmp_path, "ADALORA", settings, ones(sizes)) as reading:
        assert (list(reading.changes), list(reading.problems)) == ([], [])


def test_infinite_values_make_no_noise(tmp_path: Path) -> None:
    for name, (method, settings, sizes) in RIGHT.items():
        arrays = {key: array * np.float32(1e38) if array.dtype == np.float32 else array
                  for key, array in random_arrays(sizes).items()}  # fmt: skip
        with read_arrays(tmp_path, method, settings, arrays) as reading:
            for change in reading.changes:
                assert weight_after(change, np.zeros((ROWS, COLUMNS), np.float32)).shape == (ROWS, COLUMNS), name


SHAPES = ((), (0,), (1,), (2,), (ROWS,), (2, COLUMNS), (ROWS, 2), (2, 2), (3, 4, 4), (2, 4, 2), (2, 2, 6), (0, 8))


@pytest.mark.parametrize("name", RIGHT)
def test_any_shapes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    method, settings, sizes = RIGHT[name]
    rng = np.random.default_rng(0)
    for _ in range(40):
        chosen = {
            key: SHAPES[rng.integers(len(SHAPES))] if rng.random() < 0.4 else shape for key, shape in sizes.items()
        }
        chosen = {key: shape for key, shape in chosen.items() if rng.random() < 0.9}
        with read_arrays(tmp_path, method, settings, random_arrays(chosen)) as reading:
            assert reading.problems or not chosen or reading.changes
            for change in reading.changes if not reading.problems else ():
                weight = np.ones([size or COLUMNS for size in change.shape], np.float32)
                assert weight_after(change, weight).shape == weight.shape


def test_blocks_stand_on_the_diagonal() -> None:
    found = diagonal(np.arange(8, dtype=np.float32).reshape(4, 2), 2)
    assert found.tolist() == [[0, 1, 0, 0], [2, 3, 0, 0], [0, 0, 4, 5], [0, 0, 6, 7]]


def test_what_was_loaded_is_kept_for_the_next_rows() -> None:
    calls = []

    def load() -> int:
        calls.append(1)
        return 7

    assert (recent(load), recent(load), len(calls)) == (7, 7, 1)


def test_functions_give_float32() -> None:
    values = np.array([-3.0, 0.0, 2.5], np.float32)
    assert {name for name, function in ACTIVATIONS.items() if function(values).dtype != np.float32} == set()


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_no_change_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.read is None
    assert len(method.refusal) > 40
    assert method.refusal[0].islower()
