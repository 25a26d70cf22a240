"""Methods that scale and turn weights out of arrays alone: what they compute, and what they refuse by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, LowRank, Reading, Replaced, Shifted, Transformed, read_modules
from converters.methods.blocks import cayley, skew_symmetric, times_blocks
from converters.methods.boft import permutation
from converters.methods.hra import reflections
from converters.methods.oft import nearest_divisor, series
from converters.methods.osf import largest
from converters.peft_config import read_peft_config
from converters.safetensors_file import read_tensors
from tests.converters.folders import safetensors_bytes, write_json

MODULE = "model.layers.0.mlp.up_proj"
EMBED = "model.embed_tokens"
ROWS, COLUMNS = 12, 8
Array = np.ndarray[Any, Any]
Sizes = Mapping[str, tuple[int, ...]]
WEIGHT = np.random.default_rng(5).standard_normal((ROWS, COLUMNS)).astype(np.float32)
CLOSE = 1e-5  # of values of size 1 in float32


@contextmanager
def read_arrays(
    folder: Path, method: str, settings: Mapping[str, Any], arrays: Mapping[str, Any], module: str = MODULE
) -> Iterator[Reading]:
    """What an adapter is read as; the base's layer has 12 outputs and 8 inputs, its embeddings 20 tokens."""
    stored = {name if "base_model" in name else f"base_model.model.{module}.{name}": arrays[name] for name in arrays}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(stored))
    write_json(folder / "adapter_config.json", {"peft_type": method, **settings})
    shapes = {f"{MODULE}.weight": (ROWS, COLUMNS), f"{EMBED}.weight": (20, COLUMNS)}
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors:
        yield read_modules(read_peft_config(folder), METHODS[method], tensors, shapes.get)


def ones(sizes: Sizes) -> dict[str, Array]:
    """Arrays of ones; those that PEFT calls zeros are."""
    return {name: np.full(shape, 0 if name.endswith("zeros") else 1, np.float32) for name, shape in sizes.items()}


def applied(change: Change, weight: Array = WEIGHT) -> Array:
    if isinstance(change, LowRank):
        b, a = change.load()
        return np.asarray(weight + b @ a)
    assert isinstance(change, Transformed)
    before = weight.copy()
    if change.by_rows:
        pieces = [change.apply(weight[start : start + 5], start) for start in range(0, len(weight), 5)]
        found = np.concatenate(pieces)
    else:
        found = change.apply(weight, 0)
    assert found.dtype == np.float32
    assert np.array_equal(weight, before), "never writes into its argument"
    return found


OFT = {"oft_block_size": 4, "peft_version": "0.21.2"}
R: Sizes = {"oft_R.weight": (2, 6)}
BOFT: Sizes = {"boft_R": (1, 2, 4, 4), "boft_s": (ROWS, 1)}
DELORA: Sizes = {
    "delora_A": (2, COLUMNS), "delora_B": (ROWS, 2), "delora_lambda": (1,), "delora_w_norm": (COLUMNS,)
}  # fmt: skip
HIRA: Sizes = {"hira_A": (2, COLUMNS), "hira_B": (ROWS, 2)}
NONE: Sizes = {"glora_C.zeros": (COLUMNS, 1), "glora_D.zeros": (ROWS,), "glora_E.zeros": (ROWS,)}
GLORA: Sizes = {"glora_A.X": (ROWS, 1), "glora_B.X": (ROWS, 1), **NONE}
VECTOR = {"config_A_B": "vector"}
OSF: Sizes = {"osf_svd_params.U_low": (ROWS, 3), "osf_svd_params.S_low": (3,), "osf_svd_params.V_low": (3, COLUMNS)}
DEFT: Sizes = {"deft_P": (ROWS, 2), "deft_R": (2, COLUMNS)}
ROAD: Sizes = {"road_theta": (6,), "road_alpha": (6,)}

