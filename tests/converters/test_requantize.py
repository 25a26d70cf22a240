"""GGUF to GGUF without llama.cpp: what is kept, what is refused by name, importance and types by hand."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.adapter import convert_adapter
from converters.base import convert_base
from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.errors import (
    ConversionError,
    FormatError,
    MissingFileError,
    OutputExistsError,
    TruncatedFileError,
    UnsupportedError,
    WriteError,
)
from converters.fingerprint import fingerprint
from converters.imatrix import Importance, ImportanceMatrix
from converters.options import QuantizeOptions
from converters.quant_types import RECIPES, Overrides
from converters.quantize import quantize_rows
from converters.reader import read_header
from converters.requantize import plan_requantize, requantize
from converters.writer import TensorSpec, Value, create, header_bytes
from tests.converters.folders import make_adapter, make_model

WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
Floats = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows fill blocks of 256."""
    return make_model(tmp_path_factory.mktemp("wide") / "model", **WIDE)


@pytest.fixture(scope="module")
def full(wide: Path) -> Path:
    return convert_base(wide, wide.parent / "f32.gguf", quant="f32").path


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("tied") / "model", **WIDE, tie_word_embeddings=True)
    return convert_base(folder, folder.parent / "f32.gguf", quant="f32").path


def matrix_for(path: Path, leave_out: str = "token_embd", seed: int = 1) -> ImportanceMatrix:
    """Importance of every matrix of a file but those that `leave_out` is in."""
    rng = np.random.default_rng(seed)
    entries = {
        name: Importance(rng.random(tensor.shape[-1], np.float32), np.array([1], np.int64))
        for name, tensor in read_header(path).tensors.items()
        if len(tensor.shape) > 1 and leave_out not in name
    }
    return ImportanceMatrix(entries, ("text.txt",), 5, 512)


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    with BaseFile(path) as base:
        return {name: (it.type_name, base.blocks(name).tobytes()) for name, it in base.header.tensors.items()}


def write(path: Path, arrays: Mapping[str, Floats], metadata: Mapping[str, Value], kind: str = "F32") -> Path:
    specs = [TensorSpec(name, array.shape, TYPES[kind]) for name, array in arrays.items()]
    with create(path, header_bytes(metadata, specs)) as file:
        for spec in specs:
            rows = arrays[spec.name].reshape(-1, spec.shape[-1])
            file.write(quantize_rows(rows, spec.block_type).tobytes())
            file.end_tensor(spec)
    return path


STRANGER: dict[str, Value] = {"general.architecture": "stranger", "stranger.block_count": 1}


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m", "q3_k_m"])
def test_in_two_steps_or_in_one_the_bytes_are_the_same(quant: str, wide: Path, full: Path, tmp_path: Path) -> None:
    one = convert_base(wide, tmp_path / "one.gguf", quant=quant)
    two = requantize(full, tmp_path / "two.gguf", QuantizeOptions(quant))
    assert contents(one.path) == contents(two.path)
    assert dict(read_header(one.path).metadata) == dict(read_header(two.path).metadata)
    assert fingerprint(two.path) == two.fingerprint == one.fingerprint
    for field in ("name", "architecture", "quant", "chat_template", "types", "n_tensors"):
        assert getattr(one, field) == getattr(two, field)
    assert contents(one.path) != contents(full)


