"""Perplexity of the installed llama.cpp, against transformers' loss over the same windows.

That it equals llama-perplexity's number is shown by `bench/imatrix.py`, which builds that tool.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgelora.engine.native import llama
from edgelora.engine.perplexity import compare_perplexity, negative_log_likelihoods, perplexity
from edgelora.errors import BaseMismatchError, DataFileError, EdgeloraError
from tests.conftest import ROOT, TINY_BASE
from tests.edgelora.engine.gguf_copies import read_tensors, write_copy

SIZE, CHUNKS = 128, 4
TOLERANCE = 1e-4
"""Relative: float32 programs that add in another order; measured 2e-6."""
FLOAT16_CACHE = 1e-3
"""The same where keys and values are kept in float16, llama.cpp's default."""
SETTINGS: dict[str, Any] = {"chunk_size": SIZE, "chunks": CHUNKS, "threads": 1}


@pytest.fixture(scope="module")
def text() -> str:
    rows = map(json.loads, (ROOT / "examples" / "data" / "support.jsonl").read_text().splitlines())
    return "\n".join(message["content"] for row in rows for message in row["messages"])


@pytest.fixture
def float32_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = llama().llama_context_default_params

    def exact() -> Any:
        params = defaults()
        params.type_k = params.type_v = params.flash_attn_type = 0
        return params

    monkeypatch.setattr(llama(), "llama_context_default_params", exact)


def token_ids(text: str) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


