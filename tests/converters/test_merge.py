"""Merging streams: one pass, little memory, and the bytes of a merge and a quantization after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.errors import MissingFileError
from converters.fingerprint import fingerprint
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from converters.quantize import quantize_rows
from converters.reader import read_header
from converters.requantize import requantize
from tests.converters import children
from tests.converters.folders import lora_weights, make_adapter, make_model
from tests.equivalence.gguf_models import stored

MEGABYTES = 1 << 20
# K-quants have blocks of 256 values.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
SHAPES: Mapping[str, tuple[int, int]] = {"q_proj": (256, 256), "k_proj": (128, 256), "down_proj": (256, 512)}
MODULES = {
    f"model.layers.{layer}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}": shape
    for layer in range(2)
    for name, shape in SHAPES.items()
}
DOWN = "blk.0.ffn_down.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", **SIZES)


@pytest.fixture(params=["LoRA", "DoRA"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / "adapter", is_dora=request.param == "DoRA")


def make(folder: Path, *, is_dora: bool = False, seed: int = 0) -> Path:
    arrays = {name: values * np.float32(0.1) for name, values in lora_weights(MODULES, seed=seed).items()}
    if is_dora:
        lengths = {
            f"base_model.model.{name}.lora_magnitude_vector": np.full(rows, 1.5, np.float32)
            for name, (rows, _) in MODULES.items()
        }
        return make_adapter(folder, {**arrays, **lengths}, use_dora=True)
    return make_adapter(folder, arrays)


def types(path: Path) -> dict[str, str]:
    return {name: tensor.type_name for name, tensor in read_header(path).tensors.items()}


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0", "bf16"])
def test_one_pass_gives_the_bytes_of_two(quant: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of a folder and of a file, merged and quantized in one pass, or merged in F32 and quantized after."""
    plain = convert_base(base, tmp_path / "plain.gguf", quant="f32").path
    whole = merge(base, [Merged(adapter)], tmp_path / "whole.gguf", QuantizeOptions("f32")).path
    after = requantize(whole, tmp_path / "after.gguf", QuantizeOptions(quant)).path
    for source in (base, plain):
        out = merge(source, [Merged(adapter)], tmp_path / "out.gguf", QuantizeOptions(quant), force=True).path
        assert stored(out) == stored(after)
    unmerged = requantize(plain, tmp_path / "unmerged.gguf", QuantizeOptions(quant)).path
    assert stored(unmerged)[DOWN] != stored(after)[DOWN], "bytes that an adapter does not change would prove nothing"


def test_a_quantized_base_is_computed_back_changed_and_quantized_again(base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter")
    before = convert_base(base, tmp_path / "before.gguf", quant="q4_k_m").path
    after = merge(before, [Merged(adapter)], tmp_path / "after.gguf").path
    assert types(after) == types(before)
    assert set(types(before).values()) > {"Q4_K", "Q6_K"}
    weights = {name: values * np.float32(0.1) for name, values in lora_weights(MODULES).items()}
    a, b = (weights[f"base_model.model.model.layers.0.mlp.down_proj.lora_{part}.weight"] for part in "AB")
    with BaseFile(before) as file:
        expected = quantize_rows(file.rows(DOWN) + (2 * b) @ a, TYPES[types(before)[DOWN]])
    assert stored(after)[DOWN][1] == expected.tobytes()
    untouched = "blk.1.ffn_up.weight"
    assert stored(after)[untouched] == stored(before)[untouched]


def test_fingerprints_tell_merged_bases_apart(base: Path, tmp_path: Path) -> None:
    """By the adapter's content and its scale, whatever the quantization and the names of files."""
    one, other = make(tmp_path / "adapter"), make(tmp_path / "other" / "adapter", seed=1)
    plain = convert_base(base, tmp_path / "plain.gguf", quant="f32").path

    def merged(source: Path, adapter: Path, scale: float = 1.0, quant: str = "f32") -> str:
        out = tmp_path / "out.gguf"
        report = merge(source, [Merged(adapter, scale)], out, QuantizeOptions(quant), force=True)
        assert report.fingerprint == fingerprint(out) == read_header(out).metadata["edgelora.fingerprint"]
        return report.fingerprint

    first = merged(base, one)
    assert merged(plain, one) == merged(base, one, quant="q4_k_m") == first
    assert len({first, merged(base, other), merged(base, one, 0.5), fingerprint(base)}) == 4


def test_a_base_in_several_parts(base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter")
    plain = convert_base(base, tmp_path / "plain.gguf", quant="q4_k_m").path
    split = QuantizeOptions("q4_k_m", split_max_tensors=6)
    parts = convert_base(base, tmp_path / "parts.gguf", options=split)
    first = next(iter(sorted(tmp_path.glob("parts-00001-of-*.gguf"))))
    whole = merge(plain, [Merged(adapter)], tmp_path / "whole.gguf").path
    joined = merge(first, [Merged(adapter)], tmp_path / "joined.gguf").path
    assert parts.n_tensors > 6
    assert stored(joined) == stored(whole)
    assert fingerprint(joined) == fingerprint(whole)
    merge(base, [Merged(adapter)], tmp_path / "cut.gguf", split)
    cut = next(iter(sorted(tmp_path.glob("cut-00001-of-*.gguf"))))
    assert fingerprint(cut) == fingerprint(whole)
    with BaseFile(cut) as several, BaseFile(merge(base, [Merged(adapter)], tmp_path / "one.gguf").path) as one:
        assert several.header.tensors.keys() == one.header.tensors.keys()
        assert all((several.blocks(name) == one.blocks(name)).all() for name in one.header.tensors)
    first.unlink()
    with pytest.raises(MissingFileError):
        merge(first, [Merged(adapter)], tmp_path / "again.gguf")


MERGE = """
    from converters.merge import Merged, merge
    before = status("VmHWM")
    merge(source, [Merged(Path(sys.argv[4]))], out, QuantizeOptions(**asked))
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("is_dora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["LoRA", "DoRA"])
def test_memory_does_not_grow_with_the_base(is_dora: bool, tmp_path: Path) -> None:
    """150 MB of F32 in 40 tensors; a LoRA's rows are changed as they stream by, and DoRA's too."""
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 11, "head_dim": 64}
    folder = make_model(tmp_path / "base", num_attention_heads=8, num_key_value_heads=8, **sizes)
    base = convert_base(folder, tmp_path / "base.gguf", quant="f32").path
    assert base.stat().st_size > 140 * MEGABYTES
    modules = {f"model.layers.{layer}.mlp.up_proj": (1536, 512) for layer in range(11)}
    arrays = {name: values * np.float32(0.1) for name, values in lora_weights(modules).items()}
    lengths = {f"base_model.model.{name}.lora_magnitude_vector": np.ones(1536, np.float32) for name in modules}
    adapter = make_adapter(tmp_path / "adapter", {**arrays, **(lengths if is_dora else {})}, use_dora=is_dora)
    done = children.run(MERGE, base, tmp_path / "out.gguf", str(adapter), quant="q8_0", threads=1)
    assert int(done.stdout) < base.stat().st_size // 3, done.stderr
    assert types(tmp_path / "out.gguf")[DOWN] == "Q8_0"


def test_the_order_of_tensors_is_that_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter")
    plain = convert_base(base, tmp_path / "plain.gguf", quant="q8_0").path
    merged = merge(plain, [Merged(adapter)], tmp_path / "merged.gguf").path
    assert [*read_header(merged).tensors] == [*read_header(plain).tensors]
