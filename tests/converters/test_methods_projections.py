"""Methods of shared or drawn projections out of arrays alone: what they compute, and what they refuse by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from converters.checkpoint import Tensors
from converters.methods import METHODS, Change, LowRank, Reading, Transformed, frod, read_modules
from converters.methods.wavelets import WAVELETS, filters
from converters.peft_config import read_peft_config
from converters.safetensors_file import ITEM_BITS, read_tensors
from converters.torch_random import TorchGenerator
from tests.converters.folders import write_json

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 12, 8
Array = np.ndarray[Any, Any]
Settings = Mapping[str, Any]


@contextmanager
def read_arrays(folder: Path, method: str, settings: Settings, arrays: Mapping[str, Array]) -> Iterator[Reading]:
    """What an adapter is read as. Names with a dot in front are tensors of its one layer, (12, 8), others shared."""
    names = {name: f"base_model.model.{MODULE}{name}" if name[0] == "." else f"base_model.{name}" for name in arrays}
    stored = {names[name]: array for name, array in arrays.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(stored))
    write_json(folder / "adapter_config.json", {"peft_type": method, **settings})
    with Tensors(read_tensors(folder / "adapter_model.safetensors")) as tensors:
        shapes = {f"{MODULE}.weight": (ROWS, COLUMNS)}
        yield read_modules(read_peft_config(folder), METHODS[method], tensors, shapes.get)


def delta(folder: Path, method: str, settings: Settings, arrays: Mapping[str, Array]) -> Array:
    """What is added to a weight of zeros, asked for in two parts where rows may be apart."""
    with read_arrays(folder, method, settings, arrays) as reading:
        assert not reading.problems
        (change,) = reading.changes
        assert change.shape in ((ROWS, COLUMNS), (None, COLUMNS))
        return _applied(change, np.zeros((ROWS, COLUMNS), np.float32))


def _applied(change: Change, weight: Array) -> Array:
    if isinstance(change, LowRank):
        b, a = change.load()
        assert b.shape == (len(weight), change.rank)
        return np.asarray(weight + b @ a)
    assert isinstance(change, Transformed)
    if not change.by_rows:
        return change.apply(weight, 0)
    return np.concatenate([change.apply(weight[start : start + 5], start) for start in range(0, len(weight), 5)])


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(*shape: int, below: int) -> Array:
    return np.random.default_rng(0).integers(0, below, shape)


def changed(arrays: Mapping[str, Array], **others: Array | None) -> dict[str, Array]:
    """Arrays with some replaced, or left out; `_` in front of a name stands for a dot."""
    new = {name.replace("_", ".", 1) if name[0] == "_" else name: array for name, array in others.items()}
    return {name: array for name, array in {**arrays, **new}.items() if array is not None}


VERA = {
    ".vera_lambda_b": numbers(ROWS),
    ".vera_lambda_d": numbers(3),
    "vera_A": numbers(3, 9),
    "vera_B": numbers(14, 3),
}
PVERA = {".pvera_lambda_b": numbers(ROWS), ".pvera_lambda_d": numbers(6), "pvera_A": numbers(6, 8),
         "pvera_B": numbers(12, 3)}  # fmt: skip
RANDLORA = {".randlora_lambda": numbers(3, 3), ".randlora_gamma": numbers(3, 8), "randlora_A": numbers(3, 1, 9),
            "randlora_B": numbers(14, 4, 3)}  # fmt: skip
FOURIER = {".fourierft_spectrum": numbers(10)}
WAVES = {".waveft_spectrum": numbers(10)}
VBLORA = {
    ".vblora_logits_A": numbers(2, 2, 5),
    ".vblora_logits_B": numbers(3, 2, 5),
    "vblora_vector_bank": numbers(5, 4),
}
SHORT: Mapping[str, Array] = {
    ".vblora_logits_A_topk_indices": whole(2, 2, 2, below=5).astype(np.uint8),
    ".vblora_logits_A_topk_weights": np.full((2, 2, 1), 0.75, np.float32),
    ".vblora_logits_B_topk_indices": whole(3, 2, 2, below=5).astype(np.uint8),
    ".vblora_logits_B_topk_weights": np.full((3, 2, 1), 0.75, np.float32),
    "vblora_vector_bank": numbers(5, 4),
}
UNILORA = {
    ".unilora_indices_A": whole(2, COLUMNS, below=6), ".unilora_indices_B": whole(ROWS, 2, below=6),
    ".unilora_scales_A": numbers(2, COLUMNS), ".unilora_scales_B": numbers(ROWS, 2), "unilora_theta_d": numbers(6),
}  # fmt: skip
TINYLORA = {".tinylora_A": numbers(2, COLUMNS), ".tinylora_B": numbers(ROWS, 2), ".tinylora_P": numbers(5, 2, 2),
            "tinylora_v.0": numbers(5)}  # fmt: skip
FROD = {
    ".frod_lambda_l": numbers(COLUMNS), ".frod_lambda_s_values": numbers(4), "frod_V.mlp_up_proj": numbers(8, 8),
    "frod_s_indices.mlp_up_proj": whole(2, 4, below=8), "frod_s_size.mlp_up_proj": np.array([8, 8]),
}  # fmt: skip
SHIRA = {".shira_weight": numbers(6), ".shira_indices": whole(2, 6, below=8).astype(np.int32)}
C3A = {".c3a_kernel": numbers(3, 2, 4)}
ALL: Mapping[str, tuple[Settings, Mapping[str, Array]]] = {
    "VERA": ({"r": 3}, VERA),
    "PVERA": ({"r": 3}, PVERA),
    "RANDLORA": ({"r": 3}, RANDLORA),
    "FOURIERFT": ({}, FOURIER),
    "WAVEFT": ({}, WAVES),
    "VBLORA": ({"r": 2}, VBLORA),
    "UNILORA": ({"r": 2, "save_indices": True}, UNILORA),
    "TINYLORA": ({"u": 5}, TINYLORA),
    "FROD": ({}, FROD),
    "SHIRA": ({}, SHIRA),
    "C3A": ({}, C3A),
}


def test_vera(tmp_path: Path) -> None:
    found = delta(tmp_path, "VERA", {"r": 3}, VERA)
    b, a = VERA["vera_B"][:ROWS], VERA["vera_A"][:, :COLUMNS]
    expected = np.diag(VERA[".vera_lambda_b"]) @ b @ np.diag(VERA[".vera_lambda_d"]) @ a
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_pvera_takes_the_mean(tmp_path: Path) -> None:
    found = delta(tmp_path, "PVERA", {"r": 3}, PVERA)
    mean, a = np.diag(PVERA[".pvera_lambda_d"][:3]), PVERA["pvera_A"][:3]
    expected = np.diag(PVERA[".pvera_lambda_b"]) @ PVERA["pvera_B"] @ mean @ a
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_fourierft(tmp_path: Path) -> None:
    spectrum = np.zeros(ROWS * COLUMNS)
    spectrum[TorchGenerator(5).randperm(ROWS * COLUMNS, 10)] = FOURIER[".fourierft_spectrum"]
    expected = np.fft.ifft2(spectrum.reshape(ROWS, COLUMNS)).real * 2.5
    settings = {"scaling": 2.5, "random_loc_seed": 5}
    np.testing.assert_allclose(delta(tmp_path, "FOURIERFT", settings, FOURIER), expected, rtol=1e-5, atol=1e-7)
    other = delta(tmp_path, "FOURIERFT", {**settings, "random_loc_seed": 6}, FOURIER)
    assert np.abs(other - expected).max() > 0.01, "another seed puts it elsewhere"


def test_waveft_of_haar(tmp_path: Path) -> None:
    """Each coefficient becomes a block of 2 times 2: the sum, or differences of halves."""
    spectrum = np.zeros(ROWS * COLUMNS)
    spectrum[TorchGenerator(777).randperm(ROWS * COLUMNS, 10)] = WAVES[".waveft_spectrum"]
    quarters = spectrum.reshape(2, ROWS // 2, 2, COLUMNS // 2).transpose(0, 2, 1, 3)
    high = {(0, 0): (1, 1), (0, 1): (-1, 1), (1, 0): (1, -1), (1, 1): (-1, -1)}
    expected = sum(
        np.kron(quarters[place], np.outer([1, down], [1, across])) / 2 for place, (down, across) in high.items()
    )
    np.testing.assert_allclose(delta(tmp_path, "WAVEFT", {"scaling": 1}, WAVES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_are_orthogonal(name: str) -> None:
    both = filters(name).astype(np.float64)
    # PEFT's constants of coif4 are off by a few in a hundred; it is theirs that adapters were trained with.
    tolerance = 0.1 if name == "coif4" else 1e-6
    for shift in range(0, both.shape[1], 2):
        products = both[:, shift:] @ both[:, : both.shape[1] - shift].T
        assert np.abs(products - (np.eye(2) if shift == 0 else 0)).max() < tolerance


def test_vblora(tmp_path: Path) -> None:
    def mixed(logits: Array) -> Array:
        order = np.argsort(-logits)[:2]
        weights = np.exp(logits[order]) / np.exp(logits[order]).sum()
        return np.asarray(weights @ VBLORA["vblora_vector_bank"][order])

    a = np.apply_along_axis(mixed, 2, VBLORA[".vblora_logits_A"]).reshape(2, COLUMNS)
    b = np.apply_along_axis(mixed, 2, VBLORA[".vblora_logits_B"]).transpose(0, 2, 1).reshape(ROWS, 2)
    np.testing.assert_allclose(delta(tmp_path, "VBLORA", {"r": 2}, VBLORA), b @ a, rtol=1e-5, atol=1e-6)


def test_frod_gives_the_base_back(tmp_path: Path) -> None:
    """With the lengths that the base has itself, and without a sparse part, nothing changes."""
    weight = numbers(ROWS, COLUMNS, seed=1)
    lengths = np.linalg.norm(np.linalg.solve(FROD["frod_V.mlp_up_proj"].astype(np.float64), weight.T), axis=1)
    own = changed(FROD, _frod_lambda_l=lengths.astype(np.float32), _frod_lambda_s_values=np.zeros(4, np.float32))
    with read_arrays(tmp_path, "FROD", {}, own) as reading:
        np.testing.assert_allclose(_applied(reading.changes[0], weight), weight, atol=1e-4)
    with read_arrays(tmp_path, "FROD", {}, FROD) as reading:
        assert np.abs(_applied(reading.changes[0], weight) - weight).max() > 0.1


def test_frod_of_a_basis_without_inverse(tmp_path: Path) -> None:
    basis = np.ones((8, 8), np.float32)
    found = delta(tmp_path, "FROD", {}, changed(FROD, **{"frod_V.mlp_up_proj": basis}))
    assert np.isfinite(found).all()


def test_c3a(tmp_path: Path) -> None:
    kernel = C3A[".c3a_kernel"]
    expected = [[kernel[m // 4, n // 4, (n - m) % 4] / COLUMNS for n in range(COLUMNS)] for m in range(ROWS)]
    np.testing.assert_allclose(delta(tmp_path, "C3A", {}, C3A), expected, rtol=1e-6)


def test_places_named_twice_are_added(tmp_path: Path) -> None:
    twice = changed(SHIRA, _shira_weight=np.array([1, 2], np.float32), _shira_indices=np.array([[7, 7], [3, 3]]))
    assert delta(tmp_path, "SHIRA", {}, twice)[7, 3] == 3


@pytest.mark.parametrize(("layer", "weight_tying"), [(0, 0.0), (3, 0.0), (5, 0.5)])
def test_tinylora_finds_its_number(tmp_path: Path, layer: int, weight_tying: float) -> None:
    """Six layers; the one looked at is at a place that only its P tells."""
    stored: dict[str, Array] = {}
    for number in range(6):
        name = f"base_model.model.{MODULE if number == layer else f'other.{9 - number}'}"
        projection = TorchGenerator(42 + number).normal((5, 2, 2), std=2**-0.5)
        stored |= {f"{name}.tinylora_A": TINYLORA[".tinylora_A"], f"{name}.tinylora_B": TINYLORA[".tinylora_B"],
                   f"{name}.tinylora_P": projection * np.float32(1.003)}  # fmt: skip
    groups = 6 if weight_tying == 0 else 3
    stored |= {f"base_model.tinylora_v.{group}": numbers(5, seed=group) for group in range(groups)}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(stored))
    write_json(tmp_path / "adapter_config.json", {"peft_type": "TINYLORA", "u": 5, "weight_tying": weight_tying})
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors:
        reading = read_modules(read_peft_config(tmp_path), METHODS["TINYLORA"], tensors)
        assert not reading.problems
        change = next(change for change in reading.changes if change.tensor == f"{MODULE}.weight")
        assert isinstance(change, LowRank)
        found, _ = change.load()
    p = stored[f"base_model.model.{MODULE}.tinylora_P"]
    expected = TINYLORA[".tinylora_B"] @ np.tensordot(numbers(5, seed=layer * groups // 6), p, axes=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("model.layers.3.mlp.up_proj", "mlp_up_proj"),
        ("lm_head", "lm_head"),
        ("transformer.h.0", "h_0"),
        ("blocks.0.dense", "dense"),
        ("encoder.layer.1.attention.output.dense", "attention_output"),
        ("encoder.layer.1.output.dense", "output_dense"),
    ],
)
def test_frod_categories(name: str, category: str) -> None:
    assert frod.category(name) == category


# What is wrong: method, other settings, other arrays, and a part of the message.
WRONG: Mapping[str, tuple[str, Settings, Mapping[str, Array | None], str]] = {
    "vera, lambda_b": ("VERA", {}, {"_vera_lambda_b": numbers(11)}, "lambda_b has shape (11,), expected (12)"),
    "vera, rank": ("VERA", {"r": 4}, {}, "lambda_d has shape (3,), expected (4)"),
    "vera, small A": ("VERA", {}, {"vera_A": numbers(3, 7)}, "the shared A (3, 7)"),
    "vera, no A": ("VERA", {}, {"vera_A": None, "vera_B": None}, "save_projection=True"),
    "vera, only A": ("VERA", {"save_projection": False}, {"vera_B": None}, "save_projection=True"),
    "vera, half a layer": ("VERA", {}, {"_vera_lambda_b": None}, "has no lambda_b"),
    "vera, no layer": ("VERA", {}, {"_vera_lambda_b": None, "_vera_lambda_d": None}, "there is none that takes it"),
    "vera, seed": ("VERA", {"projection_prng_key": 2**64}, {}, "projection_prng_key"),
    "vera, leftover": ("VERA", {}, {"vera_C": numbers(3)}, "base_model.vera_C"),
    "pvera, samples": ("PVERA", {"sample_at_inference": True}, {}, "other numbers for every token"),
    "randlora, gamma": ("RANDLORA", {}, {"_randlora_gamma": numbers(3, 12)}, "gamma has shape (3, 12)"),
    "randlora, small B": ("RANDLORA", {}, {"randlora_B": numbers(12, 2, 3)}, "too small for (12, 8)"),
    "randlora, no A": ("RANDLORA", {}, {"randlora_A": None}, "save_projection=True"),
    "fourierft, too many": ("FOURIERFT", {}, {"_fourierft_spectrum": numbers(97)}, "97 frequencies"),
    "fourierft, nothing": ("FOURIERFT", {}, {"_fourierft_spectrum": numbers(0)}, "spectrum has shape (0,)"),
    "fourierft, seed": ("FOURIERFT", {"random_loc_seed": 1.5}, {}, "random_loc_seed is 1.5"),
    "waveft, wavelet": ("WAVEFT", {"wavelet_family": "db11"}, {}, "wavelet_family is 'db11'"),
    "vblora, topk": ("VBLORA", {"topk": 6}, {}, "takes 6 of 5 vectors"),
    "vblora, vectors": ("VBLORA", {}, {"_vblora_logits_A": numbers(2, 2, 6)}, "a has shape (2, 2, 6)"),
    "vblora, no B": ("VBLORA", {}, {"_vblora_logits_B": None}, "has no logits of B"),
    "vblora, no bank": ("VBLORA", {}, {"vblora_vector_bank": None}, "has no bank"),
    "unilora, not saved": ("UNILORA", {"save_indices": False}, {}, "save it again"),
    "unilora, beyond": ("UNILORA", {}, {"unilora_theta_d": numbers(3)}, "theta_d has 3 numbers"),
    "unilora, before": ("UNILORA", {}, {"_unilora_indices_A": np.full((2, 8), -1)}, "go from -1"),
    "unilora, scales": ("UNILORA", {}, {"_unilora_scales_A": numbers(8, 2)}, "scales_a has shape (8, 2)"),
    "unilora, no integers": ("UNILORA", {}, {"_unilora_indices_A": numbers(2, 8)}, "other than whole numbers"),
    "tinylora, P": ("TINYLORA", {}, {"_tinylora_P": numbers(5, 3, 3)}, "p has shape (5, 3, 3)"),
    "tinylora, no P": ("TINYLORA", {}, {"_tinylora_P": None}, "save_projection to true"),
    "tinylora, no v": ("TINYLORA", {}, {"tinylora_v.0": None, "tinylora_v.1": numbers(5)}, "has no tinylora_v.0"),
    "tinylora, tying": ("TINYLORA", {"weight_tying": 2}, {}, "expected a number from 0 to 1"),
    "frod, not saved": ("FROD", {"save_projection": False}, {}, "save_projection=True"),
    "frod, no V": ("FROD", {}, {"frod_V.mlp_up_proj": None}, "has no v.mlp_up_proj"),
    "frod, V": ("FROD", {}, {"frod_V.mlp_up_proj": numbers(8, 7)}, "v.mlp_up_proj has shape (8, 7)"),
    "frod, places": ("FROD", {}, {"frod_s_indices.mlp_up_proj": np.full((2, 4), 8)}, "its places go from 8 to 8"),
    "frod, size": ("FROD", {}, {"frod_s_size.mlp_up_proj": np.array([9, 8])}, "S has (2, 4) places"),
    "frod, lengths": ("FROD", {}, {"_frod_lambda_s_values": numbers(5)}, "(5,) values"),
    "shira, beyond": ("SHIRA", {}, {"_shira_indices": np.full((2, 6), 8)}, "(8, 8), its base's weight is (12, 8)"),
    "shira, count": ("SHIRA", {}, {"_shira_weight": numbers(7)}, "indices has shape (2, 6), expected (2, 7)"),
    "c3a, flat": ("C3A", {}, {"_c3a_kernel": numbers(6, 4)}, "kernel has shape (6, 4)"),
    "c3a, empty": ("C3A", {}, {"_c3a_kernel": numbers(3, 2, 0)}, "kernel has shape (3, 2, 0)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str) -> None:
    method, settings, arrays, message = WRONG[name]
    right, own = ALL[method]
    with read_arrays(tmp_path, method, {**right, **settings}, changed(own, **arrays)) as reading:
        assert message in " ".join(reading.problems)


@pytest.mark.parametrize("method", ALL)
def test_what_fits_is_one_change(tmp_path: Path, method: str) -> None:
    settings, arrays = ALL[method]
    assert np.isfinite(delta(tmp_path, method, settings, arrays)).all()


@pytest.mark.parametrize(
    ("role", "message"), [("indices", "there are 5 vectors"), ("weights", "do not fit"), ("topk", "a_indices has")]
)
def test_vblora_in_short(tmp_path: Path, role: str, message: str) -> None:
    bank = SHORT["vblora_vector_bank"]
    expected = [np.einsum("k,...kv->...v", np.array([0.75, 0.25]), bank[SHORT[f".vblora_logits_{side}_topk_indices"]])
                for side in "AB"]  # fmt: skip
    b, a = expected[1].transpose(0, 2, 1).reshape(ROWS, 2), expected[0].reshape(2, COLUMNS)
    np.testing.assert_allclose(delta(tmp_path, "VBLORA", {"r": 2}, SHORT), b @ a, rtol=1e-5, atol=1e-6)
    wrong = dict(SHORT)
    if role == "indices":
        wrong[".vblora_logits_A_topk_indices"] = np.full((2, 2, 2), 5, np.uint8)
    elif role == "weights":
        wrong[".vblora_logits_A_topk_weights"] = np.zeros((2, 2, 2), np.float32)
    with read_arrays(tmp_path, "VBLORA", {"r": 2, "topk": 3 if role == "topk" else 2}, wrong) as reading:
        assert message in " ".join(reading.problems)


@pytest.mark.parametrize("method", ["VERA", "PVERA", "RANDLORA", "FOURIERFT", "WAVEFT", "SHIRA"])
def test_sizes_that_only_the_base_tells(tmp_path: Path, method: str) -> None:
    settings, arrays = ALL[method]
    with read_arrays(tmp_path, method, settings, arrays):
        config = read_peft_config(tmp_path)
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors:
        reading = read_modules(config, METHODS[method], tensors)
    assert "is as large as the base's, which is not known" in reading.problems[0]


def test_indices_of_windows_are_floats(tmp_path: Path) -> None:
    floats = changed(SHIRA, _shira_indices=SHIRA[".shira_indices"].astype(np.float32))
    np.testing.assert_array_equal(delta(tmp_path, "SHIRA", {}, floats), delta(tmp_path, "SHIRA", {}, SHIRA))


def test_indices_of_a_type_without_numbers(tmp_path: Path) -> None:
    with read_arrays(tmp_path, "SHIRA", {}, SHIRA):
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"I32"', b'"U32"'))
    assert "U32" in ITEM_BITS
    with Tensors(read_tensors(path)) as tensors:
        shapes = {f"{MODULE}.weight": (ROWS, COLUMNS)}
        reading = read_modules(read_peft_config(tmp_path), METHODS["SHIRA"], tensors, shapes.get)
    assert "indices is U32, and holds whole numbers" in reading.problems[0]


# A setting changed behind PEFT's back: the comparison with PEFT must notice each.
MISREAD: Mapping[str, tuple[str, str, Any]] = {
    "fourierft's scale": ("fourierft", "scaling", 151.0),
    "fourierft's seed": ("fourierft", "random_loc_seed", 778),
    "waveft's wavelet": ("waveft of db4", "wavelet_family", "sym4"),
    "waveft's transform": ("waveft", "use_idwt", False),
    "vera's seed": ("vera drawn again", "projection_prng_key", 6),
    "pvera's seed": ("pvera drawn again", "projection_prng_key", 6),
    "randlora's alpha": ("randlora", "randlora_alpha", 641),
    "randlora's bases": ("randlora of sparse bases drawn again", "sparse", False),
    "vblora's vectors": ("vblora", "topk", 3),
}


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")  # of PEFT, about its own methods
@pytest.mark.parametrize("name", MISREAD)
def test_a_misread_setting_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.equivalence import test_method_weights, tiny_models
    from tests.equivalence.methods.projection_cases import CASES
    from tests.equivalence.peft_methods import make_peft

    case, key, value = MISREAD[name]

    def altered(case: Any, base: Path, folder: Path) -> Any:
        adapted = make_peft(case, base, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return adapted

    monkeypatch.setattr(test_method_weights, "make_peft", altered)
    base = tiny_models.build("llama", tmp_path / "base")
    found = dict(test_method_weights.errors(CASES[case], base, tmp_path / "adapter"))
    assert max(found.values()) > 10 * CASES[case].tolerance


@pytest.mark.train
@pytest.mark.filterwarnings("ignore")  # of PEFT, about its own methods
@pytest.mark.parametrize("name", ["FourierFTConfig", "RandLoraConfig", *WAVELETS])
def test_layers_of_odd_sizes(name: str, tmp_path: Path) -> None:
    """Sizes that no transformer has; and every wavelet."""
    import peft
    import torch

    settings = {"FourierFTConfig": {"n_frequency": 77}, "RandLoraConfig": {"r": 5}}
    waves = {"n_frequency": 77, "wavelet_family": name, "random_loc_seed": -3}
    made = getattr(peft, name if name in settings else "WaveFTConfig")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 47, bias=False), torch.nn.Linear(47, 20, bias=False))
    adapted = peft.get_peft_model(model, made(target_modules=["0", "1"], **settings.get(name, waves))).eval()
    for _, parameter in adapted.named_parameters():
        parameter.data += torch.randn_like(parameter) * 0.5
    adapted.save_pretrained(tmp_path)
    shapes = {"0.weight": (47, 33), "1.weight": (20, 47)}
    config = read_peft_config(tmp_path)
    with Tensors(read_tensors(tmp_path / "adapter_model.safetensors")) as tensors, torch.no_grad():
        reading = read_modules(config, METHODS[config.peft_type], tensors, shapes.get)
        assert len(reading.changes) == 2
        for number, change in enumerate(reading.changes):
            layer = adapted.base_model.model[number]
            weight = layer.get_base_layer().weight.numpy()
            expected = layer(torch.eye(layer.in_features)).T.numpy()
            found = _applied(change, weight)
            assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected - weight)
