"""Checkpoints whose weights are stored quantized: in rows, with a notice; what is not understood is refused by name."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.checkpoint import Checkpoint
from converters.errors import ConversionError, FormatError, UnsupportedError
from converters.stored.settings import REFUSED
from tests.converters import quantized_folders as quantized
from tests.converters.folders import make_model, write_json
from tests.converters.quantized_folders import AWQ, BLOCK_FP8, GPTQ, SHARED, Encode, make_quantized, packed

UP = "model.layers.1.mlp.up_proj"
EVERY: Mapping[str, tuple[Mapping[str, Any], Encode]] = {**SHARED, "awq": (AWQ, quantized.awq(32))}


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_the_whole_from_many_threads(name: str, tmp_path: Path) -> None:
    """Chunks that begin and end anywhere, read at once."""
    folder = make_quantized(tmp_path, *EVERY[name])
    found: dict[int, np.ndarray[Any, Any]] = {}
    with Checkpoint(folder) as checkpoint:
        whole = checkpoint.rows(f"{UP}.weight")
        assert whole.shape == (224, 160)
        assert np.isfinite(whole).all()

        def read(start: int) -> None:
            found[start] = checkpoint.rows(f"{UP}.weight", start, min(224, start + 37))

        threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 224, 37)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(np.concatenate([found[start] for start in sorted(found)]), whole)


def test_gptq_by_hand(tmp_path: Path) -> None:
    """One number at a time, as the format says: 8 inputs a word, zeros less one, the group that `g_idx` names."""
    folder = make_quantized(tmp_path, GPTQ, quantized.gptq(4, 32, act_order=True))
    parts = {end: quantized.read(folder)[f"{UP}.{end}"][1] for end in ("qweight", "qzeros", "scales", "g_idx")}
    with Checkpoint(folder) as checkpoint:
        ours = checkpoint.rows(f"{UP}.weight")
    for out, inner in ((0, 0), (17, 31), (223, 159), (100, 8)):
        group = parts["g_idx"][inner]
        number = int(parts["qweight"].view(np.uint32)[inner // 8, out]) >> 4 * (inner % 8) & 15
        zero = (int(parts["qzeros"].view(np.uint32)[group, out // 8]) >> 4 * (out % 8) & 15) + 1
        assert ours[out, inner] == np.float32(number - zero) * np.float32(parts["scales"][group, out])


def test_groups_in_an_order_of_their_own(tmp_path: Path) -> None:
    settings = quantized.compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group")
    folder = make_quantized(tmp_path, settings, packed(4, 32, zero=True, order=True))
    with Checkpoint(folder) as checkpoint:
        ours = checkpoint.rows(f"{UP}.weight")
    tensors = quantized.read(folder)
    order = tensors[f"{UP}.weight_g_idx"][1]
    settings = quantized.compressed("pack-quantized", num_bits=4, strategy="group", group_size=1)
    scale, zero = (tensors[f"{UP}.weight_{end}"][1][:, order] for end in ("scale", "zero_point"))
    each = {f"{UP}.weight_scale": ("BF16", scale), f"{UP}.weight_zero_point": ("I32", zero)}
    kept = {name: tensor for name, tensor in tensors.items() if UP in name and "g_idx" not in name}
    quantized.write(folder, {**kept, **each})
    write_json(folder / "config.json", {"quantization_config": settings})
    with Checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(checkpoint.rows(f"{UP}.weight"), ours)


def test_a_notice_says_what_was_lost(tmp_path: Path) -> None:
    report = convert_base(make_quantized(tmp_path, *SHARED["fp8 blocks"]), tmp_path / "out.gguf", quant="q8_0")
    (notice,) = [notice for notice in report.notices if "quantized before" in notice]
    assert "FP8 in blocks of 128x128" in notice
    assert "14 of its weights" in notice
    plain = convert_base(make_model(tmp_path / "plain"), tmp_path / "plain.gguf", quant="q8_0")
    assert not [notice for notice in plain.notices if "quantized before" in notice]


def test_memory_does_not_grow_with_the_weight(tmp_path: Path) -> None:
    """A row range of GPTQ's transposed words, 64 rows of a weight of 16 MB of float32."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 1, "head_dim": 64}
    folder = make_quantized(tmp_path, {**GPTQ, "group_size": 128}, quantized.gptq(4, 128), **sizes)
    with Checkpoint(folder) as checkpoint:
        tracemalloc.start()
        rows = checkpoint.rows("model.layers.0.mlp.up_proj.weight", 640, 704)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert rows.nbytes == 64 * 1024 * 4
    assert peak < 8 * rows.nbytes


