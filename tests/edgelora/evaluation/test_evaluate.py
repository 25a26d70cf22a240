"""Whole evaluations on the bundled base: what is measured is what the engine says when it is asked alone."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.engine import Engine, Request
from edgelora.errors import BaseMismatchError, DataFileError, ModelFileError, SettingsError
from edgelora.evaluation.evaluate import WORK_FILE, EvalSettings, Evaluation, Listeners, evaluate
from edgelora.evaluation.metrics import METRICS, suggested
from edgelora.evaluation.results import row_dicts, to_dict, write_results
from edgelora.evaluation.rows import EvalRow, RowSettings, read_eval_rows
from edgelora.evaluation.settings import EngineSettings
from edgelora.evaluation.text_overlap import token_f1
from edgelora.evaluation.thresholds import Threshold
from edgelora.evaluation.work_file import WorkFile
from edgelora.messages import user_message
from tests.edgelora.engine.gguf_copies import write_copy

N_ROWS, MAX_TOKENS = 5, 12
ROUNDING = 5e-3
"""Nats a token: decoded alone and beside others."""
ENGINE = EngineSettings(sampling={"max_tokens": MAX_TOKENS}, threads=1, n_ctx=256, parallel=4)
SETTINGS = EvalSettings(engine=ENGINE, metrics=("perplexity", "exact-match", "f1"), resamples=200)
QUESTIONS = ("Where does the miller live?", "Who brings bread?", "Is it far?", "What is a boat?", "Hello!")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": text, "completion": f"The answer to {text}"} for text in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def references(adapters: dict[str, Path]) -> list[AdapterRef]:
    return [AdapterRef(name, path) for name, path in adapters.items()]


@pytest.fixture(scope="module")
def found(base: Path, references: list[AdapterRef], rows_file: Path) -> Evaluation:
    return evaluate(rows_file, base, references, settings=SETTINGS)


def test_replies_and_losses_are_those_of_the_engine_alone(
    found: Evaluation, base: Path, adapters: dict[str, Path]
) -> None:
    sampling = {"temperature": 0, "max_tokens": MAX_TOKENS, "seed": 0}
    with Engine(base, adapters, threads=1, n_ctx=256, parallel=1) as engine:
        for variant in found.variants:
            losses, tokens, scores = 0.0, 0, []
            for row, answer in zip(found.rows, found.answers[variant.name], strict=True):
                alone = engine.chat(row.messages, adapter=variant.adapter, sampling=sampling)
                assert answer.reply == alone.text
                score = engine.score(Request(row.messages, variant.adapter), row.reference)
                losses, tokens = losses + score.losses.sum(), tokens + len(score.tokens)
                scores.append(token_f1(alone.text, row.reference))
            measured = {name: each[variant.name] for name, each in found.measured.items()}
            assert measured["perplexity"].interval.value == pytest.approx(math.exp(losses / tokens), rel=ROUNDING)
            assert measured["f1"].interval.value == pytest.approx(sum(scores) / N_ROWS)
    replies = {name: [answer.reply for answer in answers] for name, answers in found.answers.items()}
    assert replies["red"] != replies["base"] != replies["blue"]


def test_adapters_are_compared_with_the_base(found: Evaluation) -> None:
    assert [variant.name for variant in found.variants] == ["base", "red", "blue"]
    for name in ("red", "blue"):
        compared = found.measured["perplexity"][name].comparison
        assert compared
        values = [found.measured["perplexity"][each].interval.value for each in (name, "base")]
        assert compared.difference.interval.value == pytest.approx(values[0] - values[1])
        assert sum(map(compared.count, ("better", "worse", "same"))) == N_ROWS
    assert found.measured["perplexity"]["base"].comparison is None


def test_results_are_written_whole(found: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, rows, _ = write_results(tmp_path, found)
    told = json.loads(result.read_text())
    assert told == json.loads(json.dumps(to_dict(found)))
    assert [variant["name"] for variant in told["variants"]] == ["base", "red", "blue"]
    assert told["variants"][1]["metrics"]["f1"]["compared"]["reference"] == "base"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["variants"]["red"]["reply"] == found.answers["red"][0].reply
    assert lines == json.loads(json.dumps(list(row_dicts(found))))
    result.write_text("earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataFileError, match=r"results\.json: cannot be written"):
        write_results(tmp_path, found)
    assert result.read_text() == "earlier"
    assert not list(tmp_path.glob("*.partial"))


class Counted:
    """Counts answers, and presses Ctrl-C after so many."""

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.done = most, 0

    def __call__(self, done: int, total: int, what: str) -> None:
        self.done = done
        if done >= self.most:
            raise KeyboardInterrupt


def run(rows_file: Path, base: Path, references: Sequence[AdapterRef], folder: Path, **options: Any) -> Evaluation:
    return evaluate(rows_file, base, references, settings=replace(SETTINGS, folder=folder), **options)


def test_an_interrupted_run_goes_on(
    found: Evaluation, base: Path, references: list[AdapterRef], rows_file: Path, tmp_path: Path
) -> None:
    for most in (14, 18):  # while replies are written, and while references are read
        with pytest.raises(KeyboardInterrupt, match="run the same command to go on"):
            run(rows_file, base, references, tmp_path, listeners=Listeners(Counted(most)))
    finished = run(rows_file, base, references, tmp_path)
    assert finished.n_before >= 18
    assert finished.answers == found.answers
    assert finished.measured == found.measured
    again = run(rows_file, base, references, tmp_path)
    assert (again.n_before, again.answers) == (2 * 3 * N_ROWS, found.answers)


def test_only_what_is_new_is_worked_out(base: Path, adapters: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    one = [AdapterRef("one", adapters["red"])]
    assert run(rows_file, base, one, tmp_path).n_before == 0
    renamed = [AdapterRef("other", Path(shutil.copy(adapters["red"], tmp_path / "copy.gguf")))]
    assert run(rows_file, base, renamed, tmp_path).n_before == 4 * N_ROWS  # known by content
    scaled = [AdapterRef("other", adapters["red"], 0.5)]
    assert run(rows_file, base, scaled, tmp_path).n_before == 2 * N_ROWS  # the base's own
    lines = rows_file.read_text().splitlines(keepends=True)
    edited = tmp_path / "edited.jsonl"
    edited.write_text("".join([lines[0].replace("miller", "smith"), *lines[1:]]))
    assert run(edited, base, one, tmp_path).n_before == 4 * (N_ROWS - 1)


def test_another_quantization_has_a_price(
    bases: dict[str, Path], references: list[AdapterRef], rows_file: Path
) -> None:
    settings = replace(SETTINGS, metrics=("perplexity",))
    found = evaluate(rows_file, bases["f32"], references[:1], [bases["q8_0"]], settings)
    assert [variant.name for variant in found.variants] == ["base", "red", "base on q8_0", "red on q8_0"]
    for name in ("base on q8_0", "red on q8_0"):
        assert 0 < found.measured["kl"][name].interval.value < 0.02
        assert 0.9 < found.measured["top-1"][name].interval.value <= 1
        assert found.measured["perplexity"][name].comparison
    assert set(found.measured["kl"]) == {"base on q8_0", "red on q8_0"}


def test_the_same_file_costs_nothing(base: Path, rows_file: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copy(base, tmp_path / "twin.gguf"))
    settings = replace(SETTINGS, metrics=("perplexity", "f1"))
    found = evaluate(rows_file, base, (), [twin], settings)
    assert found.measured["kl"]["base on twin"].interval.value == 0
    assert found.measured["top-1"]["base on twin"].interval.value == 1
    compared = found.measured["perplexity"]["base on twin"].comparison
    assert compared
    assert (compared.difference.interval.value, compared.verdict) == (0, "same")


def test_divergences_are_kept_too(bases: dict[str, Path], rows_file: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, metrics=("perplexity",), folder=tmp_path)
    first = evaluate(rows_file, bases["f32"], (), [bases["q8_0"]], settings)
    again = evaluate(rows_file, bases["f32"], (), [bases["q8_0"]], settings)
    assert (first.n_before, again.n_before) == (0, 2 * N_ROWS)
    assert again.answers == first.answers
    alone = evaluate(rows_file, bases["f32"], (), (), settings)
    assert alone.n_before == N_ROWS


def test_thresholds_fail_what_is_beyond_them(base: Path, references: list[AdapterRef], rows_file: Path) -> None:
    def failures(*thresholds: Threshold) -> list[str]:
        settings = replace(SETTINGS, metrics=("perplexity",), thresholds=thresholds)
        return list(evaluate(rows_file, base, references, settings=settings).failures)

    assert failures(Threshold("perplexity", 1.0, True), Threshold("perplexity", 1e9, False)) == []
    told = failures(Threshold("perplexity", 1.0, False), Threshold("perplexity", 1e9, True, "base"))
    assert [line.partition(":")[0] for line in told] == ["red", "blue", "base"]
    assert "perplexity is" in told[0]
    assert "expected at most 1" in told[0]
    with pytest.raises(SettingsError, match=r"f1 is not measured; .*no 'green' is evaluated"):
        failures(Threshold("f1", 0.5, True), Threshold("perplexity", 1.0, True, "green"))


def test_a_threshold_of_ones_own_metric_names_the_function(base: Path, rows_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def is_short(reply, reference, row):\n    return 0\n")
    threshold = Threshold.parse("is_short=0.5", is_least=True)
    settings = replace(SETTINGS, metrics=(), function=f"{path}:is_short", thresholds=(threshold,))
    assert evaluate(rows_file, base, settings=settings).failures == ["base: is_short is 0, expected at least 0.5"]


def test_thresholds_are_parsed() -> None:
    assert Threshold.parse("accuracy=0.9", is_least=True) == Threshold("accuracy", 0.9, True)
    assert Threshold.parse("support:json_fields=80%", is_least=True) == Threshold("json-fields", 0.8, True, "support")
    assert Threshold.parse("base on q2:perplexity=12", is_least=False) == Threshold(
        "perplexity", 12, False, "base on q2"
    )
    for text in ("accuracy", "accuracy=", "=1", "accuracy=high", "accuracy=nan"):
        with pytest.raises(SettingsError, match=r"expected \[ADAPTER:\]METRIC=VALUE"):
            Threshold.parse(text, is_least=True)


def test_metrics_are_named_or_suggested() -> None:
    def rows(*references: str) -> list[EvalRow]:
        return [EvalRow(n, (user_message("q"),), text, (), {}) for n, text in enumerate(references, 1)]

    assert suggested(rows("yes", "no", "no", "yes", "no", "yes")) == ["perplexity", "accuracy"]
    assert suggested(rows('{"a": 1}', '{"a": 2}')) == ["perplexity", "exact-match", "json", "json-fields"]
    assert suggested(rows("It is blue.", "It is red.")) == ["perplexity", "exact-match", "f1", "rouge-l"]
    assert all(kind.name == name for name, kind in METRICS.items())


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        (("f1", "bleu", "f1"), r"unknown metric 'bleu'; metric f1 is given twice"),
        (("regex",), "metric regex needs a text"),
        (("f1=3",), "metric f1 takes no text"),
    ],
)
def test_metrics_that_make_no_sense_are_told(
    metrics: tuple[str, ...], problem: str, base: Path, rows_file: Path
) -> None:
    with pytest.raises(SettingsError, match=problem):
        evaluate(rows_file, base, settings=replace(SETTINGS, metrics=metrics))


@pytest.mark.parametrize("metric", ["json-fields", "regex=#### ([0-9]+)"])
def test_references_that_a_metric_cannot_use_are_told_by_line(metric: str, base: Path, rows_file: Path) -> None:
    with pytest.raises(DataFileError, match=r"(?s)line 1: the reference .*line 5: the reference"):
        evaluate(rows_file, base, settings=replace(SETTINGS, metrics=(metric,)))


def test_rows_that_do_not_fit_are_told_by_line(base: Path, rows_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = json.dumps({"prompt": "word " * 400, "completion": "x"})
    path.write_text(rows_file.read_text() + long + "\n")
    with pytest.raises(DataFileError, match=r"(?s)1 rows cannot be answered:\nline 6: .* tokens long") as caught:
        evaluate(path, base, settings=replace(SETTINGS, folder=tmp_path / "out"))
    assert "--ctx-size" in caught.value.hint
    assert "--on-overflow" not in caught.value.hint  # which is no option here
    assert evaluate(rows_file, base, settings=replace(SETTINGS, folder=tmp_path / "out")).n_before == 2 * N_ROWS


def test_where_results_cannot_go_is_told_with_what_to_do(base: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataFileError, match=r"out: cannot be made \(File exists\)") as caught:
        evaluate(rows_file, base, settings=replace(SETTINGS, folder=tmp_path / "out"))
    assert "-o" in caught.value.hint


def test_an_adapter_of_another_base_is_refused(base: Path, adapters: dict[str, Path], rows_file: Path) -> None:
    from edgelora.contract import Contract
    from tests.edgelora.conftest import write_adapter

    stranger = adapters["red"].with_name("stranger.gguf")
    write_adapter(stranger, base, 3, contract=Contract(base_name="another", base_fingerprint="0" * 64))
    with pytest.raises(BaseMismatchError, match="another"):
        evaluate(rows_file, base, [AdapterRef("stranger", stranger)], settings=SETTINGS)


def test_another_model_is_no_quantization(base: Path, rows_file: Path, tmp_path: Path) -> None:
    other = write_copy(base, tmp_path / "other.gguf", {"output_norm.weight": np.ones(256, np.float32)})
    with pytest.raises(BaseMismatchError, match=r"other\.gguf is no quantization of .*f32\.gguf"):
        evaluate(rows_file, base, (), [other], SETTINGS)
    with pytest.raises(SettingsError, match="evaluated already"):
        evaluate(rows_file, base, (), [base], SETTINGS)


def test_what_is_wrong_with_all_rows_is_said_once(base: Path, rows_file: Path, tmp_path: Path) -> None:
    template = tmp_path / "refuses.jinja"
    template.write_text("{{ raise_exception('not today') }}")
    engine = replace(ENGINE, chat_template=str(template))
    with pytest.raises(ModelFileError, match=r"^[^\n]*not today[^\n]*$"):
        evaluate(rows_file, base, settings=replace(SETTINGS, engine=engine))


def test_columns_are_named_by_templates(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,category\nIt broke.,bad\n,good\nFine.,\n")
    with pytest.raises(DataFileError, match=r"rows\.csv:4: its reference is empty"):
        read_eval_rows(path, RowSettings("Classify: {text}", "{category}"))
    first, second = read_eval_rows(path, RowSettings("Classify: {text}", "{category}", system="Be short.", limit=2))
    assert first.messages == ({"role": "system", "content": "Be short."}, user_message("Classify: It broke."))
    assert (first.reference, second.reference, second.question) == ("bad", "good", "Classify: ")
    with pytest.raises(SettingsError, match="--prompt is given without --reference"):
        read_eval_rows(path, RowSettings("{text}"))
    with pytest.raises(DataFileError, match=r"rows\.csv:2: .*names \{label\}"):
        read_eval_rows(path, RowSettings("{text}", "{label}"))


def test_bad_rows_are_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnot JSON\n{"text": "plain"}\n{"messages": []}\n')
    with pytest.raises(DataFileError, match=r"(?s)rows\.jsonl:2: not JSON.*:3: a text without a prompt.*:4: .*empty"):
        read_eval_rows(path, RowSettings())
    path.write_text("\n")
    with pytest.raises(DataFileError, match="no rows"):
        read_eval_rows(path, RowSettings())


def test_a_sample_is_the_same_rows_every_time(rows_file: Path) -> None:
    def lines(**options: Any) -> list[int]:
        return [row.line for row in read_eval_rows(rows_file, RowSettings(**options))]

    assert lines(sample=3) == lines(sample=3) == sorted(lines(sample=3))
    assert len(lines(sample=3)) == 3
    assert len({tuple(lines(sample=3, seed=seed)) for seed in range(9)}) > 1
    assert (lines(limit=2), lines(sample=99)) == ([1, 2], [1, 2, 3, 4, 5])


def test_the_work_file_is_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / WORK_FILE
    with WorkFile(path) as work:
        work.put("a", {"b": [1, None]})
        with pytest.raises(DataFileError, match="another process is writing it"):
            WorkFile(path)
    with WorkFile(path) as work:
        assert (work.get("a"), work.get("b")) == ({"b": [1, None]}, None)
    assert [each.name for each in tmp_path.iterdir()] == [WORK_FILE]
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    before = foreign.read_bytes()
    (tmp_path / "text.sqlite").write_text("no database at all, but text" * 100)
    for name in ("foreign.sqlite", "text.sqlite"):
        with pytest.raises(DataFileError, match=f"{name}: "):
            WorkFile(tmp_path / name)
    assert foreign.read_bytes() == before