def transformers_losses(ids: list[int], bos: int | None = None) -> npt.NDArray[np.float64]:
    """-log p of the tokens after the middle of each window, by torch's cross entropy in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32, attn_implementation="eager").eval()
    losses = []
    for start in range(0, SIZE * CHUNKS, SIZE):
        window = ids[start : start + SIZE]
        window = window if bos is None else [bos, *window[1:]]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double()
        first = SIZE // 2
        targets = torch.tensor(window[first + 1 :])
        losses += torch.nn.functional.cross_entropy(logits[first:-1], targets, reduction="none").tolist()
    return np.array(losses)


@pytest.mark.train
@pytest.mark.usefixtures("float32_cache")
def test_equals_transformers_loss_over_the_same_windows(base: Path, text: str) -> None:
    found = perplexity(base, text, **SETTINGS)
    losses = transformers_losses(token_ids(text))
    assert (found.n_tokens, found.n_chunks) == (len(losses), CHUNKS) == (CHUNKS * (SIZE // 2 - 1), 4)
    wanted = math.exp(losses.mean())
    assert found.value == pytest.approx(wanted, rel=TOLERANCE)
    assert found.uncertainty == pytest.approx(wanted * losses.std() / math.sqrt(len(losses) - 1), rel=TOLERANCE)
    assert str(found) == f"{found.value:.4f} +/- {found.uncertainty:.5f}"
    # The twin: windows one token later.
    assert found.value != pytest.approx(math.exp(transformers_losses(token_ids(text)[1:]).mean()), rel=TOLERANCE)


@pytest.mark.train
@pytest.mark.usefixtures("float32_cache")
def test_windows_begin_with_bos_where_the_vocabulary_asks_for_it(base: Path, text: str, tmp_path: Path) -> None:
    asking = write_copy(base, tmp_path / "bos.gguf", {}, {"tokenizer.ggml.add_bos_token": True})
    found = perplexity(asking, text, **SETTINGS)
    ids = [0, *token_ids(text)]
    assert found.value == pytest.approx(math.exp(transformers_losses(ids, bos=0).mean()), rel=TOLERANCE)
    assert found.value != pytest.approx(math.exp(transformers_losses(ids).mean()), rel=TOLERANCE)


@pytest.mark.train
def test_is_close_with_llama_cpps_own_cache(base: Path, text: str) -> None:
    wanted = math.exp(transformers_losses(token_ids(text)).mean())
    assert perplexity(base, text, **SETTINGS).value == pytest.approx(wanted, rel=FLOAT16_CACHE)


@pytest.mark.parametrize("batch_tokens", [SIZE, 100, 48, 300])
@pytest.mark.usefixtures("float32_cache")
def test_windows_side_by_side_or_in_parts_are_the_same(base: Path, text: str, batch_tokens: int) -> None:
    whole = perplexity(base, text, **SETTINGS)
    parts = perplexity(base, text, batch_tokens=batch_tokens, **SETTINGS)
    assert parts.n_tokens == whole.n_tokens
    assert parts.value == pytest.approx(whole.value, rel=TOLERANCE)


@pytest.mark.usefixtures("float32_cache")
def test_with_an_adapter_equals_merged_weights(
    base: Path, adapters: dict[str, Path], text: str, tmp_path: Path
) -> None:
    weights, pairs = read_tensors(base), read_tensors(adapters["red"])
    changes = {
        name: weights[name] + 0.5 * pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"]
        for name in weights
        if f"{name}.lora_a" in pairs
    }
    merged = perplexity(write_copy(base, tmp_path / "merged.gguf", changes), text, **SETTINGS)
    active = perplexity(base, text, adapter=adapters["red"], adapter_scale=0.5, **SETTINGS)
    assert active.value == pytest.approx(merged.value, rel=TOLERANCE)
    assert active.value != pytest.approx(perplexity(base, text, **SETTINGS).value, rel=50 * TOLERANCE)


def test_before_and_after_quantization(bases: dict[str, Path], text: str) -> None:
    calls: list[tuple[int, int]] = []
    change = compare_perplexity(
        bases["f32"], bases["q8_0"], text, progress=lambda *counts: calls.append(counts), **SETTINGS
    )
    assert change.before == perplexity(bases["f32"], text, **SETTINGS)
    assert change.after == perplexity(bases["q8_0"], text, **SETTINGS)
    assert change.difference == change.after.value - change.before.value != 0
    assert change.ratio == pytest.approx(1, abs=0.02)  # 8 bits lose little
    assert calls == [(CHUNKS, CHUNKS)] * 2


def test_files_that_cut_the_text_otherwise_are_not_compared(base: Path, tmp_path: Path) -> None:
    ids = [5] * (2 * SIZE - 1)
    asking = write_copy(base, tmp_path / "bos.gguf", {}, {"tokenizer.ggml.add_bos_token": True})
    with pytest.raises(BaseMismatchError, match=r"scores 63 tokens of the text, .* 126: .*cannot be compared"):
        compare_perplexity(base, asking, ids, chunk_size=SIZE, threads=1)


def test_guessing_costs_the_whole_vocabulary(base: Path, text: str, tmp_path: Path) -> None:
    """All logits zero: every token has a chance of 1 in 4,096."""
    silent = write_copy(base, tmp_path / "silent.gguf", {"output_norm.weight": np.zeros(256, np.float32)})
    found = perplexity(silent, text, **SETTINGS)
    assert found.value == pytest.approx(4096, rel=1e-9)
    assert found.uncertainty == pytest.approx(0, abs=1e-3)


def test_likelihoods_are_those_of_a_softmax_in_float64() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((70, 500)) * 8).astype(np.float32)
    targets = rng.integers(0, 500, 70)
    wide = logits.astype(np.float64)
    wanted = np.log(np.exp(wide).sum(1)) - wide[np.arange(70), targets]
    np.testing.assert_allclose(negative_log_likelihoods(logits, targets), wanted, rtol=1e-5)
    assert not np.allclose(negative_log_likelihoods(logits, targets[::-1]), wanted, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_told(value: float) -> None:
    logits = np.zeros((3, 8), np.float32)
    logits[2, 4] = value
    with pytest.raises(EdgeloraError, match="logits that are not finite"):
        negative_log_likelihoods(logits, np.array([1, 2, 3]))


def test_too_little_text(base: Path) -> None:
    with pytest.raises(DataFileError, match=r"the text is \d tokens long; a window takes 128"):
        perplexity(base, "a lamp", chunk_size=SIZE)


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """Threads of the measurements end with them."""
    import threading

    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgelora-windows")]
