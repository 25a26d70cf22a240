"""Texts that are continued as they are, pieces with log probabilities, and replies that are delivered elsewhere."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue

import pytest

from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from edgelora.engine.stream import Completion, Item, Piece, Request
from edgelora.errors import ContextOverflowError, SettingsError
from tests.edgelora.conftest import MakeAdapter

GREEDY = {"temperature": 0, "max_tokens": 12}


def test_a_raw_text_is_what_the_template_would_have_made(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, adapters, threads=1) as engine:
        want = engine.chat("Where is Fennick?", adapter="red", sampling=GREEDY)
        template = engine._call(lambda runtime: runtime.planner._template(runtime.adapters.get("red")))
        bos = engine._call(lambda runtime: runtime.model.tokenizer.text_of("bos"))
        text = template.render(
            [{"role": "user", "content": "Where is Fennick?"}], add_generation_prompt=True, bos_token=bos, eos_token=""
        )
        got = engine.submit(Request(text, "red", sampling=GREEDY, raw=True)).completion
        assert (got.text, got.prompt_tokens) == (want.text, want.prompt_tokens)
        tokens = engine._call(lambda runtime: runtime.planner.encode("Where is Fennick?", runtime.adapters.get("red")))
        assert engine.submit(Request(tokens, "red", sampling=GREEDY, raw=True)).completion.text == want.text


def test_no_system_prompt_is_put_before_a_raw_text(base: Path, make_adapter: MakeAdapter) -> None:
    with Engine(base, {"pip": make_adapter(contract=Contract(system="You are Pip."))}, threads=1) as engine:
        texts = {name: engine.submit(Request("hello", name, sampling=GREEDY, raw=True)) for name in ("pip", "none")}
        counts = {stream.completion.prompt_tokens for stream in texts.values()}
        assert len(counts) == 1


@pytest.mark.parametrize("prompt", [[], [1, -1], [10**9], [True], [1.5], 7, [{"role": "user", "content": "x"}]])
def test_a_raw_prompt_that_is_none_is_refused(prompt: object, base: Path) -> None:
    with Engine(base, threads=1) as engine, pytest.raises(SettingsError, match="prompt"):
        _ = engine.submit(Request(prompt, raw=True)).completion  # type: ignore[arg-type]


def test_a_raw_prompt_that_does_not_fit_is_refused_with_both_numbers(base: Path) -> None:
    with Engine(base, threads=1, n_ctx=64) as engine, pytest.raises(ContextOverflowError, match="is 64 tokens long"):
        _ = engine.submit(Request([5] * 64, raw=True)).completion


def test_pieces_bring_the_log_probabilities_of_their_tokens(base: Path) -> None:
    with Engine(base, threads=1) as engine:
        stream = engine.stream("hello", sampling={**GREEDY, "logprobs": 2})
        pieces = list(stream)
        told = [token for piece in pieces for token in piece.logprobs]  # type: ignore[attr-defined]
        assert told == list(stream.completion.logprobs or ())
        assert len(told) == stream.completion.completion_tokens
        assert "".join(pieces) == stream.completion.text
        assert all(not piece.logprobs for piece in engine.stream("hello", sampling=GREEDY))  # type: ignore[attr-defined]


def test_what_comes_can_be_delivered(base: Path) -> None:
    items: SimpleQueue[Item] = SimpleQueue()
    with Engine(base, threads=1) as engine:
        stream = engine.submit(Request("hello", sampling=GREEDY), items.put)
        got = [items.get(timeout=60)]
        while isinstance(got[-1], Piece):
            got.append(items.get(timeout=60))
        assert isinstance(got[-1], Completion)
        assert "".join(map(str, got[:-1])) == got[-1].text == engine.chat("hello", sampling=GREEDY).text
        engine.submit(Request("hello", "nobody"), items.put)
        assert isinstance(items.get(timeout=60), SettingsError)
        del stream


def test_the_state_of_an_engine(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, adapters, threads=1, parallel=3, n_ctx=128) as engine:
        state = engine.state()
        assert (state["parallel"], state["n_ctx"], state["waiting"], state["running"]) == (3, 128, 0, 0)
        assert state["adapters"] == state["adapters_in_memory"] == ["red", "blue"]
        assert state["adapter_bytes"] > 0