def test_biases_of_zeros_that_gptq_adds_are_left_out(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, GPTQ, quantized.gptq(4, 32, bias=True))
    assert convert_base(folder, tmp_path / "out.gguf", quant="f32").n_tensors == 21
    tensors = quantized.read(folder)
    quantized.write(folder, {**tensors, f"{UP}.bias": ("F16", np.ones(224, np.float16))})
    with pytest.raises(FormatError, match=rf"{UP}\.bias: no tensor of a llama model"):
        convert_base(folder, tmp_path / "out.gguf", quant="f32", force=True)


def test_settings_are_found_where_programs_put_them(tmp_path: Path) -> None:
    encode = quantized.fp8(None, end="weight_scale")
    folder = make_quantized(tmp_path / "modelopt", None, encode)
    write_json(
        folder / "hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    )
    with Checkpoint(folder) as checkpoint:
        assert "ModelOpt" in checkpoint.notices[0]
    folder = make_quantized(tmp_path / "autogptq", None, quantized.gptq(4, 32))
    write_json(folder / "quantize_config.json", {"bits": 4, "group_size": 32})
    with Checkpoint(folder) as checkpoint:
        assert "GPTQ (4 bits)" in checkpoint.notices[0]
    form, settings = SHARED["pack-quantized 4"][1], dict(SHARED["pack-quantized 4"][0])
    folder = make_quantized(tmp_path / "older", settings, form)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "compression_config": config.pop("quantization_config")})
    with Checkpoint(folder) as checkpoint:
        assert "compressed-tensors" in checkpoint.notices[0]


@pytest.mark.parametrize("method", [*REFUSED, "someones-own"])
def test_others_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedError) as caught:
        Checkpoint(folder)
    assert REFUSED.get(method, method) in caught.value.message
    assert "not quantized" in caught.value.hint


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
NOT_READ: dict[str, tuple[Mapping[str, Any], str]] = {
    "3 bits of GPTQ": ({**GPTQ, "bits": 3}, "bits 3; known are 2, 4, 8"),
    "GPTQ for Marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "AWQ for another kernel": ({**AWQ, "version": "gemv"}, "version 'gemv'"),
    "ModelOpt's NVFP4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "NVFP4": ({**quantized.compressed("nvfp4-pack-quantized")}, "NVFP4"),
    "two kinds": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"a": GROUP, "b": {"weights": {**GROUP["weights"], "num_bits": 8}}}},  # type: ignore[dict-item]
        "more than one kind"),
    "no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups"),
    "sparse": ({**quantized.compressed("pack-quantized"), "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
    "rotated": ({**quantized.compressed("pack-quantized"), "transform_config": {"R1": {}}}, "rotations"),
    "blocks of words": ({**BLOCK_FP8, "weight_block_size": "128x128"}, "128x128"),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_READ)
def test_variants_that_are_not_read(what: str, tmp_path: Path) -> None:
    settings, message = NOT_READ[what]
    folder = make_model(tmp_path, quantization_config=dict(settings))
    with pytest.raises(UnsupportedError, match=message):
        Checkpoint(folder)


def test_quantized_weights_without_a_word_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"does not say how to read them(.|\n)*qweight"):
        Checkpoint(make_quantized(tmp_path / "gptq", None, quantized.gptq(4, 32)))
    folder = make_quantized(tmp_path / "fp8", None, quantized.fp8(None, end="unknown"))
    tensors = {
        name: tensor for name, tensor in quantized.read(folder).items() if "_proj.w" in name or "proj" not in name
    }
    quantized.write(folder, tensors)
    with pytest.raises(UnsupportedError, match="14 weights are no F64, F32, F16 or BF16") as caught:
        convert_base(folder, tmp_path / "out.gguf")
    assert "scales" in caught.value.hint


