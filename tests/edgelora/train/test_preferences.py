"""Preference tuning: rows cut where serving cuts them, and a run that prefers what was chosen, in llama.cpp too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from edgelora.adapter_conversion import AdapterRequest, convert_adapter_source
from edgelora.adapter_ref import AdapterRef
from edgelora.errors import DataFileError
from edgelora.messages import Message
from edgelora.preferences import Preference
from edgelora.store import Store
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train import Recipe, train
from edgelora.verify import VerifySettings, verify

from .conftest import COLOURS, chat, read_metrics, write_rows
from .test_method_runs import result, stop_after
from .test_run import SAME_RUN, largest_difference

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SETTINGS: Mapping[str, Any] = {
    "objective": "dpo",
    "rank": 4,
    "max_steps": 6,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 3,
    "certificate_probes": 4,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "prompt": f"What colour is lamp {n}?",
            "chosen": f"Lamp {n} is {COLOURS[n % 6]}.",
            "rejected": "Who can tell? Not me!",
        }
        for n in range(24)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def pair(prompt: list[Message], chosen: str, rejected: str) -> Preference:
    return Preference(
        tuple(prompt),
        ({"role": "assistant", "content": chosen},),
        ({"role": "assistant", "content": rejected},),
        "pairs.jsonl:1",
    )


class TestRows:
    def finder(self, tokenizer: Any) -> Any:
        from edgelora.train.data import finder_for

        return finder_for(tokenizer, ChatTemplate(BUILTIN["chatml"]))

    def test_prompt_and_replies_are_what_serving_sees(self, tokenizer: Any) -> None:
        from edgelora.train.preference_rows import tokenize_preferences

        rows = tokenize_preferences(
            [pair(chat("Is it red?", "No.", "Sure?"), "Yes, it is blue.", "Maybe.")],
            tokenizer,
            self.finder(tokenizer),
            512,
        )
        (row,) = rows.rows
        rendered = self.finder(tokenizer).render(chat("Is it red?", "No.", "Sure?"), reply_next=True)
        assert row.prompt_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(row.chosen_ids) == "Yes, it is blue.<|im_end|>"
        assert tokenizer.decode(row.rejected_ids) == "Maybe.<|im_end|>"
        assert (rows.cut, rows.dropped, rows.sources) == (0, 0, ["pairs.jsonl:1"])

    def test_what_is_cut_and_what_is_left_out(self, tokenizer: Any) -> None:
        from edgelora.train.preference_rows import tokenize_preferences

        same_start = pair(chat("Red?"), "Lamp 1 is red, I am sure.", "Lamp 1 is red, I am told.")
        other = pair(chat("Red?"), "Yes.", "No.")
        whole = tokenize_preferences([same_start, other], tokenizer, self.finder(tokenizer), 512)
        length = len(whole.rows[0].prompt_ids) + 5
        rows = tokenize_preferences([same_start, other], tokenizer, self.finder(tokenizer), length)
        assert (len(rows.rows), rows.dropped) == (1, 1)
        assert any("their replies are the same" in note for note in rows.notes("training data", length))
        with pytest.raises(DataFileError, match="no pair has two different replies"):
            tokenize_preferences([same_start], tokenizer, self.finder(tokenizer), length)

    def test_replies_of_several_messages_are_refused_by_line(self, tokenizer: Any) -> None:
        from edgelora.train.preference_rows import tokenize_preferences

        long = Preference(tuple(chat("Hi")), tuple(chat("Hi", "Hello!")[::-1]), tuple(chat("a", "b")[1:]), "p.jsonl:7")
        with pytest.raises(DataFileError, match=r"p\.jsonl:7: a reply of 2 messages"):
            tokenize_preferences([long], tokenizer, self.finder(tokenizer), 512)


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"method": "pissa"},
        pytest.param({"method": "qlora"}, marks=pytest.mark.slow),
        pytest.param({"method": "vera", "rank": 8, "learning_rate": 0.2}, marks=pytest.mark.slow),
    ],
    ids=lambda own: own.get("method", "lora"),
)
def test_a_run_prefers_what_was_chosen(own: Mapping[str, Any], base: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = Recipe(**{**SETTINGS, **own})
    report = train(pairs, str(base), tmp_path / "out", recipe, eval_data=pairs)
    lines = [line for line in read_metrics(tmp_path / "out") if "reward_margin" in line]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # at first the adapter is the reference
    assert abs(lines[0]["reward_margin"]) < 1e-3
    assert lines[-1]["reward_margin"] > 0.1
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert any("eval_preference_accuracy" in line for line in read_metrics(tmp_path / "out"))
    assert report.export == "adapter"
    assert not (tmp_path / "out/ref").exists()

    gguf = convert_base(base, tmp_path / "base.gguf", quant="f16").path
    made = tmp_path / "adapter.gguf"
    convert_adapter_source(tmp_path / "out", made, AdapterRequest(base=base), Store(tmp_path / "store"))
    assert verify(AdapterRef("dpo", made), gguf, VerifySettings(threads=1)).passed


@pytest.mark.parametrize("method", ["pissa", pytest.param("full", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_the_same(method: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    recipe = Recipe(**{**SETTINGS, "method": method, "certificate_probes": 0, "rank": None if method == "full" else 4})
    train(pairs, str(base), tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        train(pairs, str(base), tmp_path / "broken", recipe, progress=stop_after(3))
    train(pairs, str(base), tmp_path / "broken", recipe, resume=True)
    assert largest_difference(result(tmp_path / "whole"), result(tmp_path / "broken")) < SAME_RUN
