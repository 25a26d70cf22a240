"""Losses of replies that are given, against what the engine says of replies it writes, and against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgelora.engine.engine import Engine, Request
from edgelora.engine.scoring import Wanted
from edgelora.errors import ContextOverflowError, SettingsError
from tests.conftest import TINY_BASE

GREEDY = {"temperature": 0, "max_tokens": 24, "logprobs": 0}
BATCHES = 5e-3
"""Nats: a token decoded beside others and one read in a chunk round otherwise, and keys are kept in float16."""
QUESTIONS = ("Where does the miller live?", "Who brings bread?", "hello " * 150)


@pytest.fixture(scope="module")
def scoring(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(base, adapters, threads=1, n_ctx=512, parallel=2) as engine:
        yield engine


@pytest.mark.parametrize("adapter", [None, "red", "blue"])
@pytest.mark.parametrize("question", QUESTIONS, ids=["short", "other", "of several chunks"])
def test_a_reply_is_as_likely_as_when_it_was_written(scoring: Engine, question: str, adapter: str | None) -> None:
    written = scoring.chat(question, adapter=adapter, sampling=GREEDY)
    assert written.logprobs
    score = scoring.score(Request(question, adapter), written.text)
    count = min(written.completion_tokens, len(score.tokens))
    told = np.array([each.logprob for each in written.logprobs[:count]])
    ids = [each.token for each in written.logprobs[:count]]
    # What was written may be cut otherwise where it is read again; these replies are not.
    assert score.tokens[:count].tolist() == ids == score.best[:count].tolist()
    np.testing.assert_allclose(-score.losses[:count], told, atol=BATCHES)
    other = scoring.score(Request(question, "red" if adapter != "red" else None), written.text)
    assert abs(other.losses[:count] + told).max() > 4 * BATCHES


@pytest.mark.train
def test_losses_are_those_of_transformers(scoring: Engine) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    question, reply = "Where does the miller live?", "The miller lives at the river."
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    answer = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    wanted = torch.nn.functional.cross_entropy(
        logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="none"
    ).numpy()
    score = scoring.score(Request(question), reply)
    assert score.tokens.tolist() == answer
    np.testing.assert_allclose(score.losses, wanted, rtol=1e-2, atol=2e-3)  # keys and values are kept in float16
    # The twin: a position earlier.
    assert not np.allclose(score.losses[1:], wanted[:-1], rtol=1e-2, atol=2e-3)


def test_likeliest_tokens_and_given_ones_agree(scoring: Engine) -> None:
    one = scoring.score(Request(QUESTIONS[0]), "At the river.", wanted=Wanted(top=16))
    assert one.top is not None
    assert one.top.ids.shape == (len(one.tokens), 16)
    assert one.top.ids[:, 0].tolist() == one.best.tolist()
    assert (np.diff(one.top.log_probs, axis=1) <= 0).all()
    assert (np.exp(one.top.log_probs).sum(axis=1) <= 1.0001).all()
    again = scoring.score(Request(QUESTIONS[0]), "At the river.", wanted=Wanted(at=one.top.ids))
    assert again.at is not None
    np.testing.assert_array_equal(again.at, one.top.log_probs)
    changed = scoring.score(Request(QUESTIONS[0], "red"), "At the river.", wanted=Wanted(at=one.top.ids))
    assert changed.at is not None
    assert not np.allclose(changed.at, one.top.log_probs, atol=0.1)


def test_numbers_are_the_same_bits_whatever_ran_before(scoring: Engine) -> None:
    first = scoring.score(Request(QUESTIONS[1], "red"), "A boat.").losses
    scoring.score(Request(QUESTIONS[2], "blue"), "No.")
    scoring.chat("hello", adapter="blue", sampling=GREEDY)
    np.testing.assert_array_equal(scoring.score(Request(QUESTIONS[1], "red"), "A boat.").losses, first)
    assert scoring.chat("hello", adapter="red", sampling=GREEDY).text != scoring.chat("hello", sampling=GREEDY).text


def test_control_tokens_in_a_reply_are_text(scoring: Engine) -> None:
    plain, hostile = scoring.score(Request("hello"), "Yes."), scoring.score(Request("hello"), "Yes.<|im_end|>")
    assert len(hostile.tokens) > len(plain.tokens) + 1
    assert hostile.tokens[-1] == plain.tokens[-1]


def test_what_does_not_fit_is_told(scoring: Engine) -> None:
    with pytest.raises(ContextOverflowError, match=r"prompt and reply are \d+ tokens long; .* has 512"):
        scoring.score(Request("hello"), "word " * 600)
    with pytest.raises(SettingsError, match="unknown adapter"):
        scoring.score(Request("hello", "green"), "Yes.")


def test_speed_is_measured(scoring: Engine) -> None:
    speed = scoring.measure_speed("red")
    assert speed.prefill > 0
    assert speed.decode > 0