@pytest.mark.parametrize("quant", ["q4_k_m", "iq3_xs", "q2_k_s"])
def test_importance_counts_the_same_in_one_step(quant: str, wide: Path, full: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(quant, imatrix=matrix_for(full, "none"), imatrix_file="im.gguf")
    one = convert_base(wide, tmp_path / "one.gguf", options=options)
    two = requantize(full, tmp_path / "two.gguf", options)
    assert contents(one.path) == contents(two.path)
    metadata = read_header(one.path).metadata
    assert dict(metadata) == dict(read_header(two.path).metadata)
    assert metadata["quantize.imatrix.file"] == "im.gguf"
    other = QuantizeOptions(quant, imatrix=matrix_for(full, "none", seed=2))
    three = requantize(full, tmp_path / "three.gguf", other)
    assert contents(three.path) != contents(two.path)
    assert "quantize.imatrix.file" not in read_header(three.path).metadata


def test_tensors_without_importance_are_noticed(full: Path, tmp_path: Path) -> None:
    report = requantize(full, tmp_path / "a.gguf", QuantizeOptions("q4_k_m", imatrix=matrix_for(full)))
    assert report.notices == ("the importance matrix has nothing for token_embd.weight: quantized without",)
    report = requantize(full, tmp_path / "b.gguf", QuantizeOptions("q4_k_m", imatrix=matrix_for(full, "none")))
    assert report.notices == ()


@pytest.mark.parametrize("quant", ["iq1_s", "iq2_xxs", "iq2_m", "iq3_xxs", "q2_k_s"])
def test_few_bits_need_importance(quant: str, wide: Path, full: Path, tmp_path: Path) -> None:
    for source, convert in ((wide, convert_base), (full, requantize)):
        with pytest.raises(UnsupportedError, match=f"{quant} needs an importance matrix.*\\n.*blk.0") as caught:
            convert(source, tmp_path / "out.gguf", options=QuantizeOptions(quant))  # type: ignore[operator]
        assert "--imatrix" in caught.value.hint
        assert "--calibrate" in caught.value.hint
    partly = matrix_for(full, "blk.1.ffn_up")
    with pytest.raises(UnsupportedError, match=r"has nothing for tensors .*\n.*blk\.1\.ffn_up\.weight"):
        requantize(full, tmp_path / "out.gguf", QuantizeOptions(quant, imatrix=partly))
    assert list(tmp_path.iterdir()) == []


def test_importance_of_another_model(full: Path, tmp_path: Path) -> None:
    entries = matrix_for(full).entries
    name = "blk.0.ffn_up.weight"
    wrong = {**entries, name: Importance(np.ones(100, np.float32), np.array([1], np.int64))}
    with pytest.raises(FormatError, match=r"100 values for blk\.0\.ffn_up\.weight, the tensor has 256"):
        requantize(full, tmp_path / "a.gguf", QuantizeOptions("q4_0", imatrix=ImportanceMatrix(wrong, ("t",), 1, 1)))
    other = {f"dec.{name}": entry for name, entry in entries.items()}
    with pytest.raises(FormatError, match="none of the importance matrix's"):
        requantize(full, tmp_path / "a.gguf", QuantizeOptions("q4_0", imatrix=ImportanceMatrix(other, ("t",), 1, 1)))


def test_types_by_hand(full: Path, tmp_path: Path) -> None:
    overrides = Overrides((("ffn_down", "q8_0"),), output="q5_1", token_embedding="f16")
    requantize(full, tmp_path / "a.gguf", QuantizeOptions("q4_k_m", overrides))
    types = {name: tensor.type_name for name, tensor in read_header(tmp_path / "a.gguf").tensors.items()}
    assert {types[f"blk.{layer}.ffn_down.weight"] for layer in (0, 1)} == {"Q8_0"}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q5_1", "F16")
    assert types["blk.0.attn_k.weight"] == "Q4_K"


@pytest.mark.parametrize("pattern", ["ffn_dwon", "attn_norm", "output_norm"])
def test_a_type_by_hand_for_nothing_is_refused(pattern: str, wide: Path, full: Path, tmp_path: Path) -> None:
    """A slip of the pen, and norms, which are never quantized."""
    options = QuantizeOptions("q4_k_m", Overrides(((pattern, "q8_0"),)))
    for source, convert in ((wide, convert_base), (full, requantize)):
        with pytest.raises(UnsupportedError, match=pattern) as caught:
            convert(source, tmp_path / "a.gguf", options=options)  # type: ignore[operator]
        assert "ffn_down" in caught.value.hint
    with pytest.raises(UnsupportedError, match="f16 does not"):
        requantize(full, tmp_path / "a.gguf", QuantizeOptions("f16", Overrides((("ffn_down", "q8_0"),))))


def test_rows_that_fall_back_are_noticed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=256, intermediate_size=288, head_dim=64)
    base = convert_base(folder, tmp_path / "f32.gguf", quant="f32")
    report = requantize(base.path, tmp_path / "q.gguf", QuantizeOptions("q4_k_m"))
    assert any("rows of 288 are not a multiple of 256" in notice for notice in report.notices)
    assert base.notices == ()


