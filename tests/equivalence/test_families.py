"""Every family: the file that llama.cpp's own converter makes, and the logits that transformers computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.architectures import FAMILIES
from converters.base import convert_base
from converters.reader import GGUFHeader, read_header
from tests.equivalence import llamacpp, reference, tiny_models
from tests.equivalence.tiny_models import TINY, some_ids

pytestmark = pytest.mark.train

# The reference cannot convert these: it never writes the norms of the heads that it has collected.
BEYOND_THE_REFERENCE = ("stablelm-12b",)
# What only one of the two writes, or each in its own words. `general.file_type`: the reference forgets it for GPT-NeoX.
OWN_KEYS = ("edgelora.", "tokenizer.huggingface.json", "general.file_type")
# Kept in F32 by llama-quantize, whose choice ours is, and not by convert_hf_to_gguf.py.
F32_IN_QUANTIZE = ("per_layer_model_proj.weight",)

Folders = Mapping[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_models.build(name, root / name) for name in TINY}


@pytest.fixture(scope="module")
def references(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The reference's files, made by one process."""
    wanted = {name: folder for name, folder in folders.items() if name not in BEYOND_THE_REFERENCE}
    return reference.convert(wanted, tmp_path_factory.mktemp("reference"))


def tensor_bytes(header: GGUFHeader) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = header.path.read_bytes()
    return {
        name: (tensor.type_name, tensor.shape, data[tensor.offset : tensor.offset + tensor.size_bytes])
        for name, tensor in header.tensors.items()
    }


def metadata_of(header: GGUFHeader) -> dict[str, tuple[int, int, Any]]:
    """Key to (type, type of items, value)."""
    raw = {key: header.metadata.raw(key) for key in header.metadata if not key.startswith(OWN_KEYS)}
    return {key: (value.kind, value.item_kind, header.metadata[key]) for key, value in raw.items()}


def assert_equal(ours: Path, theirs: Path) -> int:
    """All tensors and all metadata; returns how many tensors there are."""
    one, two = read_header(ours), read_header(theirs)
    assert tensor_bytes(one) == tensor_bytes(two)
    assert metadata_of(one) == metadata_of(two)
    return len(one.tensors)


@pytest.mark.parametrize("name", [name for name in TINY if name not in BEYOND_THE_REFERENCE])
def test_the_file_of_llama_cpps_converter(name: str, folders: Folders, references: Folders, tmp_path: Path) -> None:
    convert_base(folders[name], tmp_path / "ours.gguf", quant="f32")
    assert assert_equal(tmp_path / "ours.gguf", references[name]) > 20


def difference(name: str, folder: Path, out: Path, *, table_gelu: bool = True) -> float:
    """The largest difference of a logit between transformers and llama.cpp on our F32 file."""
    from tests.equivalence.hf_logits import hf_logits

    tiny = TINY[name]
    ids = some_ids(folder, tiny.tokens)
    convert_base(folder, out, quant="f32", force=True)
    expected = hf_logits(folder, ids, table_gelu=table_gelu)
    assert expected.std() > 0.05, "logits that are all alike would prove nothing"
    return float(np.abs(llamacpp.logits(out, ids, context=tiny.context) - expected).max())


@pytest.mark.parametrize("name", TINY)
def test_the_logits_of_transformers(name: str, folders: Folders, tmp_path: Path) -> None:
    assert difference(name, folders[name], tmp_path / "base.gguf") < TINY[name].tolerance


@pytest.mark.parametrize(
    ("name", "gguf"),
    [
        ("llama", "blk.{layer}.attn_q"),
        ("falcon-40b", "blk.{layer}.attn_qkv"),
        ("gpt-neox", "blk.{layer}.attn_qkv"),
        ("qwen3-next", "blk.{layer}.attn_gate"),
        ("qwen3.5", "blk.{layer}.attn_qkv"),
        ("gpt-oss", "blk.{layer}.ffn_gate_exps"),
    ],
)
def test_rows_in_the_wrong_order_are_seen(
    name: str, gguf: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = lambda order: lambda sizes: np.roll(order(sizes), 8)  # noqa: E731
    _change_rows(monkeypatch, name, gguf, lambda row: replace(row, rows=swapped(row.rows)) if row.rows else row)
    assert difference(name, folders[name], tmp_path / "base.gguf") > 10 * TINY[name].tolerance


@pytest.mark.parametrize(
    ("name", "gguf"),
    [("gemma", "blk.{layer}.ffn_norm"), ("qwen3.5", "blk.{layer}.ssm_a"), ("qwen3-next", "output_norm")],
)
def test_a_value_left_as_it_was_is_seen(
    name: str, gguf: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change_rows(monkeypatch, name, gguf, lambda row: replace(row, value=None))
    assert difference(name, folders[name], tmp_path / "base.gguf") > 10 * TINY[name].tolerance


def test_two_experts_in_the_wrong_place_are_seen(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = lambda sizes: np.roll(np.arange(sizes["experts"] * 32), 32)  # noqa: E731
    _change_rows(monkeypatch, "qwen3-moe", "blk.{layer}.ffn_up_exps", lambda row: replace(row, rows=swapped))
    assert difference("qwen3-moe", folders["qwen3-moe"], tmp_path / "base.gguf") > 10 * TINY["qwen3-moe"].tolerance


def _change_rows(monkeypatch: pytest.MonkeyPatch, name: str, gguf: str, change: Callable[[Any], Any]) -> None:
    family = FAMILIES[TINY[name].model]
    rows = tuple(change(row) if row.gguf == gguf else row for row in family.rows)
    assert rows != family.rows
    monkeypatch.setitem(family.__dict__, "rows", rows)


@pytest.mark.parametrize("name", ["gemma", "phi-2", "gpt-neox", "starcoder2"])
def test_what_differs_is_the_table_of_the_gelu(name: str, folders: Folders, tmp_path: Path) -> None:
    """transformers computes a GELU in float32, llama.cpp reads it from a table: no converter can make these equal."""
    with_table = difference(name, folders[name], tmp_path / "base.gguf")
    assert difference(name, folders[name], tmp_path / "base.gguf", table_gelu=False) > 2 * with_table


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_checkpoints(dtype: str, tmp_path: Path) -> None:
    """The reference computes with a checkpoint's own float16, and with float32 for bfloat16."""
    names = ("llama-3", "gemma-3", "qwen3.5", "gpt-oss")
    folders = {name: tiny_models.build(name, tmp_path / name, dtype=dtype) for name in names}
    for outtype in ("f16", "bf16", "q8_0"):
        (tmp_path / outtype).mkdir()
        theirs = reference.convert(folders, tmp_path / outtype, outtype=outtype)
        for name in names:
            convert_base(folders[name], tmp_path / "ours.gguf", quant=outtype, force=True)
            assert_equal(tmp_path / "ours.gguf", theirs[name])
