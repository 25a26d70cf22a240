"""Vectors of texts, from bases whose file says how tokens become one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelora.engine.engine import Engine
from edgelora.errors import ContextOverflowError, SettingsError
from tests.edgelora.engine.gguf_copies import write_copy

MEAN, LAST = 1, 3
TEXTS = ["The miller lives at the river.", "Boats bring bread to Fennick."]


@pytest.fixture(scope="module", params=[MEAN, LAST])
def embedder(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("embedder") / "embedder.gguf"
    write_copy(base, path, {}, metadata={"llama.pooling_type": request.param})
    return path, request.param


@pytest.mark.train
def test_vectors_are_those_of_transformers(embedder: tuple[Path, int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import TINY_BASE

    path, pooling = embedder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_BASE).float(), AutoTokenizer.from_pretrained(TINY_BASE)
    with Engine(path, threads=1) as engine:
        ids = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in TEXTS]
        got, count = engine.embed(ids)
        assert count == sum(map(len, ids))
    for tokens, vector in zip(ids, got, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0].numpy()
        want = hidden.mean(0) if pooling == MEAN else hidden[-1]
        assert np.dot(vector, want / np.linalg.norm(want)) > 0.9999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_an_adapter_changes_vectors_and_nobody_elses(embedder: tuple[Path, int], adapters: dict[str, Path]) -> None:
    sampling = {"temperature": 0, "max_tokens": 12}
    with Engine(embedder[0], adapters, threads=1) as engine:
        bare, red = engine.embed(TEXTS)[0], engine.embed(TEXTS, "red")[0]
        text = engine.chat("hello", adapter="blue", sampling=sampling).text
        assert engine.embed(TEXTS)[0] == bare
        assert engine.embed(TEXTS, "red")[0] == red
        assert engine.chat("hello", adapter="blue", sampling=sampling).text == text
    assert all(np.dot(a, b) < 0.99 for a, b in zip(bare, red, strict=True))


def test_vectors_are_made_while_replies_are_written(embedder: tuple[Path, int], adapters: dict[str, Path]) -> None:
    sampling = {"temperature": 0, "max_tokens": 30}
    with Engine(embedder[0], adapters, threads=1) as engine:
        want, vectors = engine.chat("hello", adapter="red", sampling=sampling).text, engine.embed(TEXTS, "blue")[0]
        stream = engine.stream("hello", adapter="red", sampling=sampling)
        next(stream)
        assert engine.embed(TEXTS, "blue")[0] == vectors
        assert stream.completion.text == want


def test_other_bases_and_long_texts_are_refused(base: Path, embedder: tuple[Path, int]) -> None:
    with Engine(base, threads=1) as engine, pytest.raises(SettingsError, match="not a base for embeddings"):
        engine.embed(["hello"])
    with Engine(embedder[0], threads=1, n_ctx=16) as engine:
        with pytest.raises(ContextOverflowError, match="17 tokens long"):
            engine.embed([[5] * 17])
        assert len(engine.embed([[5] * 16])[0]) == 1