def test_keys_are_kept_as_they_lie(full: Path, tmp_path: Path) -> None:
    keys: dict[str, Value] = {"edgelora.notes": ["a", "ß", ""], "tokenizer.chat_template": "new", "x": True}
    one = requantize(full, tmp_path / "one.gguf", QuantizeOptions("bf16"), metadata=keys)
    assert one.chat_template == "new"
    two = requantize(one.path, tmp_path / "two.gguf", QuantizeOptions("q4_0"))
    before, after = read_header(full).metadata, read_header(two.path).metadata
    changed = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert changed == {*keys, "general.file_type"}
    assert {key: after[key] for key in keys} == keys
    for key in {*before} - changed - {"general.quantization_version"}:
        assert before.raw(key) == after.raw(key)
    assert two.fingerprint == fingerprint(full)


# Untying


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m"])
def test_untied_embeddings_are_written_twice(quant: str, tied: Path, tmp_path: Path) -> None:
    plain = requantize(tied, tmp_path / "plain.gguf", QuantizeOptions(quant))
    report = requantize(tied, tmp_path / "untied.gguf", QuantizeOptions(quant, untie=True))
    one, two = contents(plain.path), contents(report.path)
    assert "output.weight" not in one
    assert report.fingerprint == plain.fingerprint == fingerprint(report.path)
    # As the output of a model that has its own, it is what the tied embeddings were: they are the output too.
    assert two.pop("output.weight") == one.pop("token_embd.weight")
    two.pop("token_embd.weight")
    assert one == two
    folder = tied.parent / "model"
    direct = convert_base(folder, tmp_path / "direct.gguf", quant=quant, untie=True)
    assert contents(direct.path) == contents(report.path)


def test_an_output_of_its_own_needs_no_untying(full: Path, tmp_path: Path) -> None:
    one = requantize(full, tmp_path / "one.gguf", QuantizeOptions("q8_0", untie=True))
    two = requantize(full, tmp_path / "two.gguf", QuantizeOptions("q8_0"))
    assert one.path.read_bytes() == two.path.read_bytes()


def test_untying_where_llama_cpp_has_no_output(tmp_path: Path) -> None:
    arrays = {"token_embd.weight": np.ones((4, 32), np.float32)}
    for architecture, message in (("gemma", "gemma has no output tensor"), ("stranger", "is not known here")):
        metadata: dict[str, Value] = {"general.architecture": architecture, f"{architecture}.block_count": 1}
        path = write(tmp_path / f"{architecture}.gguf", arrays, metadata)
        with pytest.raises(UnsupportedError, match=message):
            requantize(path, tmp_path / "out.gguf", QuantizeOptions("q8_0", untie=True))
        assert requantize(path, tmp_path / "out.gguf", QuantizeOptions("q8_0"), force=True).types == {"Q8_0": 1}


# Refused


