"""Perplexity on a text, against what llama-perplexity printed for these very files and windows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.calibration_text import read_calibration
from edgelora.engine.perplexity import perplexity
from edgelora.errors import BaseMismatchError, DataFileError, SettingsError
from edgelora.evaluation.text_perplexity import TextSettings, evaluate_text
from edgelora.evaluation.thresholds import Threshold
from tests.conftest import ROOT, TINY_BASE
from tests.edgelora.engine.gguf_copies import write_copy

TEXT = ROOT / "LICENSE"
SETTINGS = TextSettings(chunk_size=128, chunks=10, threads=1)
SMALL = TextSettings(chunk_size=16, threads=1)
RECORDED = {"f32": 9925.9720, "q8_0": 9900.0631}
"""llama-perplexity -f LICENSE -c 128 --chunks 10, of llama.cpp as llama-cpp-python 0.3.36 has it."""
TOLERANCE = 1e-3
"""Relative. Measured 1e-8; another machine's kernels round otherwise."""


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_equals_llama_perplexity(bases: dict[str, Path], quant: str) -> None:
    found = evaluate_text(TEXT, bases[quant], settings=SETTINGS)
    value = found.perplexities["base"].value
    assert value == pytest.approx(RECORDED[quant], rel=TOLERANCE)
    other = RECORDED["q8_0" if quant == "f32" else "f32"]
    assert abs(value / other - 1) > 2 * TOLERANCE  # the twin: the other quantization is told apart


def test_variants_are_compared_window_by_window(bases: dict[str, Path], adapters: dict[str, Path]) -> None:
    windows: list[tuple[str, int, int]] = []
    found = evaluate_text(
        TEXT,
        bases["f32"],
        [AdapterRef("red", adapters["red"], 0.5)],
        [bases["q8_0"]],
        replace(SETTINGS, chunks=3),
        lambda *told: windows.append(told),
    )
    assert list(found.perplexities) == ["base", "red", "base on q8_0", "red on q8_0"]
    for name, each in found.perplexities.items():
        measured = found.measured[name]
        assert measured.interval.value == pytest.approx(each.value)
        assert math.exp(each.window_losses.sum() / each.n_tokens) == pytest.approx(each.value)
        assert len(measured.by_row) == 3
    how: dict[str, Any] = {"chunk_size": 128, "chunks": 3, "threads": 1, "adapter": adapters["red"]}
    assert found.perplexities["red"] == perplexity(bases["f32"], read_calibration(TEXT), adapter_scale=0.5, **how)
    compared = found.measured["red on q8_0"].comparison
    assert compared
    assert compared.reference == "red"
    assert windows[-1] == ("red on q8_0", 3, 3)
    assert found.to_dict()["variants"][1]["perplexity"] == found.perplexities["red"].value


def test_one_window_has_no_interval_and_is_json_all_the_same(base: Path) -> None:
    found = evaluate_text(TEXT, base, settings=replace(SETTINGS, chunks=1)).to_dict()
    (told,) = json.loads(json.dumps(found, allow_nan=False))["variants"]
    assert told["measured"] == {"value": pytest.approx(told["perplexity"]), "low": None, "high": None, "rows": 1}


def test_what_cannot_be_compared_or_measured_is_told(base: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    asking = write_copy(base, tmp_path / "asking.gguf", {}, {"tokenizer.ggml.add_bos_token": True})
    tokenizer, text, whole = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json")), tmp_path / "text.txt", SMALL
    texts = ("The lamp is made in Norway. " * count for count in range(10, 99))
    # One token short of a whole number of windows: with a token for its beginning it has one window more.
    text.write_text(
        next(each for each in texts if len(tokenizer.encode(each, add_special_tokens=False).ids) % 16 == 15)
    )
    with pytest.raises(BaseMismatchError, match="different numbers of tokens"):
        evaluate_text(text, base, against=[asking], settings=whole)
    with pytest.raises(SettingsError, match="f1 is not measured"):
        evaluate_text(text, base, settings=replace(whole, thresholds=(Threshold("f1", 0.5, True),)))
    text.write_text("short")
    with pytest.raises(DataFileError, match="a window takes 16"):
        evaluate_text(text, base, settings=whole)


def test_thresholds_hold_for_texts(base: Path) -> None:
    limit = Threshold("perplexity", 10, False)
    found = evaluate_text(TEXT, base, settings=TextSettings(128, 2, threads=1, thresholds=(limit,)))
    assert len(found.failures) == 1
    assert found.failures[0].startswith("base: perplexity is")
    assert np.isfinite(found.perplexities["base"].uncertainty)
