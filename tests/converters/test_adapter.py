"""Adapters that cannot be exact are refused, all reasons in one message, and nothing is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.adapter import AdapterOptions, PreparedAdapter, convert_adapter, prepare_adapter, prepared_pairs
from converters.base import convert_base
from converters.errors import (
    BaseMismatchError,
    ConversionError,
    FormatError,
    MissingFileError,
    OutputExistsError,
    TruncatedFileError,
    UnsupportedAdapterError,
    UnsupportedError,
)
from converters.fingerprint import fingerprint
from converters.merge import Merged, merge
from converters.methods import METHODS
from converters.pairs import Pair
from converters.peft_settings import COMMON_FREE, OFF
from converters.reader import read_header
from tests.converters.folders import MODULES, lora_weights, make_adapter, make_model, safetensors_bytes, write_json
from tests.converters.test_base import STRANGE, permuted

PREFIX = "base_model.model.model."
Q_PROJ = PREFIX + "layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "my-base")


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: np.array(t.data).reshape(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors}


def test_b_holds_the_scale_and_the_row_order(base: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "adapter.gguf", lora_weights(MODULES)
    report = convert_adapter(make_adapter(tmp_path / "a", given), base, out, options=AdapterOptions(dtype="f32"))
    arrays, metadata = read_arrays(out), read_header(out).metadata
    q, down = "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"
    np.testing.assert_array_equal(arrays["blk.0.attn_q.weight.lora_a"], given[f"{PREFIX}{q}.lora_A.weight"])
    expected = permuted(2 * given[f"{PREFIX}{q}.lora_B.weight"], 4)
    np.testing.assert_array_equal(arrays["blk.0.attn_q.weight.lora_b"], expected)
    expected = 2 * given[f"{PREFIX}{down}.lora_B.weight"]
    np.testing.assert_array_equal(arrays["blk.1.ffn_down.weight.lora_b"], expected)
    assert metadata["adapter.lora.alpha"] == 0.0
    assert (report.ranks, report.scales, report.targets) == ((4,), (2.0,), ("down_proj", "k_proj", "q_proj"))
    assert report.n_tensors == len(arrays) == 6
    assert report.size_bytes == out.stat().st_size


def test_it_names_its_base(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    report = convert_adapter(make_adapter(tmp_path / "support"), base, out, metadata={"edgelora.system": "Be kind."})
    header = read_header(out)
    assert header.kind == "adapter"
    assert header.metadata["general.name"] == "support"
    assert header.metadata["edgelora.base.name"] == report.base_name == "My Base"
    assert header.metadata["edgelora.base.fingerprint"] == report.base_fingerprint == fingerprint(base)
    assert header.metadata["edgelora.system"] == "Be kind."


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "F16"])
def test_dtypes(dtype: str, base: Path, tmp_path: Path) -> None:
    convert_adapter(make_adapter(tmp_path / "a"), base, tmp_path / "adapter.gguf", options=AdapterOptions(dtype=dtype))
    tensors = read_header(tmp_path / "adapter.gguf").tensors.values()
    assert {tensor.type_name for tensor in tensors} == {dtype.upper()}


def arrays_with(**changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {**lora_weights(MODULES), **{PREFIX + name.replace("__", "."): array for name, array in changes.items()}}
    return {name: array for name, array in arrays.items() if array is not None}


def ones(*shape: int, value: float = 1.0) -> np.ndarray[Any, Any]:
    return np.full(shape, value, np.float32)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "DoRA without magnitudes": ({"use_dora": True}, {}, "DoRA's magnitude vector must be (32,), and is none"),
    "a trained bias": (
        {"bias": "all"},
        {"layers__0__self_attn__q_proj__bias": ones(32)},
        "q_proj.bias: it was trained",
    ),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save has 'lm_head', and no tensor belongs"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights is 'pissa_niter_4'"),
    "an unknown key": ({"frobnicate": 3}, {}, "unknown setting frobnicate = 3"),
    "a rank that is no number": ({"r": "big"}, {}, "r is 'big'"),
    "a pattern that is no expression": (
        {"rank_pattern": {"(": 3}},
        {},
        "'(': no regular expression for a module's name",
    ),
    "a pattern that is none when wrapped": (
        {"alpha_pattern": {"(?i)q_proj": 3}},
        {},
        "'(?i)q_proj': no regular expression for a module's name",
    ),
    "nested quantifiers": ({"alpha_pattern": {"(([a-z_0-9.])+)+#": 4}}, {}, "its quantifiers are nested"),
    "many quantifiers": ({"rank_pattern": {".*.*.*.*.*.*.*x": 4}}, {}, "quantifiers are nested or too many"),
    "alpha beyond a float": ({"lora_alpha": 10**400}, {}, "lora_alpha is 1000"),
    "alpha beyond float32": ({"lora_alpha": 1e300}, {}, "lora_alpha is 1e+300"),
    "a scale that overflows": (
        {"lora_alpha": 3e38},
        {"layers__0__self_attn__q_proj__lora_B__weight": ones(32, 4, value=9)},
        "NaN or infinite",
    ),
    "a module without tensors": ({"target_modules": ["q_proj", "up_proj"]}, {}, "target_modules has 'up_proj'"),
    "a layer without tensors": (
        {"target_modules": ["q_proj"]},
        {},
        "layers.1.self_attn.q_proj.weight: no tensor belongs to it, as to other layers",
    ),
    "a layer that an expression names": (
        {"target_modules": r"model\.layers\.[01]\..*(q|down)_proj"},
        {},
        "layers.0.mlp.down_proj.weight: no tensor belongs to it",
    ),
    "modules that an expression names": (
        {"target_modules": r".*\.(0\.self_attn\.q|1\.self_attn\.k|1\.mlp\.down|1\.mlp\.up)_proj"},
        {},
        "target_modules matches model.layers.1.mlp.up_proj, and no tensor belongs to it",
    ),
    "trained tokens that are not there": (
        {"trainable_token_indices": [1, 2]},
        {},
        "trainable_token_indices names tokens, and the file has no tensor of them",
    ),
    "a copy of a linear layer": (
        {},
        {"layers__0__self_attn__q_proj__base_layer__weight": ones(32, 32)},
        "a copy of a whole layer",
    ),
    "another rank": ({"r": 8}, {}, "has rank 4, adapter_config.json says 8"),
    "a trained norm": (
        {},
        {"layers__0__input_layernorm__weight": ones(32)},
        "input_layernorm.weight: it was trained as a whole",
    ),
    "a trained module": ({}, {"embed_tokens__weight": ones(300, 32)}, "embed_tokens.weight: it was trained as a whole"),
    "a magnitude": (
        {},
        {"layers__0__self_attn__q_proj__lora_magnitude_vector": ones(32)},
        "has a magnitude, and use_dora is off",
    ),
    "an unknown tensor": (
        {},
        {"layers__0__self_attn__q_proj__mystery": ones(3)},
        "q_proj.mystery: no tensor of an adapter (LORA)",
    ),
    "A alone": ({}, {"layers__0__self_attn__q_proj__lora_B__weight": None}, "has only its A"),
    "A and B of two ranks": ({}, {"layers__0__self_attn__q_proj__lora_B__weight": ones(32, 5)}, "do not fit together"),
    "zero size": ({}, {"layers__0__self_attn__q_proj__lora_B__weight": ones(0, 4)}, "do not fit together"),
    "NaN": ({}, {"layers__0__self_attn__q_proj__lora_B__weight": ones(32, 4, value=np.nan)}, "NaN or infinite"),
    "infinity": ({}, {"layers__0__self_attn__q_proj__lora_A__weight": ones(4, 32, value=np.inf)}, "NaN or infinite"),
    "too large": ({}, {"layers__0__self_attn__q_proj__lora_B__weight": ones(32, 4, value=4e4)}, "too large for f16"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, base: Path, tmp_path: Path) -> None:
    config, arrays, reason = REFUSED[what]
    folder = make_adapter(tmp_path / "a", arrays_with(**arrays), **config)
    with pytest.raises(UnsupportedAdapterError) as caught:
        convert_adapter(folder, base, tmp_path / "adapter.gguf")
    assert reason in caught.value.message
    assert list(tmp_path.iterdir()) == [folder]


def test_a_bad_number_has_no_false_consequences(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError) as caught:
        convert_adapter(make_adapter(tmp_path / "a", lora_alpha="high"), base, tmp_path / "adapter.gguf")
    assert "lora_alpha is 'high'" in caught.value.message
    assert "rank" not in caught.value.message


@pytest.mark.parametrize(
    "pattern", [r"^model\.layers\.1\.mlp\.down_proj", "layers.[01].mlp.down_proj", r"\d+\.mlp\..*"]
)
def test_plain_patterns_are_taken(pattern: str, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", alpha_pattern={pattern: 6})
    assert convert_adapter(folder, base, tmp_path / "adapter.gguf").scales == (1.5, 2.0)


@pytest.mark.parametrize("factor", [1e-6, 1e-9])
def test_values_too_small_for_f16_are_written_as_f32(factor: float, base: Path, tmp_path: Path) -> None:
    arrays = lora_weights(MODULES)
    small = {name: array * np.float32(factor) if "k_proj.lora_B" in name else array for name, array in arrays.items()}
    report = convert_adapter(make_adapter(tmp_path / "a", small), base, tmp_path / "adapter.gguf")
    assert (report.dtype, report.max_relative_error) == ("f32", 0.0)
    assert "f16 would change blk.1.attn_k.weight by" in report.notices[0]
    expected = permuted(2 * small["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"], 2)
    np.testing.assert_array_equal(read_arrays(tmp_path / "adapter.gguf")["blk.1.attn_k.weight.lora_b"], expected)


@pytest.mark.parametrize(("dtype", "least", "most"), [("f32", 0, 0), ("f16", 1e-4, 4e-4), ("bf16", 1e-3, 3e-3)])
def test_the_rounding_is_measured(dtype: str, least: float, most: float, base: Path, tmp_path: Path) -> None:
    report = convert_adapter(
        make_adapter(tmp_path / "a"), base, tmp_path / "adapter.gguf", options=AdapterOptions(dtype=dtype)
    )
    assert least <= report.max_relative_error <= most  # half a unit of 11 or 8 bits, uniformly distributed
    assert report.dtype == dtype


def test_every_reason_is_in_one_message(base: Path, tmp_path: Path) -> None:
    arrays = arrays_with(norm__weight=ones(32), layers__0__self_attn__x_proj__lora_A__weight=ones(4, 32))
    folder = make_adapter(tmp_path / "a", arrays, use_dora=True, bias="all", mystery=1)
    with pytest.raises(UnsupportedAdapterError) as caught:
        convert_adapter(folder, base, tmp_path / "adapter.gguf")
    for reason in ("magnitude", "mystery", "norm.weight", "has only its A"):
        assert reason in caught.value.message


@pytest.mark.parametrize("peft_type", ["LOHA", "IA3"])
def test_tensors_of_another_method(peft_type: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"q_proj\.lora_A\.weight: no tensor of a llama model"):
        convert_adapter(make_adapter(tmp_path / "a", peft_type=peft_type), base, tmp_path / "adapter.gguf")


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "FROM_THE_FUTURE", None])
def test_other_methods_are_named(peft_type: str | None, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"peft_type is '{peft_type}'"):
        convert_adapter(make_adapter(tmp_path / "a", peft_type=peft_type), base, tmp_path / "adapter.gguf")


MISFITS: dict[str, tuple[dict[str, tuple[int, int]], str]] = {
    "another width": ({"model.layers.0.self_attn.q_proj": (64, 64)}, "the adapter is for 64x64"),
    "a layer too many": ({"model.layers.7.self_attn.q_proj": (32, 32)}, "q_proj.weight: the base has no such tensor"),
    "another family": ({"model.layers.0.self_attn.qkv_proj": (64, 32)}, "no tensor of a llama model"),
    "a norm": ({"model.norm": (32, 32)}, "output_norm.weight is 32"),
}


@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_base_that_does_not_fit(what: str, kind: str, base: Path, tmp_path: Path) -> None:
    modules, message = MISFITS[what]
    if kind == "gguf":
        base = convert_base(base, tmp_path / "base.gguf", quant="q8_0").path
    folder = make_adapter(tmp_path / "a", lora_weights({**MODULES, **modules}))
    with pytest.raises(BaseMismatchError, match=message) as caught:
        convert_adapter(folder, base, tmp_path / "adapter.gguf")
    assert "It was trained on base" in caught.value.hint
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_settings_that_are_off_are_no_problem(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", use_dora=False, modules_to_save=None, bias="none", new_feature=None, other={})
    convert_adapter(folder, base, tmp_path / "adapter.gguf")


def test_an_untrained_adapter_is_noticed(base: Path, tmp_path: Path) -> None:
    arrays = {name: array * ("lora_A" in name) for name, array in lora_weights(MODULES).items()}
    report = convert_adapter(make_adapter(tmp_path / "a", arrays), base, tmp_path / "adapter.gguf")
    assert "every B is zero" in report.notices[0]
    assert convert_adapter(make_adapter(tmp_path / "b"), base, tmp_path / "b.gguf").notices == ()


LORA = METHODS["LORA"]


@pytest.mark.parametrize("key", sorted({*LORA.free, *LORA.settings, *LORA.refused, *COMMON_FREE}))
def test_no_value_in_a_configuration_is_a_crash(key: str, base: Path, tmp_path: Path) -> None:
    for value in STRANGE:
        folder = make_adapter(tmp_path / "a", **{key: value})
        try:
            convert_adapter(folder, base, tmp_path / "adapter.gguf", force=True)
        except ConversionError as error:
            refused = error.message
        else:
            refused = ""
        assert not refused or str(folder) in refused
        assert refused or value in OFF or key in {*LORA.free, *LORA.settings, *COMMON_FREE}


def test_broken_folders(base: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "adapter.gguf", make_adapter(tmp_path / "a")

    def fails(error: type[ConversionError], message: str) -> None:
        with pytest.raises(error, match=message):
            convert_adapter(folder, base, out)

    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    fails(TruncatedFileError, "100 are missing")
    weights.write_bytes(safetensors_bytes({}))
    fails(FormatError, "its file of weights is empty")
    weights.rename(folder / "adapter_model.bin")
    fails(UnsupportedError, r"its weights are a pickle \(adapter_model.bin\)")
    (folder / "adapter_model.bin").unlink()
    fails(MissingFileError, r"no adapter_model\.safetensors")
    (folder / "adapter_config.json").write_text("[]")
    fails(FormatError, "expected a JSON object")
    (folder / "adapter_config.json").unlink()
    fails(MissingFileError, r"adapter_config\.json")
    assert not out.exists()


def test_wrong_bases(base: Path, tmp_path: Path) -> None:
    folder, out = make_adapter(tmp_path / "a"), tmp_path / "adapter.gguf"
    convert_adapter(folder, base, out)
    with pytest.raises(FormatError, match="is an adapter"):
        convert_adapter(folder, out, tmp_path / "other.gguf")
    with pytest.raises(MissingFileError):
        convert_adapter(folder, tmp_path / "none.gguf", tmp_path / "other.gguf")
    with pytest.raises(OutputExistsError):
        convert_adapter(folder, base, out)
    with pytest.raises(UnsupportedError, match="unknown adapter dtype"):
        convert_adapter(folder, base, tmp_path / "other.gguf", options=AdapterOptions(dtype="q2"))


def test_patterns_are_matched_as_peft_does(base: Path, tmp_path: Path) -> None:
    arrays = lora_weights({name: shape for name, shape in MODULES.items() if "down" not in name})
    arrays |= lora_weights({"model.layers.1.mlp.down_proj": (32, 48)}, rank=2)
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.k_proj": 6, "q_pro": 999}}
    folder = make_adapter(tmp_path / "a", arrays, **patterns)
    report = convert_adapter(folder, base, tmp_path / "adapter.gguf", options=AdapterOptions(dtype="f32"))
    assert report.ranks == (2, 4)
    assert report.scales == (6 / 4, 8 / 4, 8 / 2)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "use_rslora": True})
    report = convert_adapter(folder, base, tmp_path / "adapter.gguf", options=AdapterOptions(dtype="f32"), force=True)
    assert report.scales == (6 / 2, 8 / 2, 8 / 2**0.5)


def test_broken_values_are_told_with_everything_else(base: Path, tmp_path: Path) -> None:
    arrays = arrays_with(layers__0__self_attn__q_proj__lora_B__weight=ones(32, 4, value=np.nan))
    with pytest.raises(UnsupportedAdapterError) as caught:
        convert_adapter(make_adapter(tmp_path / "a", arrays, mystery=1), base, tmp_path / "adapter.gguf")
    assert "unknown setting mystery" in caught.value.message
    assert "q_proj.weight: holds NaN or infinite values" in caught.value.message


def with_b(factor: float) -> dict[str, np.ndarray[Any, Any]]:
    """LoRA weights, the B of k_proj multiplied."""
    return {
        name: array * np.float32(factor if "k_proj.lora_B" in name else 1.0)
        for name, array in lora_weights(MODULES, rank=32).items()
    }


@pytest.mark.parametrize("rank", [4, 32])  # B is F16, or Q8_0 with an F16 scale for each block
@pytest.mark.parametrize("factor", [1e8, 1e-7, 1e-9])
def test_what_f16_cannot_hold_is_not_in_a_q8_0_file_either(
    rank: int, factor: float, base: Path, tmp_path: Path
) -> None:
    arrays = {name: array[..., :rank] if "lora_B" in name else array[:rank] for name, array in with_b(factor).items()}
    folder, out = make_adapter(tmp_path / "a", arrays, r=rank), tmp_path / "adapter.gguf"
    options = AdapterOptions(dtype="q8_0")
    if factor > 1.0:
        with pytest.raises(UnsupportedAdapterError, match=rf"attn_k\.weight: B .* {'q8_0' if rank == 32 else 'f16'}"):
            convert_adapter(folder, base, out, options)
        return
    report = convert_adapter(folder, base, out, options)
    assert (report.dtype, report.max_relative_error) == ("f32", 0.0)
    assert report.notices[0].startswith("written as f32: q8_0 would change blk.1.attn_k.weight by up to")
    assert not any("f16" in notice for notice in report.notices)
    assert all(np.isfinite(array).all() for array in read_arrays(out).values())


LEFT_OUT: dict[str, dict[str, Any]] = {
    "excluded": {
        "target_modules": ["q_proj", "up_proj", "query"],
        "exclude_modules": ["up_proj", "layers.1.self_attn.q_proj"],
    },
    "excluded by an expression": {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.1\..*"},
    "other layers": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "one layer": {"target_modules": ["down_proj", "k_proj"], "layers_to_transform": 1},
    "an expression": {"target_modules": r"model\.layers\.(0\.self_attn\.q|1\.self_attn\.k|1\.mlp\.down)_proj"},
    "an expression that is not tried": {"target_modules": r"(.*)+(.*)+_proj"},
    "a whole module instead": {"target_modules": ["k_proj"], "layers_to_transform": [1], "modules_to_save": []},
    "no names": {"target_modules": [None, 3, {}]},
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_was_left_out_is_not_missing(what: str, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", **LEFT_OUT[what])
    assert convert_adapter(folder, base, tmp_path / "adapter.gguf").notices == ()


@pytest.mark.parametrize("max_error", [float("nan"), float("inf"), -float("inf"), 0.0, -0.1])
@pytest.mark.parametrize("rank", [0, -3])
def test_options_that_say_nothing(max_error: float, rank: int, base: Path, tmp_path: Path) -> None:
    options = AdapterOptions(rank=rank, max_error=max_error)
    with pytest.raises(UnsupportedError, match=rf"max_error is {max_error}.*; rank is {rank}"):
        convert_adapter(make_adapter(tmp_path / "a"), base, tmp_path / "adapter.gguf", options)
    pair = Pair("blk.0.attn_q.weight", (2, 2), 1, lambda: (ones(2, 1), ones(1, 2)))
    for wrong in (AdapterOptions(rank=rank), AdapterOptions(max_error=max_error)):
        with pytest.raises(UnsupportedError, match="expected"):
            prepared([pair], wrong)


def prepared(pairs: list[Pair], options: AdapterOptions | None = None) -> PreparedAdapter:
    return prepared_pairs(
        Path("a"), "llama", pairs, options or AdapterOptions(), keys={}, inputs=(), method="blend",
        base_name="", base_fingerprint="", is_approximate=False,
    )  # fmt: skip


@pytest.mark.parametrize("residual", [1.0, float("inf")])
def test_approximations_that_may_be_nothing_but_error_are_refused(residual: float) -> None:
    pair = Pair("blk.0.attn_q.weight", (2, 2), 1, lambda: (ones(2, 1), ones(1, 2)), residual_energy=residual)
    with pytest.raises(UnsupportedAdapterError, match=r"attn_q\.weight: what was left out of its approximations"):
        prepared([pair])
    assert prepared([replace(pair, residual_energy=0.9)]).kind == "approximate"


def test_a_state_before_training_is_only_for_what_moved_the_base(base: Path, tmp_path: Path) -> None:
    folder, initial = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "initial")
    for path in (initial, tmp_path / "nonexistent"):
        with pytest.raises(UnsupportedAdapterError, match=r"--initial is for adapters .*, and its own, None, did not"):
            convert_adapter(folder, base, tmp_path / "adapter.gguf", AdapterOptions(initial=path))
        with pytest.raises(UnsupportedAdapterError, match="--initial"):
            merge(base, [Merged(folder, initial=path)], tmp_path / "merged.gguf")
    adapter = convert_adapter(folder, base, tmp_path / "adapter.gguf").path
    with pytest.raises(UnsupportedAdapterError, match=r"--initial is for adapters .*, and a GGUF adapter never did"):
        merge(base, [Merged(adapter, initial=initial)], tmp_path / "merged.gguf")


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0"])
def test_what_follows_from_rounded_weights_is_not_recomputed(quant: str, base: Path, tmp_path: Path) -> None:
    """A change that is small beside its weight: F16's rounding of the weight is 1 to 10 % of it."""
    rounded = convert_base(base, tmp_path / "base.gguf", quant=quant).path
    folder, out = make_adapter(tmp_path / "a", init_lora_weights="olora"), tmp_path / "adapter.gguf"
    if quant == "f32":
        assert convert_adapter(folder, rounded, out).kind == "exact"
        return
    why = "was quantized" if quant == "q8_0" else "is in half precision"
    with pytest.raises(UnsupportedAdapterError, match=rf"base\.gguf {why}.*: name the folder of the base"):
        convert_adapter(folder, rounded, out)


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_what_was_computed_from_quantized_weights_is_not_exact(quant: str, base: Path, tmp_path: Path) -> None:
    known = convert_base(base, tmp_path / "base.gguf", quant=quant).path
    rows = np.random.default_rng(0).standard_normal((32, 2)).astype(np.float32)
    folder = make_adapter(tmp_path / "a", {f"{Q_PROJ}.hra_u": rows}, peft_type="HRA", r=2, apply_GS=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {key: config[key] for key in config if key != "lora_alpha"})
    with prepare_adapter(folder, known) as found:
        report = found.write(tmp_path / "adapter.gguf")
        assert found.exactness().get("from_quantized", False) == report.from_quantized == (quant == "q8_0")
        assert found.exactness()["kind"] == report.kind == ("approximate" if report.from_quantized else "exact")
    assert report.max_residual == 0.0
    assert any("weights that were quantized" in notice for notice in report.notices) == report.from_quantized
    lora = convert_adapter(make_adapter(tmp_path / "lora"), known, tmp_path / "lora.gguf")
    assert (lora.kind, lora.from_quantized, lora.notices) == ("exact", False, ())