def test_adapters_and_other_files(full: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    base = convert_base(folder, tmp_path / "base.gguf", quant="f32").path
    adapter = convert_adapter(make_adapter(tmp_path / "adapter"), base, tmp_path / "adapter.gguf").path
    with pytest.raises(UnsupportedError, match="a GGUF adapter"):
        requantize(adapter, tmp_path / "out.gguf")
    with pytest.raises(MissingFileError):
        requantize(tmp_path / "none.gguf", tmp_path / "out.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(FormatError, match="not a GGUF file"):
        requantize(tmp_path / "text.gguf", tmp_path / "out.gguf")
    short = tmp_path / "short.gguf"
    short.write_bytes(full.read_bytes()[:-100])
    with pytest.raises(TruncatedFileError):
        requantize(short, tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match="unknown quantization"):
        requantize(full, tmp_path / "out.gguf", QuantizeOptions("q9"))
    no_layers = write(tmp_path / "x.gguf", {"a.weight": np.ones((2, 32), np.float32)}, {"general.architecture": "x"})
    with pytest.raises(UnsupportedError, match=r"no x\.block_count"):
        requantize(no_layers, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_quantized_types_are_named(full: Path, tmp_path: Path) -> None:
    small = requantize(full, tmp_path / "small.gguf", QuantizeOptions("q4_k_m")).path
    with pytest.raises(UnsupportedError, match="are Q4_K, Q6_K") as caught:
        requantize(small, tmp_path / "out.gguf", QuantizeOptions("q8_0"))
    assert "F16" in caught.value.hint
    report = requantize(small, tmp_path / "out.gguf", QuantizeOptions("q8_0", allow_requantize=True))
    assert report.fingerprint == fingerprint(full)


def test_a_vocabulary_is_no_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {}, {**STRANGER, "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(FormatError, match="has no tensors"):
        requantize(path, tmp_path / "b.gguf", dry_run=True)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    spec = TensorSpec("blk.0.a.weight", (2, 32), TYPES["I32"])
    with create(tmp_path / "a.gguf", header_bytes(STRANGER, [spec])) as file:
        file.write(bytes(spec.size_bytes))
        file.end_tensor(spec)
    with pytest.raises(UnsupportedError, match=r"no weights:\n  - blk\.0\.a\.weight \(I32\)"):
        requantize(tmp_path / "a.gguf", tmp_path / "out.gguf")


def test_the_source_is_not_written_over(full: Path, tmp_path: Path) -> None:
    files = requantize(full, tmp_path / "a.gguf", QuantizeOptions("f16", split_max_tensors=9)).files
    data = [path.read_bytes() for path in files]
    for out in files:
        with pytest.raises(WriteError, match="which is read for it"):
            requantize(files[0], out, QuantizeOptions("q8_0"), force=True)
    with pytest.raises(WriteError, match="which is read for it"):
        requantize(files[0], tmp_path / "a.gguf", QuantizeOptions("q8_0", split_max_tensors=9), force=True)
    with pytest.raises(WriteError, match="which is read for it"):  # these would be removed in the end
        requantize(files[0], tmp_path / "a.gguf", QuantizeOptions("q8_0", split_max_tensors=5), force=True)
    assert [path.read_bytes() for path in files] == data
    (tmp_path / "b.gguf").write_text("precious")
    with pytest.raises(OutputExistsError):
        requantize(full, tmp_path / "b.gguf")


def test_a_vector_that_is_broken_is_noticed_and_can_be_refused(tmp_path: Path) -> None:
    """Also where it is copied and not computed."""
    arrays = {"blk.0.a.weight": np.ones((2, 32), np.float32), "blk.0.a_norm.weight": np.ones(8, np.float32)}
    arrays["blk.0.a_norm.weight"][3] = np.nan
    path = write(tmp_path / "a.gguf", arrays, STRANGER)
    report = requantize(path, tmp_path / "out.gguf", QuantizeOptions("q8_0"))
    assert report.notices == ("blk.0.a_norm.weight: holds values that are NaN or infinite",)
    with pytest.raises(FormatError, match=r"blk\.0\.a_norm\.weight: holds values"):
        requantize(path, tmp_path / "strict.gguf", QuantizeOptions("q8_0", strict=True))
    assert not (tmp_path / "strict.gguf").exists()


def test_a_file_that_becomes_shorter_meanwhile(full: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.gguf"
    source.write_bytes(full.read_bytes())

    def shorten(done: int, total: int, what: str) -> None:
        if source.stat().st_size > 1000:
            source.write_bytes(source.read_bytes()[:1000])

    with pytest.raises(TruncatedFileError, match="ends inside tensor"):
        requantize(source, tmp_path / "out.gguf", QuantizeOptions("q8_0", threads=1), progress=shorten)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("quant", sorted(name for name, recipe in RECIPES.items() if not recipe.needs_imatrix))
def test_every_recipe_reads_back_its_own_plan(quant: str, full: Path, tmp_path: Path) -> None:
    planned = requantize(full, tmp_path / "a.gguf", QuantizeOptions(quant), dry_run=True)
    assert not (tmp_path / "a.gguf").exists()
    report = requantize(full, tmp_path / "a.gguf", QuantizeOptions(quant))
    header = read_header(report.path)
    assert planned.size_bytes == report.size_bytes == header.size_bytes
    assert planned.plan is not None
    types = {tensor.name: (tensor.type, tensor.size_bytes) for tensor in planned.plan.tensors}
    assert types == {name: (tensor.type_name, tensor.size_bytes) for name, tensor in header.tensors.items()}


def test_no_byte_of_a_header_is_a_crash(tmp_path: Path) -> None:
    """A changed header is refused by name, or its tensors can be read."""
    arrays = {"token_embd.weight": np.ones((2, 32), np.float32), "blk.0.a_norm.weight": np.ones(8, np.float32)}
    keys: dict[str, Value] = {**STRANGER, "general.alignment": 32, "stranger.attention.head_count": [1]}
    keys |= {"split.count": 1, "general.name": "x", "tokenizer.ggml.tokens": ["a", "b"]}
    path, options = write(tmp_path / "a.gguf", arrays, keys), QuantizeOptions("q8_0")
    data, refused = path.read_bytes(), 0
    for position in range(24, data.index(b"blk.0") + 60):
        for value in (0, 1, 0xFF):
            path.write_bytes(data[:position] + bytes([value]) + data[position + 1 :])
            try:
                with BaseFile(path) as base:
                    job = plan_requantize(base, options, {})
                    assert job.parts(tmp_path / "out.gguf", options)
                    for source in job.sources:
                        assert (source.read or source.read_blocks)(0, 1) is not None  # type: ignore[misc]
            except ConversionError:
                refused += 1
    assert refused > 300


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "expert_count"])
@pytest.mark.parametrize("value", ["x", 1.5, float("nan"), ["x"], [1.5]])
def test_sizes_that_are_no_numbers(key: str, value: Value, tmp_path: Path) -> None:
    arrays, options = {"blk.0.ffn_up.weight": np.ones((2, 32), np.float32)}, QuantizeOptions("q8_0")
    requantize(write(tmp_path / "a.gguf", arrays, {**STRANGER, f"stranger.{key}": 1}), tmp_path / "b.gguf", options)
    path = write(tmp_path / "a.gguf", arrays, {**STRANGER, f"stranger.{key}": value})
    with pytest.raises(FormatError, match=rf"stranger\.{key} is .*, expected a whole number"):
        requantize(path, tmp_path / "c.gguf", options)


def test_strings_and_numbers_survive(tmp_path: Path) -> None:
    """By gguf's own reader and writer: every type of value."""
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "stranger")
    writer.add_uint32("stranger.block_count", 1)
    values: dict[str, Any] = {
        "u8": 7,
        "i8": -7,
        "u16": 500,
        "i16": -500,
        "i32": -(2**30),
        "u64": 2**60,
        "i64": -(2**60),
    }
    kinds = {
        "u8": "uint8",
        "i8": "int8",
        "u16": "uint16",
        "i16": "int16",
        "i32": "int32",
        "u64": "uint64",
        "i64": "int64",
    }
    for key, kind in kinds.items():
        getattr(writer, f"add_{kind}")(key, values[key])
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_array("floats", [1.5, 2.5])
    writer.add_tensor("blk.0.a.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    requantize(path, tmp_path / "b.gguf", QuantizeOptions("q8_0"))
    one, two = gguf.GGUFReader(path).fields, gguf.GGUFReader(tmp_path / "b.gguf").fields
    for key in (*values, "f32", "f64", "yes", "floats"):
        assert one[key].types == two[key].types
        assert one[key].contents() == two[key].contents()
    assert struct.pack("<d", two["f64"].contents()) == struct.pack("<d", 1e-300)
