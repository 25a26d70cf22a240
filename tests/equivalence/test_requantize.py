"""A GGUF base quantized again is the file that llama-quantize writes, to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters import requantize as requantize_module
from converters.base import convert_base
from converters.block_types import TYPES
from converters.errors import UnsupportedError
from converters.fingerprint import fingerprint
from converters.imatrix import Importance, ImportanceMatrix
from converters.options import QuantizeOptions
from converters.quant_types import RECIPES, Overrides
from converters.reader import read_header
from converters.requantize import requantize
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.gguf_models import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    Floats,
    GGUFModel,
    random_imatrix,
    random_weights,
    stored,
    write_gguf,
)
from tests.equivalence.tiny_models import TINY

MODELS = {
    "llama": GGUFModel(n_layer=5, n_head_kv=2),
    "llama, tied": GGUFModel(n_layer=3, tied=True),
    "mixture": GGUFModel("qwen3moe", n_layer=3, n_expert=4, parts=(*ATTENTION, *EXPERTS)),
    "no table of ours": GGUFModel("deci", n_layer=3, parts=(*ATTENTION, *FEED_FORWARD)),
    "odd rows": GGUFModel(n_layer=3, columns={"ffn_down": 288, "attn_v": 300}),
    "a matrix of one row": GGUFModel(
        n_layer=2, others={"blk.0.attn_sinks.weight": (1, 256), "rope_freqs.weight": (8,)}
    ),
}
EVERY_TYPE = ("F32", "F16", "BF16")
QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0", "iq4_xs", "q3_k_l", "q2_k", "iq3_s")
WITH_IMATRIX = ("q4_k_m", "q2_k_s", "q3_k_m", "iq4_nl", "q8_0")
SLOW_QUANTS = tuple(name for name in RECIPES if name not in (*QUANTS, *WITH_IMATRIX) and name not in ("q1_0", "q2_0"))
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A model's file, made once for each source type."""
    folder, paths = tmp_path_factory.mktemp("sources"), dict[tuple[str, str], Path]()

    def make(name: str, source: str = "F32") -> Path:
        if (name, source) not in paths:
            model = MODELS[name]
            weights = random_weights(model.shapes)
            types = {key: source for key, values in weights.items() if values.ndim > 1 and "_norm" not in key}
            fits = {key: kind for key, kind in types.items() if weights[key].shape[-1] % TYPES[kind].block == 0}
            metadata = {**model.metadata, "general.name": "Ünïcode", "edgelora.format": 1, "list": ["a", "", "ß"]}
            metadata |= {"numbers": [1, -2, 3], "flags": [True, False], "general.file_type": 0}
            paths[name, source] = write_gguf(folder / f"{len(paths)}.gguf", metadata, weights, fits)
        return paths[name, source]

    return make