RIVALS = {r"layers\.1\..*": 6, "down_proj": 9}  # as PEFT saves them: sorted


def test_patterns_whose_order_is_lost_are_noticed(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter.gguf"
    report = convert_adapter(make_adapter(tmp_path / "a", alpha_pattern=dict(sorted(RIVALS.items()))), base, out)
    (notice,) = report.notices
    assert notice.startswith(
        "alpha_pattern has 'down_proj' (9) and 'layers\\\\.1\\\\..*' (6) for model.layers.1.mlp.down_proj:"
    )
    assert report.scales == (6 / 4, 8 / 4, 9 / 4)
    for patterns in ({**RIVALS, "down_proj": 6}, {r"layers\.0\..*": 6, "down_proj": 9}):
        assert (
            convert_adapter(make_adapter(tmp_path / "a", alpha_pattern=patterns), base, out, force=True).notices == ()
        )


def test_a_rank_of_another_pattern_is_explained(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", r=9, rank_pattern={"down_proj": 2, "q_proj": 4, r"layers\.1\..*": 4})
    with pytest.raises(UnsupportedAdapterError) as caught:
        convert_adapter(folder, base, tmp_path / "adapter.gguf")
    why = (
        r"down_proj: has rank 4, adapter_config.json says 2: rank_pattern has 'down_proj' (2) and 'layers\\.1\\..*' (4)"
    )
    assert why in caught.value.message
    folder = make_adapter(tmp_path / "a", r=9, rank_pattern={"down_proj": 2, "q_proj": 4, "k_proj": 4})
    with pytest.raises(UnsupportedAdapterError, match=r"has rank 4, adapter_config.json says 2$"):
        convert_adapter(folder, base, tmp_path / "adapter.gguf")
