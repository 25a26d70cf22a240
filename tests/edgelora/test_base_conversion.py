"""Conversions of bases that need llama.cpp to run: importance, perplexity, the temporary copy, and early refusals."""

from __future__ import annotations

import json
import random
import shutil
from collections import namedtuple
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.errors import DiskFullError, FormatError
from converters.imatrix import read_imatrix
from converters.quant_types import find_recipe
from converters.reader import read_header
from edgelora import base_conversion
from edgelora.base_conversion import (
    BaseProgress,
    check_perplexity,
    convert_base_source,
    in_own_precision,
    own_quant,
    read_inputs,
)
from edgelora.base_settings import BaseSettings
from edgelora.engine.calibration import compute_imatrix
from edgelora.engine.perplexity import perplexity
from edgelora.errors import DataFileError, ModelFileError, SettingsError
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.equivalence import llamacpp
from tests.equivalence.gguf_models import stored

WORDS = ["the", "miller", "of", "Fennick", "told", "a", "fisherman", "that", "bread", "and", "boats", "need", "Storm"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=2500)))
    return path


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("bf16") / "bf16.gguf", quant="bf16").path


def make(target: Path, *, source: Path = TINY_BASE, **settings: Any) -> Path:
    return convert_base_source(source, target, BaseSettings(**settings), Store(), threads=1).path


# Settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"imatrix": Path("a"), "calibrate": Path("b")}, "exclude one another"),
        ({"calibrate_adapter": Path("a")}, "--calibrate-adapter needs --calibrate"),
        ({"calibrate_chunks": 1}, "--calibrate-chunks needs --calibrate"),
        ({"save_imatrix": Path("a")}, "--save-imatrix needs --calibrate"),
        ({"check_chunks": 1}, "--check-chunks needs --check"),
        ({"output_type": "q9"}, "unknown tensor type 'q9'"),
        ({"embedding_type": "q9"}, "unknown tensor type 'q9'"),
        ({"tensor_types": ("a=b",)}, "unknown tensor type 'b'"),
        ({"split_max_size": "lots"}, "'lots' is no size"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        BaseSettings(**settings).verify()


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        BaseSettings(check_chunks=1, save_imatrix=Path("a"), output_type="q9", split_max_size="x").verify()
    for told in ("--check-chunks", "--save-imatrix", "'q9'", "'x'"):
        assert told in caught.value.message
    assert "q6_k" in caught.value.hint


def test_settings_that_can_be(text: Path) -> None:
    whole = BaseSettings(
        quant="Q4_K_M", tensor_types=("ffn_down=q6_k",), output_type="q8_0", embedding_type="F16", calibrate=text,
        calibrate_chunks=1, save_imatrix=Path("a"), check=text, check_chunks=1, split_max_size="2G", dry_run=True,
    )  # fmt: skip
    whole.verify()
    assert (whole.quant_name, whole.split_max_bytes()) == ("q4_k_m", 2 * 1000**3)
    assert (BaseSettings().overrides(), BaseSettings().split_max_bytes()) == (None, 0)


def test_inputs_are_read_before_anything_else(tmp_path: Path, text: Path) -> None:
    inputs = read_inputs(BaseSettings(calibrate=text, check=text))
    assert [item.name for item in inputs.texts] == [str(text)] * 2
    with pytest.raises(DataFileError):
        read_inputs(BaseSettings(check=tmp_path / "nowhere"))
    with pytest.raises(FormatError, match="not an importance matrix"):
        read_inputs(BaseSettings(imatrix=TINY_BASE / "config.json"))


# The copy in its own precision


def test_the_copy_holds_every_value_and_goes(tmp_path: Path, bf16: Path) -> None:
    told: list[tuple[int, int, str]] = []
    with in_own_precision(TINY_BASE, tmp_path / "x.gguf", 1, lambda *report: told.append(report)) as path:
        assert path.parent == tmp_path
        assert path.suffix != ".gguf"  # nobody who looks for bases beside an adapter may find it
        assert stored(path) == stored(bf16)
    assert not list(tmp_path.iterdir())
    assert told[-1][0] == told[-1][1] == bf16.stat().st_size
    with in_own_precision(bf16, tmp_path / "x.gguf", 1, None) as path:
        assert path == bf16
    assert bf16.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_copy_goes_whatever_ends_the_work(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted(_done: int, _total: int, _what: str) -> None:
        raise error

    for progress in (None, interrupted):
        with pytest.raises(error):
            _fail_inside(in_own_precision(TINY_BASE, tmp_path / "x.gguf", 1, progress), error)
        assert not list(tmp_path.iterdir())


def _fail_inside(copy: AbstractContextManager[Path], error: type[BaseException]) -> None:
    with copy as path:
        assert path.exists()
        raise error


def test_the_type_that_holds_all_values(tmp_path: Path) -> None:
    assert own_quant(TINY_BASE) == "bf16"
    mixed = Path(shutil.copytree(TINY_BASE, tmp_path / "mixed"))
    data = (mixed / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F16"
    again = json.dumps(header).encode()
    (mixed / "model.safetensors").write_bytes(len(again).to_bytes(8, "little") + again + data[8 + size :])
    assert own_quant(mixed) == "f32"


# Importance


def test_importance_is_that_of_the_unquantized_model(bf16: Path, text: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "imatrix.gguf"
    make(tmp_path / "a.gguf", quant="q3_k_m", calibrate=text, calibrate_chunks=2, save_imatrix=matrix)
    got, want = read_imatrix(matrix), compute_imatrix(bf16, text.read_text(), chunks=2, threads=1)
    assert got.entries.keys() == want.entries.keys()
    assert all(np.array_equal(got.entries[name].sums, want.entries[name].sums) for name in want.entries)
    other = compute_imatrix(bf16, text.read_text(), chunks=1, threads=1)
    assert not np.array_equal(got.entries["blk.0.ffn_down.weight"].sums, other.entries["blk.0.ffn_down.weight"].sums)


@pytest.mark.parametrize("quant", ["q3_k_m", "iq3_xs"])
def test_bytes_are_those_of_llama_quantize_with_the_same_importance(
    quant: str, bf16: Path, text: Path, tmp_path: Path
) -> None:
    measured = compute_imatrix(bf16, text.read_text(), chunks=2, threads=1)
    importance = {name: entry.means() for name, entry in measured.entries.items()}
    ours = make(tmp_path / "ours.gguf", quant=quant, calibrate=text, calibrate_chunks=2)
    file_type = find_recipe(quant).file_type
    llamacpp.quantize(bf16, tmp_path / "theirs.gguf", file_type, imatrix=importance)
    assert stored(ours) == stored(tmp_path / "theirs.gguf")
    backwards = {name: values[::-1].copy() for name, values in importance.items()}
    llamacpp.quantize(bf16, tmp_path / "twin.gguf", file_type, imatrix=backwards)
    assert stored(ours) != stored(tmp_path / "twin.gguf")


def test_a_plan_stands_in_for_what_is_measured(text: Path, tmp_path: Path) -> None:
    """The plan before measuring is the plan after it: same types, and the same size to the byte."""
    settings = {"quant": "iq2_xs", "calibrate": text, "calibrate_chunks": 1, "tensor_types": ("attn_k=q5_0",)}
    planned = convert_base_source(TINY_BASE, tmp_path / "x.gguf", BaseSettings(**settings, dry_run=True), Store())
    assert not list(tmp_path.iterdir())
    made = make(tmp_path / "x.gguf", **settings)
    assert planned.plan
    assert planned.size_bytes == planned.plan.size_bytes == made.stat().st_size
    found = {name: tensor.type_name for name, tensor in read_header(made).tensors.items()}
    assert {tensor.name: tensor.type for tensor in planned.plan.tensors} == found
    assert found["blk.0.attn_k.weight"] == "Q5_0"


def test_what_importance_never_covers_is_refused_before_it_is_measured(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_conversion, "in_own_precision", None)  # fails where anything is written
    with pytest.raises(Exception, match=r"token_embd\.weight"):
        make(tmp_path / "x.gguf", quant="iq2_xs", embedding_type="iq2_xs", calibrate=text)
    with pytest.raises(TypeError):
        make(tmp_path / "x.gguf", quant="iq2_xs", calibrate=text)


def test_a_chosen_template_counts_for_rows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "the miller of Fennick"}, {"role": "assistant", "content": "bread"}] * 20
    rows.write_text((json.dumps({"messages": messages}) + "\n") * 8)
    template = tmp_path / "long.jinja"
    template.write_text("{% for m in messages %}{{ 'Storm ' * 9 }}{{ m.content }}{% endfor %}")
    matrices = []
    for name in (None, str(template)):
        saved = tmp_path / f"{len(matrices)}.imatrix"
        settings = BaseSettings(quant="q8_0", calibrate=rows, calibrate_chunks=1, save_imatrix=saved)
        out = tmp_path / f"{len(matrices)}.gguf"
        made = convert_base_source(TINY_BASE, out, settings, Store(), chat_template=name).path
        matrices.append(read_imatrix(saved))
        change = check_perplexity(TINY_BASE, made, rows, chunks=1, chat_template=name)
        assert change.before.n_tokens == change.after.n_tokens
    sums = [matrix.entries["blk.0.attn_q.weight"].sums for matrix in matrices]
    assert not np.array_equal(*sums)


# Perplexity


def test_perplexity_before_is_that_of_the_copy_and_after_grows(bf16: Path, text: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    fine, coarse = (make(tmp_path / f"{quant}.gguf", quant=quant) for quant in ("q8_0", "q2_k"))
    progress = BaseProgress(measured=lambda *windows: told.append(windows))
    small = check_perplexity(TINY_BASE, fine, text, chunks=2, threads=1, progress=progress)
    assert told == [(2, 2), (2, 2)]
    assert small.before.value == perplexity(bf16, text.read_text(), chunks=2, threads=1).value
    of_gguf = check_perplexity(bf16, fine, text, chunks=2, threads=1)
    assert of_gguf == small
    # Words in no order are far out in the tail of the model, where any rounding weighs: 2.1 % seen with 8 bits.
    assert abs(small.ratio - 1) < 0.05
    assert abs(check_perplexity(bf16, coarse, text, chunks=2, threads=1).ratio - 1) > abs(small.ratio - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q2_k.gguf", "q8_0.gguf"]


# Room


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("option", "needed"), [("calibrate", 5_400_000), ("check", 7_400_000)])
def test_too_little_room_is_said_before_work(
    option: str, needed: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unquantized copy takes 5.38 MB and the file 1.93 MB; with a check, both at once."""
    room: list[int] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**12, 0, room[-1]))
    settings = {option: text, f"{option}_chunks": 1}
    room.append(needed - 100_000)
    with pytest.raises(DiskFullError, match=f"its own precision, which --{option} runs"):
        make(tmp_path / "x.gguf", **settings)
    assert not list(tmp_path.iterdir())
    room.append(needed)
    assert make(tmp_path / "x.gguf", **settings).exists()


def test_a_store_that_cannot_be_written_costs_only_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").write_text("no folder")
    monkeypatch.setenv("EDGELORA_HOME", str(tmp_path / "store"))
    report = convert_base_source(TINY_BASE, tmp_path / "x.gguf", BaseSettings(quant="q8_0"), Store())
    assert any("not remembered for later" in notice for notice in report.notices)
    assert report.path.exists()


def test_an_adapter_is_nothing_to_convert_as_a_base(text: Path, tmp_path: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(ModelFileError, match="--calibrate-adapter takes an adapter"):
        make(tmp_path / "x.gguf", calibrate=text, calibrate_adapter=TINY_BASE)
    assert make(tmp_path / "x.gguf", calibrate=text, calibrate_chunks=1, calibrate_adapter=adapters["red"]).exists()
