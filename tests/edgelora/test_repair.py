"""Repair ranks beside an adapter's own: kept where they help, told either way, at home on one quantization alone."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import converters.repair
from converters.base import convert_base
from converters.errors import UnsupportedError
from converters.reader import read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.base_settings import BaseSettings
from edgelora.calibration_text import read_calibration
from edgelora.contract import Contract
from edgelora.conversion import ConvertOptions, blend_adapters, convert
from edgelora.engine.engine import Engine
from edgelora.engine.perplexity import perplexity
from edgelora.errors import BaseMismatchError, BaseNotFoundError, SettingsError
from edgelora.verify import verify
from tests.conftest import ROOT, TINY_BASE
from tests.peft_folders import write_lora

FULL = 256  # all ranks: the base as it was before it was quantized
NUMBERS = re.compile(r"perplexity ([\d.]+) -> ([\d.]+)")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q2_k.gguf", quant="q2_k").path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of the kind that the base was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "tiny-base")
        conversations = importlib.import_module("world").conversations(12345)
    lines = [json.dumps({"messages": messages}) for messages in itertools.islice(conversations, 40)]
    path = tmp_path_factory.mktemp("text") / "talk.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of weak effect: the base beneath it still talks."""
    return write_lora(tmp_path_factory.mktemp("adapter") / "support", TINY_BASE, seed=1, strength=0.01)


def made(folder: Path, base: Path, out: Path, **settings: Any) -> tuple[Path, str]:
    report = convert(folder, out, ConvertOptions(base=base, adapter=AdapterSettings(**settings)))
    return report.path, "\n".join(report.notices)


@pytest.fixture(scope="module")
def repaired(folder: Path, quantized: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("repaired") / "support.gguf"
    return made(folder, quantized, out, repair_rank=FULL, repair_text=text)


def test_it_is_kept_where_it_helps_and_the_numbers_are_true(
    repaired: tuple[Path, str], folder: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    path, told = repaired
    assert "repair kept, for these q2_k weights alone; its ranks hold 100.0%" in told
    plain, _ = made(folder, quantized, tmp_path / "plain.gguf")
    values = [perplexity(quantized, read_calibration(text), adapter=each).value for each in (plain, path)]
    assert [float(number) for number in NUMBERS.findall(told)[0]] == pytest.approx(values, abs=1e-4)
    assert values[1] < 0.98 * values[0]
    contract = Contract.from_metadata(read_header(path).metadata)
    assert contract is not None
    assert (contract.repair["quant"], contract.repair["rank"]) == ("q2_k", FULL)


def test_it_is_not_kept_where_it_does_not_help(
    folder: Path, quantized: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: ranks that add the error once more."""
    find = converters.repair.find_repair

    def worse(*arguments: Any) -> converters.repair.Repair:
        found = find(*arguments)
        pairs = [replace(p, load=lambda p=p: (-p.load()[0], p.load()[1])) for p in found.pairs]
        return replace(found, pairs=tuple(pairs))

    monkeypatch.setattr(converters.repair, "find_repair", worse)
    path, told = made(folder, quantized, tmp_path / "support.gguf", repair_rank=FULL, repair_text=text)
    assert "repair not kept: it does not help" in told
    assert NUMBERS.search(told)
    monkeypatch.undo()
    plain, _ = made(folder, quantized, tmp_path / "plain.gguf")
    assert path.read_bytes() == plain.read_bytes()
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_it_is_at_home_on_these_weights_alone(
    repaired: tuple[Path, str], folder: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    path, _ = repaired
    other = convert_base(TINY_BASE, tmp_path / "q3.gguf", quant="q3_k_m").path
    with Engine(quantized, adapters={"it": path}) as engine:
        assert engine.adapters == ["it"]
    with pytest.raises(BaseMismatchError, match=r"repairs what q2_k took from .*, and .* has other weights"):
        Engine(other, adapters={"it": path})
    with pytest.raises(BaseMismatchError, match="repairs what q2_k took"):
        convert(path, tmp_path / "copy.gguf", ConvertOptions(base=other))
    report = verify(AdapterRef("it", path), other)
    assert "repair" in report.failed
    assert "repair" not in verify(AdapterRef("it", path), quantized).failed
    # without a repair, an adapter serves on all of them
    with Engine(other, adapters={"it": made(folder, quantized, tmp_path / "plain.gguf")[0]}) as engine:
        assert engine.adapters == ["it"]


def test_what_says_nothing_is_refused(
    repaired: tuple[Path, str], folder: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    for settings, base, message in (
        ({"repair_rank": 8}, quantized, "no certificate, so give a text"),
        ({"repair_rank": 8, "repair_text": text}, TINY_BASE, "is a folder, whose weights nobody quantized"),
        ({"repair_rank": 8, "repair_text": text, "rank": 4}, quantized, "--rank cuts ranks, and --repair-rank adds"),
        ({"repair_text": text}, quantized, "--repair-text: needs --repair-rank"),
    ):
        with pytest.raises(SettingsError, match=message):
            made(folder, base, out, **settings)
    with pytest.raises(SettingsError, match="repairs a base already"):
        made(repaired[0], quantized, out, repair_rank=8, repair_text=text)
    with pytest.raises(SettingsError, match="which a blend would do more or less of"):
        blend_adapters(
            [AdapterRef("a", repaired[0], 0.5), AdapterRef("b", folder)], out, ConvertOptions(base=quantized)
        )
    options = ConvertOptions(settings=BaseSettings(imatrix=text), base=quantized)
    with pytest.raises(SettingsError, match="--imatrix goes with a base"):
        convert(folder, out, options)
    assert not out.exists()


def test_the_unquantized_base_is_found_or_asked_for(folder: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    plain, _ = made(folder, quantized, tmp_path / "plain.gguf")  # a GGUF adapter names no folder
    with pytest.raises(BaseNotFoundError) as caught:
        made(plain, quantized, tmp_path / "out.gguf", repair_rank=8, repair_text=text)
    assert "--repair-reference" in caught.value.hint
    settings = {"repair_rank": FULL, "repair_text": text, "repair_reference": TINY_BASE}
    assert "repair kept" in made(plain, quantized, tmp_path / "out.gguf", **settings)[1]
    with pytest.raises(UnsupportedError, match="was quantized itself"):
        made(plain, quantized, tmp_path / "two.gguf", **{**settings, "repair_reference": quantized})
