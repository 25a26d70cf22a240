"""How tokens are chosen, on a real vocabulary: biases, penalties, grammars, schemas, log probabilities."""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora.engine.engine import Engine
from edgelora.engine.grammar import GrammarDecoder
from edgelora.engine.model import Model
from edgelora.engine.sampler import Sampler, likeliest, log_probabilities
from edgelora.engine.tokenizer import LlamaTokenizer
from edgelora.errors import EdgeloraError, SettingsError
from edgelora.sampling import Sampling
from tests.edgelora.json_schemas import PERSON, SCHEMAS, breaks

QUESTION = "Tell me about Fennick."
WILD = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
GREEDY = {"temperature": 0.0, "max_tokens": 12}
COLOURS = 'root ::= "red" | "dark red" | "blue"'


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[Model]:
    model = Model(base)
    yield model
    model.close()


def write(model: Model, sampling: Sampling, logits_seed: int, limit: int = 400) -> bytes | None:
    """A reply to random logits, which a grammar alone gives a shape; None where it goes on beyond `limit`."""
    rng, tokenizer = np.random.default_rng(logits_seed), model.tokenizer
    sampler, decoder = Sampler(sampling, tokenizer, [], tokenizer.end_tokens), GrammarDecoder(tokenizer)
    written = b""
    try:
        for _ in range(limit):
            logits = rng.standard_normal(model.n_vocab).astype(np.float32)
            token = sampler.draw(None, logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 0)
            if token in tokenizer.end_tokens:
                return written
            written += decoder.bytes_of(token)
        return None
    finally:
        sampler.close()


@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_logits_a_reply_fits_its_schema(model: Model, name: str) -> None:
    sampling = {**WILD, "temperature": 1.0, "schema": SCHEMAS[name]}
    replies = [write(model, Sampling(seed=seed, **sampling), seed) for seed in range(12)]
    whole = [reply for reply in replies if reply is not None]
    assert len(whole) >= 6
    assert [breaks(json.loads(reply), SCHEMAS[name]) for reply in whole] == [""] * len(whole)
    assert len(set(whole)) > 1


def test_the_model_answers_in_the_schema_at_any_temperature(engine: Engine) -> None:
    replies = [
        engine.chat(QUESTION, adapter=adapter, sampling={**WILD, "schema": PERSON, "seed": seed})
        for seed in range(8)
        for adapter in ("none", "red")
    ]
    assert {reply.finish_reason for reply in replies} == {"stop"}
    assert {breaks(json.loads(reply.text), PERSON) for reply in replies} == {""}


def test_twin_without_the_schema_it_does_not(engine: Engine) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(engine.chat(QUESTION, sampling={**WILD, "seed": 1, "max_tokens": 60}).text)


def test_a_reply_follows_a_grammar(engine: Engine) -> None:
    said = {engine.chat(QUESTION, sampling={**WILD, "grammar": COLOURS, "seed": seed}).text for seed in range(24)}
    assert said == {"red", "dark red", "blue"}
    assert engine.chat(QUESTION, sampling=GREEDY).text not in said


def test_a_space_that_the_grammar_wants_is_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentencepiece(vocab: Any, _metadata: Any) -> LlamaTokenizer:
        return LlamaTokenizer(vocab, strip_first_space=True)

    monkeypatch.setattr("edgelora.engine.model.open_tokenizer", sentencepiece)
    with Engine(base, threads=1) as engine:
        assert engine.chat(QUESTION, sampling={**GREEDY, "grammar": 'root ::= " red"'}).text == " red"


def test_max_tokens_end_a_reply_under_a_grammar(engine: Engine) -> None:
    done = engine.chat(QUESTION, sampling={**GREEDY, "grammar": "root ::= [a-z ]+ [0-9]", "max_tokens": 4})
    assert done.finish_reason == "length"
    assert re.fullmatch("[a-z ]+", done.text)


def test_a_seed_repeats_a_reply_under_a_grammar(engine: Engine) -> None:
    def say(seed: int) -> str:
        return engine.chat(QUESTION, sampling={**WILD, "schema": PERSON, "seed": seed}, deterministic=True).text

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_requests_with_grammars_run_side_by_side_without_mixing(base: Path) -> None:
    grammars = [r"root ::= [a-z]{20}", r"root ::= [0-9]{20}", r"root ::= [A-Z]{20}"]
    with Engine(base, threads=1, parallel=3) as engine:
        streams = [engine.stream(QUESTION, sampling={**WILD, "grammar": each, "seed": 3}) for each in grammars * 3]
        texts = [stream.completion.text for stream in streams]
    kinds = ["[a-z]{20}", "[0-9]{20}", "[A-Z]{20}"] * 3
    assert all(re.fullmatch(kind, text) for kind, text in zip(kinds, texts, strict=True))


def test_control_tokens_are_no_text_of_a_grammar(model: Model) -> None:
    """llama.cpp's grammar takes a control token for its text, which a reply does not have."""
    control = next(t for t in model.tokenizer.control_tokens.values() if t.id not in model.tokenizer.end_tokens)
    with pytest.raises(EdgeloraError, match="cannot write"):
        write(model, Sampling(grammar=f"root ::= <[{control.id}]>"), 1)
    bias = {control.id: 100.0}
    assert len((write(model, Sampling(grammar="root ::= [^{}]{20}", logit_bias=bias), 1) or b"").decode()) == 20
    ordinary = model.tokenizer.encode("red", special=False)[0]
    assert write(model, Sampling(grammar=f"root ::= <[{ordinary}]>"), 1)