def pairs(model: GGUFModel) -> tuple[dict[str, Floats], ImportanceMatrix]:
    """An importance matrix as llama.cpp takes it, and as ours."""
    values = random_imatrix(model.shapes)
    entries = {name: Importance(entry, np.array([1], np.int64)) for name, entry in values.items()}
    return values, ImportanceMatrix(entries, ("text",), 3, 512)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_file_is_equal(name: str, quant: str, made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = made(name), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    report = requantize(source, ours, QuantizeOptions(quant))
    llamacpp.quantize(source, theirs, RECIPES[quant].file_type)
    assert ours.read_bytes() == theirs.read_bytes()
    assert report.size_bytes == ours.stat().st_size


@pytest.mark.parametrize("source", ["F16", "BF16"])
@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q4_k_m"])
def test_from_sixteen_bits(quant: str, source: str, made: Maker, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    requantize(made("llama", source), ours, QuantizeOptions(quant))
    llamacpp.quantize(made("llama", source), theirs, RECIPES[quant].file_type)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("source", ["Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0", "f16"])
def test_from_quantized_types_where_that_is_accepted(quant: str, source: str, made: Maker, tmp_path: Path) -> None:
    given, ours, theirs = made("llama", source), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    if {tensor.type_name for tensor in read_header(given).tensors.values()} != {"F32", quant.upper()}:
        with pytest.raises(UnsupportedError, match=f"is quantized already: .* {source}") as caught:
            requantize(given, ours, QuantizeOptions(quant))
        assert "--allow-requantize" in caught.value.hint
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(RuntimeError, match="requantizing"):
            llamacpp.quantize(given, theirs, RECIPES[quant].file_type)
    requantize(given, ours, QuantizeOptions(quant, allow_requantize=True))
    llamacpp.quantize(given, theirs, RECIPES[quant].file_type, allow_requantize=True)
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_stays_as_it_is_needs_no_permission(made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = made("llama", "Q8_0"), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    report = requantize(source, ours, QuantizeOptions("q8_0"))
    llamacpp.quantize(source, theirs, RECIPES["q8_0"].file_type)
    assert ours.read_bytes() == theirs.read_bytes()
    assert set(report.types) == {"F32", "Q8_0"}


@pytest.mark.parametrize("quant", WITH_IMATRIX)
@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_with_an_importance_matrix(name: str, quant: str, made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = made(name), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    values, imatrix = pairs(MODELS[name])
    requantize(source, ours, QuantizeOptions(quant, imatrix=imatrix, imatrix_file="some/file.gguf"))
    llamacpp.quantize(source, theirs, RECIPES[quant].file_type, imatrix=values)
    assert stored(ours) == stored(theirs)
    added = {"file": "some/file.gguf", "dataset": "text", "entries_count": len(values), "chunks_count": 3}
    metadata = dict(read_header(ours).metadata)
    assert metadata == {**read_header(theirs).metadata, **{f"quantize.imatrix.{key}": it for key, it in added.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("quant", SLOW_QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_other_recipe(name: str, quant: str, made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = made(name), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    values, imatrix = pairs(MODELS[name])
    requantize(source, ours, QuantizeOptions(quant, imatrix=imatrix))
    llamacpp.quantize(source, theirs, RECIPES[quant].file_type, imatrix=values)
    assert stored(ours) == stored(theirs)


def test_another_importance_gives_other_bytes(made: Maker, tmp_path: Path) -> None:
    _, imatrix = pairs(MODELS["mixture"])
    entry = imatrix.entries["blk.0.ffn_down_exps.weight"]
    turned = Importance(np.roll(entry.sums, 256), entry.counts)  # each expert gets its neighbour's
    other = ImportanceMatrix({**imatrix.entries, "blk.0.ffn_down_exps.weight": turned}, ("text",), 3, 512)
    files = [tmp_path / "one.gguf", tmp_path / "other.gguf"]
    for path, matrix in zip(files, (imatrix, other), strict=True):
        requantize(made("mixture"), path, QuantizeOptions("q4_k_m", imatrix=matrix))
    one, two = map(stored, files)
    assert [name for name in one if one[name] != two[name]] == ["blk.0.ffn_down_exps.weight"]


def test_types_by_hand(made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = made("llama"), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    overrides = Overrides((("ffn_down", "q6_k"), (r"blk\.[01]\.attn_v", "q8_0")), "q5_k", "q4_0")
    requantize(source, ours, QuantizeOptions("q4_k_m", overrides=overrides))
    numbers = {name: TYPES[name].number for name in ("Q6_K", "Q8_0", "Q5_K", "Q4_0")}
    patterns = (("ffn_down", numbers["Q6_K"]), (r"blk\.[01]\.attn_v", numbers["Q8_0"]))
    llamacpp.quantize(
        source, theirs, RECIPES["q4_k_m"].file_type, tensor_types=patterns, output=numbers["Q5_K"],
        token_embedding=numbers["Q4_0"],
    )  # fmt: skip
    assert ours.read_bytes() == theirs.read_bytes()
    requantize(source, ours, QuantizeOptions("q4_k_m", overrides=Overrides(pure=True)), force=True)
    llamacpp.quantize(source, theirs, RECIPES["q4_k_m"].file_type, pure=True)
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_alignment_is_obeyed_where_llama_quantize_breaks_the_file(made: Maker, tmp_path: Path) -> None:
    source, ours, theirs = tmp_path / "aligned.gguf", tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    with_alignment(made("llama"), source, 128)
    requantize(source, ours, QuantizeOptions("q4_0"))
    requantize(made("llama"), theirs, QuantizeOptions("q4_0"))
    header = read_header(ours)
    assert header.metadata["general.alignment"] == 128
    assert all(tensor.offset % 128 == 0 for tensor in header.tensors.values())
    assert stored(ours) == stored(theirs)
    # llama.cpp reads ours again, and not its own
    llamacpp.quantize(ours, tmp_path / "again.gguf", RECIPES["q4_0"].file_type)
    llamacpp.quantize(source, theirs, RECIPES["q4_0"].file_type)
    with pytest.raises(RuntimeError):
        llamacpp.quantize(theirs, tmp_path / "again.gguf", RECIPES["q4_0"].file_type)


def with_alignment(source: Path, out: Path, alignment: int) -> None:
    """A copy by gguf's own writer."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, "llama")
    writer.add_custom_alignment(alignment)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = entry.types[1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], inner)
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        writer.add_tensor(tensor.name, tensor.data.reshape(shape), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Every family, from a Hugging Face model on


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's F32 file, by its name in `TINY`."""
    pytest.importorskip("torch")
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def build(name: str) -> Path:
        if name not in made:
            folder = tiny_models.build(name, root / name)
            made[name] = convert_base(folder, root / f"{name}.gguf", quant="f32").path
        return made[name]

    return build


@pytest.mark.train
@pytest.mark.parametrize("name", TINY)
def test_every_family(name: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    source, ours, theirs = built(name), tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    report = requantize(source, ours, QuantizeOptions("q4_k_m"))
    llamacpp.quantize(source, theirs, RECIPES["q4_k_m"].file_type)
    assert ours.read_bytes() == theirs.read_bytes()
    parts = requantize(source, tmp_path / "split.gguf", QuantizeOptions("q8_0", split_max_tensors=7)).files
    assert len(parts) > 2
    assert report.fingerprint == fingerprint(source.parent / name) == fingerprint(ours) == fingerprint(parts[-1])


@pytest.mark.train
@pytest.mark.parametrize("name", ["llama-3", "qwen2-tied", "qwen3"])
def test_untied_embeddings_give_the_same_logits(name: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    untied = requantize(built(name), tmp_path / "untied.gguf", QuantizeOptions("f32", untie=True)).path
    assert "output.weight" not in read_header(built(name)).tensors
    ids = list(range(5, 30))
    np.testing.assert_array_equal(llamacpp.logits(untied, ids), llamacpp.logits(built(name), ids))
    # llama.cpp takes the output where there is one: another one gives other logits
    tensor, data = read_header(untied).tensors["output.weight"], bytearray(untied.read_bytes())
    data[tensor.offset : tensor.offset + 4] = np.float32(5).tobytes()
    untied.write_bytes(data)
    assert not np.array_equal(llamacpp.logits(untied, ids), llamacpp.logits(built(name), ids))


def test_a_wrong_type_is_seen(made: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a choice that differs in one tensor makes another file."""
    real: Any = requantize_module.choose

    def choose(*arguments: Any) -> Any:
        choice = real(*arguments)
        return type(choice)(
            {**choice.types, "blk.0.attn_k.weight": TYPES["Q5_K"]}, choice.changed, choice.importance, choice.notices
        )

    monkeypatch.setattr(requantize_module, "choose", choose)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    requantize(made("llama"), ours, QuantizeOptions("q4_k_m"))
    llamacpp.quantize(made("llama"), theirs, RECIPES["q4_k_m"].file_type)
    assert ours.read_bytes() != theirs.read_bytes()
