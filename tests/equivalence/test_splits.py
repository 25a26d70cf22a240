"""llama.cpp reads the parts that we write, and gives the same logits as with one file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from converters.base import convert_base
from converters.options import QuantizeOptions
from converters.quant_types import RECIPES
from converters.reader import read_header
from converters.requantize import requantize
from converters.split import parse_size
from tests.converters.folders import make_model
from tests.equivalence import llamacpp
from tests.equivalence.gguf_models import stored

IDS = list(range(5, 45))
CONFIG = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 3}
Split = Callable[[str, str], tuple[Path, tuple[Path, ...]]]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """(the unsplit file, the files of a split) of one model."""
    folder = tmp_path_factory.mktemp("splits")
    model = make_model(folder / "model", **CONFIG)

    def make(quant: str, size: str) -> tuple[Path, tuple[Path, ...]]:
        whole = convert_base(model, folder / f"{quant}.gguf", quant=quant, force=True).path
        options = QuantizeOptions(quant, split_max_bytes=parse_size(size))
        return whole, convert_base(model, folder / f"{quant}-{size}.gguf", options=options, force=True).files

    return make


@pytest.mark.parametrize(("quant", "size"), [("f32", "50K"), ("f16", "20K"), ("q8_0", "10K"), ("q8_0", "1")])
def test_logits_are_those_of_the_unsplit_file(quant: str, size: str, split: Split) -> None:
    whole, files = split(quant, size)
    assert len(files) > 4
    np.testing.assert_array_equal(llamacpp.logits(files[0], IDS), llamacpp.logits(whole, IDS))


def test_other_weights_give_other_logits(split: Split, tmp_path: Path) -> None:
    """The twin: one tensor of one part is another."""
    whole, files = split("f32", "50K")
    tensor = next(it for path in files[1:] for name, it in read_header(path).tensors.items() if "ffn_down" in name)
    data = bytearray(tensor.path.read_bytes())
    first = data[tensor.offset : tensor.offset + 256]
    data[tensor.offset : tensor.offset + 256] = data[tensor.offset + 256 : tensor.offset + 512]
    data[tensor.offset + 256 : tensor.offset + 512] = first
    for path in files:
        (tmp_path / path.name).write_bytes(bytes(data) if path == tensor.path else path.read_bytes())
    assert not np.array_equal(llamacpp.logits(tmp_path / files[0].name, IDS), llamacpp.logits(whole, IDS))


def test_llama_cpp_misses_a_missing_part(split: Split, tmp_path: Path) -> None:
    _, files = split("f16", "20K")
    for path in files[:-1]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RuntimeError, match="cannot load"), llamacpp.loaded(tmp_path / files[0].name):
        pass


def test_llama_quantize_takes_our_parts_and_we_take_them_alike(split: Split, tmp_path: Path) -> None:
    whole, files = split("f32", "50K")
    ours, theirs, unsplit = tmp_path / "ours.gguf", tmp_path / "theirs.gguf", tmp_path / "unsplit.gguf"
    llamacpp.quantize(files[0], theirs, RECIPES["q4_0"].file_type)
    llamacpp.quantize(whole, unsplit, RECIPES["q4_0"].file_type)
    requantize(files[1], ours, QuantizeOptions("q4_0"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert stored(ours) == stored(unsplit)


SPLIT_BY_GGUF = """
import sys
import gguf
reader = gguf.GGUFReader(sys.argv[1])
writer = gguf.GGUFWriter(sys.argv[2], "llama", split_max_size=int(sys.argv[3]))
for key, entry in reader.fields.items():
    if not key.startswith("GGUF.") and key != "general.architecture":
        inner = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(key, entry.contents(), entry.types[0], inner)
for tensor in reader.tensors:
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.mark.parametrize(("quant", "size"), [("f32", 50_000), ("q8_0", 9_000)])
def test_a_model_is_split_as_the_converter_of_llama_cpp_splits_it(
    quant: str, size: int, split: Split, tmp_path: Path
) -> None:
    """gguf's writer is given our unsplit file's tensors: what convert_hf_to_gguf.py --split-max-size writes of them."""
    whole, files = split(quant, str(size))
    command = [sys.executable, "-c", SPLIT_BY_GGUF, str(whole), str(tmp_path / "theirs.gguf"), str(size)]
    subprocess.run(command, check=True, capture_output=True)
    theirs = sorted(tmp_path.glob("*.gguf"))
    assert [path.name.replace("theirs", "") for path in theirs] == [
        path.name.replace(f"{quant}-{size}", "") for path in files
    ]
    for path, other in zip(files, theirs, strict=True):
        one, two = read_header(path), read_header(other)
        assert stored(path) == stored(other)
        # gguf's writer puts an empty string's or list's key nowhere; there is none in this model
        assert {key: one.metadata.raw(key) for key in one.metadata} == {
            key: two.metadata.raw(key) for key in two.metadata
        }
