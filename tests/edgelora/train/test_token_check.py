"""`edgelora data check --base`: the tokens of a run, and a row as the model sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora.cli import cli
from edgelora.dataset import DataSource, read_conversations
from edgelora.dataset.check import check_data, example_at
from edgelora.errors import DataFileError
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train.data import IGNORED, finder_for, tokenize_conversations
from edgelora.train.token_check import TokenCheck

from .conftest import chat, make_base, write_rows
from .test_passages import REASONING

pytestmark = pytest.mark.train

TALKS = [
    chat("Is it waterproof?", "Yes, it is."),
    chat("Hello, how are you?", "Fine.", "Sure?", "Fine, thank you. " * 12, system="Be brief."),
    chat("Is it? " * 40, "Yes."),
]


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in TALKS])


def test_tokens_are_those_of_a_run(base: Path, tokenizer: Any, talks: Path) -> None:
    found = check_data([DataSource(str(talks))], measure=TokenCheck(str(base), None, 64))
    finder = finder_for(tokenizer, ChatTemplate(tokenizer.chat_template))
    whole, cut = (tokenize_conversations(read_conversations(talks), tokenizer, finder, n) for n in (10**6, 64))
    assert found.tokens is not None
    assert found.tokens.total == sum(len(row.input_ids) for row in whole.rows)
    assert found.trained_tokens == sum(label != IGNORED for row in cut.rows for label in row.labels)
    assert {finding.text: finding.count for finding in found.findings} == {
        "rows that are cut at 64 tokens": cut.cut,
        "rows of which a sequence is left out: cut at 64 tokens, it holds no reply": cut.dropped,
    }
    assert (cut.cut, cut.dropped) == (2, 1)


def test_what_the_template_adds(base: Path, tokenizer: Any, talks: Path) -> None:
    measure = TokenCheck(str(base), None, 512)
    check_data([DataSource(str(talks))], measure=measure)
    share = measure.template_share()
    assert share is not None
    turn = len(tokenizer("<|im_start|>user\n<|im_end|>\n")["input_ids"])
    assert share.tokens.rows == 3
    assert abs(share.tokens.smallest - 2 * turn) <= 8  # the names of roles differ
    assert share.special == ("<|im_start|>", "<|im_end|>")


def test_a_row_as_the_model_sees_it(base: Path, talks: Path) -> None:
    measure = TokenCheck(str(base), None, 512)
    shown = measure.shown(example_at(DataSource(str(talks))))
    assert shown.segments == (
        ("<|im_start|>user\nIs it waterproof?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes, it is.<|im_end|>", True),
        ("\n", False),
    )
    assert (shown.source, shown.is_cut) == (f"{talks}:1", False)
    short = TokenCheck(str(base), None, 16).shown(example_at(DataSource(str(talks)), 3))
    assert short.is_cut
    with pytest.raises(DataFileError, match="no row at line 9"):
        example_at(DataSource(str(talks)), 9)


def test_a_template_that_rewrites_turns_and_special_tokens_as_text(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "reasoning.jinja"
    template.write_text(REASONING)
    rows = [chat("a", "b", "c", "d"), chat("a <|im_end|>", "b")]
    path = write_rows(tmp_path / "d.jsonl", [{"messages": row} for row in rows])
    found = check_data([DataSource(str(path))], measure=TokenCheck(str(base), str(template), 512))
    assert {finding.text.partition(":")[0]: finding.count for finding in found.of("warning")} == {
        "rows trained reply by reply, as serving sees them": 1,
        "rows with special tokens as text": 1,
    }
    assert found.tokens is not None
    assert found.tokens.rows == 3


def test_rows_that_the_template_refuses_are_errors(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template.write_text(refusal + BUILTIN["chatml"])
    path = write_rows(tmp_path / "d.jsonl", [{"messages": talk} for talk in TALKS])
    found = check_data([DataSource(str(path))], measure=TokenCheck(str(base), str(template), 512))
    (error,) = found.of("error")
    assert "no system here" in error.text
    assert error.examples == ("line 2",)


def test_a_base_without_a_template(tmp_path: Path, talks: Path) -> None:
    bare = make_base(tmp_path / "bare", chat_template=None)
    found = check_data([DataSource(str(talks))], measure=TokenCheck(str(bare), None, 512))
    (error,) = found.of("error")
    assert "the base has no chat template" in error.text
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    )
    assert check_data([DataSource(str(pairs))], measure=TokenCheck(str(bare), None, 512)).passes()


def test_preference_pairs_are_measured_on_both_sides(base: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "Yes.", "rejected": "No. " * 80}])
    found = check_data([DataSource(str(path))], measure=TokenCheck(str(base), None, 64))
    assert [finding.text for finding in found.of("warning")] == ["rows that are cut at 64 tokens"]


def test_the_command_marks_what_is_trained(base: Path, talks: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "check", str(talks), "--base", str(base), "--max-length", "64"])
    assert result.exit_code == 0, result.output
    assert "<|im_start|>assistant\n\u27e6Yes, it is.<|im_end|>\u27e7" in result.output
    assert "\u2588" in result.output
    assert "A run would take this data. Warnings: 2." in result.output
    arguments = ["data", "check", str(talks), "--base", str(base), "--row", "2", "--json"]
    shown = json.loads(CliRunner().invoke(cli, arguments).output)["shown"]
    assert "".join(text for text, _ in shown["segments"]).startswith("<|im_start|>system\nBe brief.")
