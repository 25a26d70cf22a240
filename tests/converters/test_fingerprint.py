"""One base, one fingerprint; another base, another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.adapter import convert_adapter
from converters.base import convert_base
from converters.errors import FormatError
from converters.fingerprint import fingerprint
from converters.quant_types import RECIPES
from tests.converters.folders import byte_level_tokenizer, make_adapter, make_model


def test_equal_for_every_quantization_and_the_folder(tmp_path: Path) -> None:
    # Rows of 128 fill Q1_0's blocks, and not those that need an importance matrix.
    folder = make_model(tmp_path / "model", hidden_size=128, intermediate_size=128, head_dim=32)
    files = [convert_base(folder, tmp_path / f"{quant}.gguf", quant=quant).path for quant in RECIPES]
    assert {fingerprint(path) for path in files} == {fingerprint(folder)}


OTHERS: dict[str, dict[str, Any]] = {
    "another seed": {"seed": 1},
    "another tokenizer": {"tokenizer": byte_level_tokenizer(texts=["completely other words here"] * 9)},
    "another number of heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "more layers": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("what", OTHERS)
def test_different_for_another_base(what: str, tmp_path: Path) -> None:
    one, other = make_model(tmp_path / "one"), make_model(tmp_path / "other", **OTHERS[what])
    assert fingerprint(one) != fingerprint(other)
    out = convert_base(other, tmp_path / "other.gguf").path
    assert fingerprint(other) == fingerprint(out)


def test_only_what_tells_bases_apart_counts(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one")
    renamed = make_model(tmp_path / "renamed", max_position_embeddings=64, rope_theta=5e5)
    assert fingerprint(one) == fingerprint(renamed)


def test_llama_cpps_key_for_the_head_size_may_be_absent(tmp_path: Path) -> None:
    """Older converters left attention.key_length out where it follows from the other sizes."""
    out, copy = (
        convert_base(make_model(tmp_path / "model"), tmp_path / "base.gguf", quant="f32").path,
        tmp_path / "copy",
    )
    reader, writer = gguf.GGUFReader(out), gguf.GGUFWriter(copy, "llama")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and "_length" not in key.replace("embedding_length", "").replace("feed_f", ""):
            kind = entry.types[0]
            writer.add_key_value(key, entry.contents(), kind, entry.types[1] if len(entry.types) > 1 else None)
    writer.add_feed_forward_length(48)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert fingerprint(copy) == fingerprint(out)


def test_an_adapter_has_none(tmp_path: Path) -> None:
    base = make_model(tmp_path / "model")
    adapter = convert_adapter(make_adapter(tmp_path / "a"), base, tmp_path / "a.gguf").path
    with pytest.raises(FormatError, match="not a base"):
        fingerprint(adapter)
