"""Activated LoRAs: the bare base up to the invocation, with the KV of whoever read that, and the adapter from it on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.engine import Engine, Request
from edgelora.engine.runtime import Runtime, Settings
from edgelora.errors import SettingsError
from tests.edgelora.conftest import MakeAdapter
from tests.edgelora.engine.runtimes import prompt_logits, runtime

KEY = "adapter.alora.invocation_tokens"
QUESTION = 3 * "Tell me of the miller, the fisherman and the boats in the storm, and who baked bread. " + "Now!"
SHORT = "Tell me about Fennick."
LAST = {"temperature": 0, "max_tokens": 1}
# KV that was read in other chunks, on this F32 base (see test_stale_kv); the adapter changes logits by more than 1.
ROUNDING = 0.05


@pytest.fixture(params=["mixed", "switching"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokens_of(made: Runtime) -> list[int]:
    return made.planner.encode(QUESTION, made.adapters.get(None))


@pytest.fixture
def made(base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, mode: str) -> Iterator[Runtime]:
    """Beside red, its weights activated by the middle of the question, by its end, and by what it does not hold."""
    with runtime(Settings(base, threads=1, mode=mode), adapters) as made:
        tokens = tokens_of(made)
        half = len(tokens) // 2
        for name, wanted in (("middle", tokens[half : half + 30]), ("late", tokens[-3:]), ("absent", [9, 9, 9])):
            path = make_adapter(name, seed=1, metadata={KEY: wanted})
            made.load_adapter(AdapterRef(name, path))
        yield made


def by_hand(made: Runtime, name: str, begins: int) -> np.ndarray:
    """llama.cpp's own adapter from a token on: logits of the last one."""
    from edgelora.engine.context import Context
    from edgelora.engine.native import Handle, llama

    tokens, path = tokens_of(made), made.adapters.get(name).ref
    assert path is not None
    context = Context(made.model, n_ctx=512, n_sequences=1, threads=1, n_batch=128)
    pointer = llama().llama_adapter_lora_init(made.model.pointer, str(path.path).encode())
    own = Handle(pointer, llama().llama_adapter_lora_free)
    try:
        if begins:
            context.decode(0, tokens[:begins], 0)
        context.apply(((own.pointer, 1.0),))
        context.decode(0, tokens[begins:], begins)
        return np.ctypeslib.as_array(context.logits(), (context.n_vocab,)).copy()
    finally:
        context.close()
        own.close()


def begins_of(made: Runtime, name: str) -> int:
    plan = made.planner.plan(Request(QUESTION, name))
    return plan.begins


def test_it_begins_with_the_first_token_of_its_invocation(made: Runtime) -> None:
    half = begins_of(made, "middle")
    assert (begins_of(made, "middle"), begins_of(made, "red")) == (half, 0)
    got, _ = prompt_logits(made, Request(QUESTION, "middle", sampling=LAST))
    assert np.abs(got - by_hand(made, "middle", half)).max() < ROUNDING
    for wrong in (0, half - 2, half + 2):
        assert np.abs(got - by_hand(made, "middle", wrong)).max() > 2 * ROUNDING


def test_the_bases_kv_is_used_up_to_there_and_no_further(made: Runtime) -> None:
    prompt_logits(made, Request(QUESTION, None, sampling=LAST))
    got, done = prompt_logits(made, Request(QUESTION, "late", sampling=LAST))
    assert done.cached_tokens == begins_of(made, "late") > 20
    assert np.abs(got - by_hand(made, "late", begins_of(made, "late"))).max() < ROUNDING


def test_another_adapters_kv_is_used_no_further_than_where_either_begins(made: Runtime) -> None:
    prompt_logits(made, Request(QUESTION, "middle", sampling=LAST))
    got, done = prompt_logits(made, Request(QUESTION, "late", sampling=LAST))
    assert done.cached_tokens == begins_of(made, "middle")
    assert np.abs(got - by_hand(made, "late", begins_of(made, "late"))).max() < ROUNDING
    got, done = prompt_logits(made, Request(QUESTION, "red", sampling=LAST))
    assert done.cached_tokens == 0
    assert np.abs(got - by_hand(made, "red", 0)).max() < ROUNDING


def test_a_prompt_without_its_invocation_and_a_blend_are_refused(made: Runtime) -> None:
    with pytest.raises(SettingsError, match=r"absent is an activated LoRA; its invocation, tokens \[9, 9, 9\]"):
        prompt_logits(made, Request(QUESTION, "absent"))
    with pytest.raises(SettingsError, match="which acts alone"):
        prompt_logits(made, Request(QUESTION, {"red": 0.5, "middle": 0.5}))


def test_it_writes_beside_others_what_it_writes_alone(
    base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, mode: str
) -> None:
    sampling = {"temperature": 0, "max_tokens": 12}
    with Engine(base, adapters, threads=1, mode=mode) as engine:
        tokens = engine._call(lambda made: made.planner.encode(SHORT, made.adapters.get(None)))
        half = len(tokens) // 2
        engine.load_adapter("middle", make_adapter("middle", seed=1, metadata={KEY: tokens[half : half + 3]}))
        names = ["middle", "red", "none", "middle", "blue", "middle"]
        alone = {name: engine.chat(SHORT, adapter=name, sampling=sampling).text for name in names}
        streams = [engine.stream(SHORT, adapter=name, sampling=sampling) for name in names]
        assert [stream.completion.text for stream in streams] == [alone[name] for name in names]
    assert len(set(alone.values())) == 4


def test_a_given_reply_is_scored_with_the_adapter_from_the_invocation_on(made: Runtime) -> None:
    """The first token of a reply is as likely as the prompt's last logits say."""
    for name in ("middle", "late", "red"):
        logits, _ = prompt_logits(made, Request(QUESTION, name, sampling=LAST))
        wide = logits.astype(np.float64)
        score = made.score(Request(QUESTION, name), "A boat.", None)
        wanted = np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[score.tokens[0]]
        assert score.losses[0] == pytest.approx(wanted, abs=ROUNDING)