def test_a_float8_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, *SHARED["fp8 blocks"])
    tensors = quantized.read(folder)
    del tensors[f"{UP}.weight_scale_inv"]
    quantized.write(folder, tensors)
    with pytest.raises(UnsupportedError, match=rf"1 weights(.|\n)*{UP}\.weight: is F8_E4M3"):
        convert_base(folder, tmp_path / "out.gguf")


Change = Callable[[quantized.Parts], None]


def without(end: str) -> Change:
    return lambda tensors: tensors.pop(f"{UP}.{end}") and None


def replaced(end: str, dtype: str, array: np.ndarray[Any, Any]) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{end}": (dtype, array)})


BROKEN: dict[str, tuple[str, Change, str]] = {
    "scales gone": ("gptq 4", without("scales"), "scales: is missing"),
    "zeros gone": ("gptq 4", without("qzeros"), "qzeros: is missing"),
    "words of another dtype": ("gptq 4", replaced("qweight", "F32", np.zeros((20, 224), np.float32)), "is F32"),
    "words of another shape": ("gptq 4", replaced("qweight", "I32", np.zeros((9, 224), np.int32)), "has shape"),
    "words of no shape": ("gptq 4", replaced("qweight", "I32", np.zeros(7, np.int32)), "expected matrices"),
    "both": ("gptq 4", replaced("weight", "F32", np.zeros((224, 160), np.float32)), "is there beside"),
    "scales of another grid": (
        "fp8 blocks", replaced("weight_scale_inv", "F32", np.ones((5, 2), np.float32)), "does not fit"),
    "weight gone": ("fp8 blocks", without("weight"), "up_proj.weight: is missing"),
    "scales of whole numbers": ("fp8 blocks", replaced("weight_scale_inv", "I8", np.ones((2, 2), np.int8)), "is I8"),
    "a shape of its own": ("pack-quantized 4", replaced("weight_shape", "I64", np.array([224, 2**40])), "has shape"),
    "a negative shape": ("pack-quantized 4", replaced("weight_shape", "I64", np.array([-224, 160])), "has shape"),
    "no shape": ("pack-quantized 4", without("weight_shape"), "weight_shape: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_parts_that_do_not_fit(what: str, tmp_path: Path) -> None:
    name, change, message = BROKEN[what]
    folder = make_quantized(tmp_path, *SHARED[name])
    tensors = quantized.read(folder)
    change(tensors)
    quantized.write(folder, tensors)
    with pytest.raises(FormatError, match=message):
        Checkpoint(folder)


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = make_quantized(tmp_path, *SHARED["gptq 4"])
    tensors = quantized.read(folder)
    quantized.write(folder, {**tensors, f"{UP}.g_idx": ("I32", np.full(160, 9, np.int32))})
    with pytest.raises(FormatError, match=r"up_proj\.g_idx names groups outside 0 to 4"):
        convert_base(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


JUNK: tuple[Any, ...] = (None, "x", -1, 0, 1e99, [], {}, [[]], True)


@pytest.mark.parametrize(
    "name", ["fp8 blocks", "modelopt fp8", "float-quantized block", "pack-quantized 4", "gptq 4", "awq"]
)
def test_no_setting_is_a_crash(name: str, tmp_path: Path) -> None:
    """Each key of the settings, also those of a group's weights, gone or of another value."""
    folder = make_quantized(tmp_path, *EVERY[name])
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    weights = settings.get("config_groups", {}).get("group_0", {}).get("weights", {})
    done = 0
    for holder, key in [*((settings, key) for key in list(settings)), *((weights, key) for key in list(weights))]:
        kept = holder.pop(key)
        for value in ("absent", *JUNK):
            holder |= {} if value == "absent" else {key: value}
            write_json(folder / "config.json", config)
            try:
                with Checkpoint(folder) as checkpoint:
                    done += len(checkpoint.tensors)
            except ConversionError as error:
                done += bool(error.message)
        holder[key] = kept
    assert done