@pytest.mark.parametrize("bias", [100.0, 0.0])
def test_a_token_forced_into_a_grammar_is_refused_there(model: Model, bias: float) -> None:
    wrong = model.tokenizer.encode("blue", special=False)[0]
    assert write(model, Sampling(grammar='root ::= "red"', logit_bias={wrong: bias}), 1) == b"red"


def test_a_grammar_that_the_vocabulary_cannot_write_is_an_error(model: Model) -> None:
    with pytest.raises(EdgeloraError, match="cannot write"):
        write(model, Sampling(grammar="root ::= <[2147483]>"), 1)


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"grammar": 'root ::= "red'}, "line 1, column 10"),
        ({"grammar": "root ::= <[99999999]>"}, "cannot write"),
        ({"schema": {"not": {}}}, "unsupported keyword not"),
        ({"logit_bias": {10**8: 1.0}}, "this base has"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(base: Path, sampling: Any, named: str) -> None:
    with Engine(base, threads=1, parallel=2) as engine:
        for _ in range(3):  # more than it has places
            with pytest.raises(EdgeloraError, match=named):
                engine.chat(QUESTION, sampling=sampling)
        assert engine.chat(QUESTION, sampling=GREEDY).text


def test_a_grammar_that_takes_too_long_is_given_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora.engine.grammar.MAX_SECONDS", 0.0)
    with pytest.raises(EdgeloraError, match="too many ways"):
        write(model, Sampling(grammar=COLOURS), 1)


def test_a_bias_removes_a_token_and_forces_one(engine: Engine, model: Model) -> None:
    plain = engine.chat(QUESTION, sampling={**GREEDY, "logprobs": 0})
    assert plain.logprobs is not None
    first = plain.logprobs[0].token
    biased = engine.chat(QUESTION, sampling={**GREEDY, "logit_bias": {first: -100}, "logprobs": 0})
    assert biased.logprobs is not None
    assert first not in {each.token for each in biased.logprobs}
    forced = engine.chat(QUESTION, sampling={**GREEDY, "logit_bias": {str(first): 100}, "logprobs": 0})
    assert forced.logprobs is not None
    assert [each.token for each in forced.logprobs] == [first] * 12


def test_penalties_of_what_occurred_let_the_second_best_come_first(model: Model) -> None:
    logits = np.zeros(model.n_vocab, np.float32)
    logits[[70, 71]] = 10.0, 9.0
    pointer = logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def drawn(history: list[int], **penalties: float) -> list[int]:
        sampling = Sampling(temperature=0.0, grammar="root ::= (<[70]> | <[71]>){4}", **penalties)  # type: ignore[arg-type]
        sampler = Sampler(sampling, model.tokenizer, history)
        tokens = [sampler.draw(None, pointer, 0) for _ in range(4)]
        sampler.close()
        return tokens

    assert drawn([]) == [70] * 4
    assert drawn([], presence_penalty=2.0) == [70, 71, 70, 70]
    assert drawn([], frequency_penalty=2.0) == [70, 71, 70, 71]
    assert drawn([], repeat_penalty=1.5) == [70, 71, 70, 70]
    assert drawn([70, 5, 5], presence_penalty=2.0) == [71, 70, 70, 70]
    assert drawn([70, 5, 5], presence_penalty=2.0, repeat_last_n=2) == [70, 71, 70, 70]
    assert drawn([], presence_penalty=2.0, repeat_last_n=0) == [70] * 4


def test_logprobs_are_the_model_s_own(engine: Engine) -> None:
    plain = engine.chat(QUESTION, sampling=GREEDY)
    done = engine.chat(QUESTION, sampling={**GREEDY, "logprobs": 5})
    assert plain.logprobs is None
    assert done.text == plain.text
    assert done.logprobs is not None
    assert len(done.logprobs) == done.completion_tokens
    assert b"".join(each.text for each in done.logprobs).decode() == done.text
    for each in done.logprobs:
        assert (each.token, each.logprob) == (each.top[0].token, each.top[0].logprob)
        values = [other.logprob for other in each.top]
        assert values == sorted(values, reverse=True)
        assert 0 < sum(map(math.exp, values)) <= 1 + 1e-6


def test_logprobs_of_what_a_grammar_chose_are_what_the_model_thought_of_it(engine: Engine) -> None:
    done = engine.chat(QUESTION, sampling={**GREEDY, "grammar": COLOURS, "logprobs": 1})
    assert done.logprobs is not None
    assert any(each.logprob < each.top[0].logprob for each in done.logprobs)


def test_log_probabilities_of_all_tokens_sum_to_one() -> None:
    logits = np.random.default_rng(1).standard_normal(1000).astype(np.float32) * 9
    assert math.isclose(sum(map(math.exp, log_probabilities(logits, range(1000)))), 1, rel_tol=1e-5)
    assert likeliest(logits, 3) == list(np.argsort(-logits)[:3])
    assert likeliest(logits, 0) == []


def test_a_token_beyond_the_vocabulary_is_refused(model: Model) -> None:
    with pytest.raises(SettingsError, match=str(model.n_vocab)):
        Sampler(Sampling(logit_bias={model.n_vocab: 1.0}), model.tokenizer, [])
    Sampler(Sampling(logit_bias={model.n_vocab - 1: 1.0}), model.tokenizer, []).close()