# What is wrong: method, settings, shapes, and a part of the message.
WRONG: Mapping[str, tuple[str, Mapping[str, Any], Sizes, str]] = {
    "ia3 of inputs": ("IA3", {"feedforward_modules": []}, {"ia3_l": (1, 8)}, "those of its outputs, (any, 1)"),
    "ia3 of outputs": ("IA3", {"feedforward_modules": ["up_proj"]}, {"ia3_l": (12, 1)}, "of its inputs, (1, any)"),
    "ia3, a vector": ("IA3", {}, {"ia3_l": (12,)}, "its factors are (12,)"),
    "ia3, an expression of exponential time": (
        "IA3", {"feedforward_modules": "(a*)*b"}, {"ia3_l": (12, 1)}, "quantifiers are nested"
    ),
    "ia3, an unknown setting": ("IA3", {"scale": 2}, {"ia3_l": (12, 1)}, "unknown setting scale = 2"),
    "oft before it was changed": ("OFT", {"r": 2}, R, "by a PEFT before 0.15"),
    "oft with the former series": ("OFT", {"oft_block_size": 4, "use_cayley_neumann": True}, R, "since PEFT 0.18"),
    "oft with the series of 0.17": ("OFT", {**OFT, "peft_version": "0.17.1"}, R, "since PEFT 0.18"),
    "oft with an endless series": ("OFT", {**OFT, "num_cayley_neumann_terms": 10**9}, R, "100 are the most"),
    "oft, values of no block": ("OFT", OFT, {"oft_R.weight": (2, 7)}, "7 values are not the upper half"),
    "oft, blocks of another size": ("OFT", {**OFT, "oft_block_size": 8}, R, "size 4, adapter_config.json makes it 8"),
    "oft, another number of blocks": ("OFT", {**OFT, "oft_block_size": 0, "r": 4}, R, "makes it 2"),
    "oft, both": ("OFT", {**OFT, "r": 2}, R, "r is 2 and oft_block_size 4"),
    "oft, blocks shared and not": ("OFT", {**OFT, "block_share": True}, R, "has 2 blocks, and block_share means one"),
    "oft, a shared block that does not divide": (
        "OFT", {**OFT, "block_share": True, "oft_block_size": 3}, {"oft_R.weight": (1, 3)}, "have size 3"
    ),
    "oft of both kinds": ("OFT", OFT, {**R, "oft_embedding_R.weight": (2, 6)}, "a linear layer and an embedding"),
    "oft, a convolution": ("OFT", OFT, {"oft_R.weight": (2, 6, 1)}, "has shape (2, 6, 1)"),
    "boft without its scale": ("BOFT", {}, {"boft_R": (1, 2, 4, 4)}, "has no scale"),
    "boft, no squares": ("BOFT", {}, {**BOFT, "boft_R": (1, 2, 4, 3)}, "which are not square"),
    "boft, another size": ("BOFT", {"boft_block_size": 8}, BOFT, "boft_block_size is 8"),
    "boft, another number": ("BOFT", {"boft_block_size": 0, "boft_block_num": 4}, BOFT, "boft_block_num 4"),
    "boft, more factors": ("BOFT", {}, {**BOFT, "boft_R": (2, 2, 4, 4)}, "boft_n_butterfly_factor is 1"),
    "boft, too many factors": (
        "BOFT", {"boft_n_butterfly_factor": 3}, {**BOFT, "boft_R": (3, 2, 4, 4)}, "no 3 factors of a butterfly"
    ),
    "hra, another rank": ("HRA", {"r": 4}, {"hra_u": (8, 3)}, "vectors has shape (8, 3), expected (any, 4)"),
    "hra, too many vectors": ("HRA", {"r": 9, "apply_GS": True}, {"hra_u": (8, 9)}, "9 vectors of 8 values"),
    "road, groups that do not divide": ("ROAD", {"group_size": 8}, ROAD, "6 angles, which do not go with road_1"),
    "road, an odd group": ("ROAD", {"group_size": 3}, ROAD, "in groups of 3"),
    "road, half an angle": (
        "ROAD", {"variant": "road_4", "group_size": 2}, {"road_theta": (7,), "road_alpha": (7,)}, "has 7 angles"
    ),
    "road, fewer factors": ("ROAD", {"group_size": 4}, {**ROAD, "road_alpha": (5,)}, "alpha has shape (5,)"),
    "road, an unknown variant": ("ROAD", {"variant": "road_3"}, ROAD, "expected one of 'road_1'"),
    "delora without lengths": ("DELORA", {"r": 2}, {"delora_A": (2, 8), "delora_B": (12, 2)}, "has no lambda, norms"),
    "delora, another rank": ("DELORA", {"r": 3}, DELORA, "a has shape (2, 8), expected (3, any)"),
    "delora, other columns": ("DELORA", {"r": 2}, {**DELORA, "delora_w_norm": (7,)}, "norms has shape (7,)"),
    "hira, one factor": ("HIRA", {"r": 2}, {"hira_A": (2, 8)}, "has no b"),
    "hira, another rank": ("HIRA", {"r": 3}, HIRA, "has rank 2, adapter_config.json says 3"),
    "hira, other ranks": ("HIRA", {"r": 2}, {**HIRA, "hira_B": (12, 3)}, "b has shape (12, 3)"),
    "hira of embeddings": ("HIRA", {"r": 2}, {"hira_embedding_A": (2, 12)}, "is an embedding"),
    "glora, stored otherwise": ("GLORA", {}, GLORA, "A is stored as ['X'], config_A_B is lora"),
    "glora, a part of it": ("GLORA", VECTOR, {k: v for k, v in GLORA.items() if "E" not in k}, "E is stored as []"),
    "glora, two forms": ("GLORA", VECTOR, {**GLORA, "glora_A.zeros": (ROWS, COLUMNS)}, "A is stored as ['X', 'zeros']"),
    "glora, other rows": ("GLORA", VECTOR, {**GLORA, "glora_B.X": (11, 1)}, "B.X has shape (11, 1)"),
    "glora, a scalar": ("GLORA", VECTOR, {**GLORA, "glora_A.X": ()}, "A.X has shape ()"),
    "osf, other ranks": ("OSF", {}, {**OSF, "osf_svd_params.V_low": (2, 8)}, "right has shape (2, 8)"),
    "osf, no values": ("OSF", {}, {k: v for k, v in OSF.items() if "S_" not in k}, "has no values"),
    "osf that leaves nothing": (
        "OSF", {},
        {"osf_svd_params.U_low": (12, 8), "osf_svd_params.S_low": (8,), "osf_svd_params.V_low": (8, 8)},
        "leaves none to the base",
    ),
    "deft, another rank": ("DEFT", {"r": 3}, DEFT, "says rank 3"),
    "deft without R": ("DEFT", {"r": 2}, {"deft_P": (12, 2)}, "has no R, and para is False"),
    "deft with R": ("DEFT", {"r": 2, "para": True}, DEFT, "has an R, and para is True"),
    "deft, other ranks": ("DEFT", {"r": 2}, {**DEFT, "deft_R": (3, 8)}, "r has shape (3, 8)"),
    "beft, a column": ("BEFT", {}, {"beft_bias": (12, 1)}, "shift has shape (12, 1)"),
    "norms of nothing": ("LN_TUNING", {}, {"ln_tuning_layers.weight": (0,)}, "weight has shape (0,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    method, settings, sizes, message = WRONG[name]
    with read_arrays(tmp_path, method, settings, ones(sizes)) as reading:
        assert any(message in problem for problem in reading.problems), reading.problems


def test_zeros_of_glora_that_are_none_are_refused(tmp_path: Path) -> None:
    arrays = ones({name: shape for name, shape in GLORA.items() if "_C." not in name})
    arrays["glora_C.zeros"] = np.ones((COLUMNS, 1), np.float32)
    with read_arrays(tmp_path, "GLORA", {**VECTOR, "config_C": "none"}, arrays) as reading:
        assert "C holds other than zeros" in reading.problems[0]


def test_zeros_of_glora_change_nothing(tmp_path: Path) -> None:
    settings, arrays = {"config_A_B": "none", "config_C": "none", "config_D_E": "none"}, {
        **{f"glora_{letter}.zeros": np.zeros((ROWS, COLUMNS), np.float32) for letter in "AB"},
        **{name: np.zeros(shape, np.float32) for name, shape in NONE.items()},
    }  # fmt: skip
    with read_arrays(tmp_path, "GLORA", settings, arrays) as reading:
        assert not reading.problems
        (change,) = reading.changes
        assert np.array_equal(applied(change), WEIGHT)


def test_the_factors_of_ia3_scale_rows_and_biases_or_columns(tmp_path: Path) -> None:
    factors = np.arange(ROWS, dtype=np.float32)[:, None]
    with read_arrays(tmp_path, "IA3", {"feedforward_modules": ["gate_proj"]}, {"ia3_l": factors}) as reading:
        weight, bias = reading.changes
        assert np.array_equal(applied(weight), WEIGHT * factors)
        assert isinstance(bias, Transformed)
        assert bias.if_there
        assert np.array_equal(bias.apply(WEIGHT[:, :1].T, 0), (WEIGHT[:, :1] * factors).T)
    factors = np.arange(COLUMNS, dtype=np.float32)[None]
    with read_arrays(tmp_path, "IA3", {"feedforward_modules": ["proj"]}, {"ia3_l": factors}) as reading:
        (weight,) = reading.changes
        assert np.array_equal(applied(weight), WEIGHT * factors)


def test_a_shared_block_of_an_unknown_base_has_no_size(tmp_path: Path) -> None:
    arrays = ones({"oft_R.weight": (1, 6)})
    with read_arrays(tmp_path, "OFT", {**OFT, "block_share": True}, arrays, "model.layers.9.o_proj") as reading:
        (change,) = reading.changes
        assert change.shape == (None, None)
        assert applied(change).shape == WEIGHT.shape


@pytest.mark.parametrize(
    ("columns", "given", "taken"), [(64, 32, 32), (64, 13, 16), (96, 7, 6), (96, 200, 96), (7, 3, 1)]
)
def test_blocks_that_do_not_divide_are_made_to(columns: int, given: int, taken: int) -> None:
    assert nearest_divisor(columns, given) == taken


def test_rotations_keep_lengths_and_the_series_nears_them() -> None:
    skew = skew_symmetric(np.random.default_rng(1).normal(0, 0.1, (3, 10)).astype(np.float32), 5)
    rotations = cayley(skew)
    assert np.abs(rotations @ rotations.swapaxes(1, 2) - np.eye(5)).max() < 1e-12
    # PEFT's series is that of the inverse: its terms have the other sign
    far, near = (np.abs(series(skew, terms) - cayley(-skew)).max() for terms in (3, 30))
    assert near < 1e-9 < far


def test_values_beyond_any_precision_give_nan_and_no_traceback() -> None:
    huge = skew_symmetric(np.full((2, 6), 3e38, np.float32), 4) * 1e200
    with np.errstate(all="ignore"):
        assert cayley(huge).shape == (2, 4, 4)
        assert np.isnan(largest(np.full((3, 4), np.nan, np.float32), 1)).all()


def test_one_block_is_repeated() -> None:
    block = np.random.default_rng(1).standard_normal((1, 4, 4)).astype(np.float32)
    assert np.allclose(times_blocks(WEIGHT, block), times_blocks(WEIGHT, np.repeat(block, 2, axis=0)))


def test_the_butterfly_brings_halves_of_blocks_together() -> None:
    assert permutation(8, 2, 0).tolist() == list(range(8))
    assert permutation(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permutation(16, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize("is_orthogonal", [False, True])
def test_reflections_are_those_one_after_another(is_orthogonal: bool) -> None:
    vectors = np.random.default_rng(2).standard_normal((6, 4))
    u, t = reflections(vectors, is_orthogonal)
    wanted = np.eye(6)
    directions = np.linalg.qr(vectors)[0] if is_orthogonal else vectors / np.linalg.norm(vectors, axis=0)
    for vector in directions.T:
        wanted = wanted @ (np.eye(6) - 2 * np.outer(vector, vector))
    assert np.abs(np.eye(6) - u @ t @ u.T - wanted).max() < 1e-12


def test_a_reflection_without_direction_is_nan(tmp_path: Path) -> None:
    with read_arrays(tmp_path, "HRA", {"r": 2}, {"hra_u": np.zeros((COLUMNS, 2), np.float32)}) as reading:
        (change,) = reading.changes
        assert np.isnan(applied(change)).all()


@pytest.mark.parametrize("weight", [WEIGHT, np.ascontiguousarray(WEIGHT.T)])
def test_what_osf_keeps_is_the_best_approximation(weight: Array) -> None:
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    assert np.abs(largest(weight, 3) - (u[:, :3] * s[:3]) @ vt[:3]).max() < CLOSE
    assert np.abs(largest(weight, 4) - (u[:, :3] * s[:3]) @ vt[:3]).max() > 0.1


def test_a_rank_of_delora_counts(tmp_path: Path) -> None:
    with read_arrays(tmp_path, "DELORA", {"r": 2}, ones(DELORA)) as reading:
        (change,) = reading.changes
        assert isinstance(change, LowRank)
        # lambda / rank / (|a| |b|) for each of two ranks
        assert np.allclose(applied(change) - WEIGHT, 1 / np.sqrt(ROWS * COLUMNS), atol=CLOSE)


def test_a_bias_is_shifted(tmp_path: Path) -> None:
    with read_arrays(tmp_path, "BEFT", {}, ones({"beft_bias": (1, ROWS)})) as reading:
        (change,) = reading.changes
        assert isinstance(change, Shifted)
        assert (change.tensor, change.shape, change.load().tolist()) == (f"{MODULE}.bias", (ROWS,), [1.0] * ROWS)


TOKENS = {"token_indices": [4, 2]}
DELTA: Sizes = {"trainable_tokens_delta": (2, COLUMNS)}
LORA: Sizes = {"lora_A.weight": (8, COLUMNS), "lora_B.weight": (ROWS, 8)}
LEFT_OVER: Mapping[str, tuple[str, Mapping[str, Any], Sizes, str]] = {
    "no tokens": ("TRAINABLE_TOKENS", {}, DELTA, "does not say which tokens these are (None)"),
    "another number": ("TRAINABLE_TOKENS", {"token_indices": [1]}, DELTA, "has shape (2, 8) for 1 tokens"),
    "negative": ("TRAINABLE_TOKENS", {"token_indices": [1, -1]}, DELTA, "expected a list of token ids"),
    "one twice": ("TRAINABLE_TOKENS", {"token_indices": [1, 1]}, DELTA, "names a token twice ([1, 1])"),
    "beyond the base": ("TRAINABLE_TOKENS", {"token_indices": [1, 20]}, DELTA, "trains token 20, and there are 20"),
    "beyond the new vocabulary": (
        "TRAINABLE_TOKENS", {"token_indices": [1, 22]}, {**DELTA, "base_layer.weight": (22, COLUMNS)}, "there are 22"
    ),
    "of another module": (
        "LORA", {"trainable_token_indices": {"lm_head": [1, 2]}}, {"token_adapter.trainable_tokens_delta": (2, 8)},
        "does not say which tokens",
    ),
    "a whole layer and rows": (
        "TRAINABLE_TOKENS", TOKENS, {**DELTA, "weight": (20, COLUMNS)}, "a whole layer beside a change of it"
    ),
    "both names": ("TRAINABLE_TOKENS", TOKENS, {**DELTA, "token_adapter.trainable_tokens_delta": (2, 8)}, "no tensor"),
    "a whole layer and a change": ("LORA", {}, {**LORA, "weight": (ROWS, COLUMNS)}, "beside a change of it"),
    "a copy of a layer that is no embedding": (
        "HRA", {"r": 1},
        {"base_model.model.o_proj.hra_u": (8, 1), "base_model.model.o_proj.base_layer.weight": (12, 8)},
        "o_proj.base_layer.weight: a copy of a whole layer",
    ),
    "a layer that is not changed": ("LORA", {}, {"base_layer.bias": (20,)}, "that the adapter does not change"),
    "another tensor": ("LORA", {}, {**LORA, "gate": (20,)}, "gate: no tensor of an adapter (LORA)"),
    "another prefix": ("LORA", {}, {"base_model.lora_A": (2, 2)}, "base_model.lora_A: no tensor of an adapter"),
    "a copy alone": ("LORA", {}, {"original_module.weight": (20, 8)}, "is a copy, and base_model.model.model.embed"),
    "a copy of another shape": (
        "LORA", {}, {"modules_to_save.weight": (20, 8), "weight": (21, 8)}, "is a copy, and base_model."
    ),
    "nothing in it": ("LORA", {}, {"weight": (0, 8)}, "has shape (0, 8)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_is_beside_a_method_is_named(name: str, tmp_path: Path) -> None:
    method, settings, sizes, message = LEFT_OVER[name]
    with read_arrays(tmp_path, method, settings, ones(sizes), EMBED) as reading:
        assert any(message in problem for problem in reading.problems), reading.problems


def test_a_parameter_of_another_name_comes_with_its_module(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.experts.gate_up_proj"
    with read_arrays(tmp_path, "LORA", {"modules_to_save": ["experts"]}, ones({name: (3, 4, 5)})) as reading:
        assert not reading.problems
        (change,) = reading.changes
        assert isinstance(change, Replaced)
        assert (change.tensor, change.shape) == (name.removeprefix("base_model.model."), (3, 4, 5))
    with read_arrays(tmp_path, "LORA", {"modules_to_save": ["router"]}, ones({name: (3, 4, 5)})) as reading:
        assert "no tensor of an adapter" in reading.problems[0]


def test_rows_come_after_the_whole_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    arrays = {**ones(DELTA), "base_layer.weight": np.zeros((22, COLUMNS), np.float32)}
    for order in (list(arrays), list(arrays)[::-1]):
        with read_arrays(
            tmp_path, "TRAINABLE_TOKENS", {"token_indices": [21, 2]}, {key: arrays[key] for key in order}, EMBED
        ) as reading:
            whole, rows = reading.changes
            assert isinstance(whole, Replaced)
            assert np.flatnonzero(applied(rows, whole.load()).any(axis=1)).tolist() == [2, 21]


@pytest.mark.parametrize("row", [None, 0, 4999])
def test_embeddings_and_an_output_of_the_same_values_keep_their_tie(row: int | None, tmp_path: Path) -> None:
    values = np.random.default_rng(3).standard_normal((5000, 3)).astype(np.float32)
    output = values.copy()
    if row is not None:
        output[row, 1] += 1
    arrays = {f"base_model.model.{EMBED}.weight": values, "base_model.model.lm_head.weight": output}
    with read_arrays(tmp_path, "LORA", {}, arrays) as reading:
        assert not reading.problems
        assert [isinstance(change, Replaced) and change.keeps_tie for change in reading.changes] == [row is None] * 2


def test_psoft_is_refused_with_what_to_do() -> None:
    assert METHODS["PSOFT"].read is None
    assert "merge_and_unload" in METHODS["PSOFT"].refusal
