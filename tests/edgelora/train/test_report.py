"""The page of a run: what it shows, that it needs nothing else, and that a stranger's text stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgelora.errors import DataFileError
from edgelora.train.folder import RunFolder, RunRecord
from edgelora.train.line_chart import HEIGHT, WIDTH, line_chart, round_marks, thinned
from edgelora.train.report import read_metrics, render_report, write_report
from edgelora.train.run_facts import RunFacts, Sample, length_bins

EVIL = "<script>alert(1)</script>&\"'"
PARTS = ("weights", "gradients", "optimizer", "activations", "rest", "training", "loading", "certificate", "libraries")


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        rows=40,
        eval_rows=4,
        tokens=4000,
        trained_tokens=1200,
        lengths=length_bins([50, 60, 200]),
        steps=20,
        plan={name: 10_000_000 * (1 + place) for place, name in enumerate(PARTS)},
        notes=(f"training data: 3 rows {EVIL}",),
        samples=(Sample(f"user: {EVIL}", "I do not know.", f"It is red. {EVIL}"),),
    )


@pytest.fixture
def folder(tmp_path: Path, facts: RunFacts) -> Path:
    run = RunFolder(tmp_path / f"run {EVIL}".replace("/", "-"))
    run.path.mkdir()
    record = RunRecord({"method": "lora", "chat_template": EVIL, "liger": False}, f"/models/{EVIL}", "f", "d")
    run.begin(record)
    for step in range(1, 21):
        line = {"step": step, "loss": 2 / step, "learning_rate": 1e-3, "tokens_per_second": 100.0 + step}
        run.log_metrics({**line, "memory_bytes": 8e7, "peak_memory_bytes": 1.5e8})
    run.log_metrics({"step": 20, "eval_loss": 0.25})
    facts.save(run.path)
    return run.path


def test_is_one_file_that_needs_nothing_else_and_runs_nothing(folder: Path) -> None:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "base", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "onload", "onclick"} & set(attributes)
    assert "url(" not in page.text
    assert "prefers-color-scheme: dark" in page.text


def test_text_of_data_recipe_and_folder_stays_text(folder: Path) -> None:
    source = render_report(folder)
    assert "<script" not in source
    page = Page(source)
    assert page.text.count("<script>alert(1)</script>") >= 4  # prompt, reply, note, template


def test_shows_curves_samples_data_and_the_plan_beside_what_happened(folder: Path) -> None:
    page = Page(render_report(folder))
    labels = [attributes["aria-label"] or "" for attributes in page.named("svg")]
    assert any(
        "training: 2 at step 1, 0.1 at step 20" in label and "evaluation: 0.25 at step 20" in label for label in labels
    )
    for caption in ("Learning rate", "Tokens a second", "Memory of the process", "Histogram"):
        assert any(caption in label for label in labels), caption
    for text in ("I do not know.", "It is red.", "1,200", "150 MB", "20 MB"):
        assert text in page.text, text


def test_a_run_that_only_began_has_a_page_too(folder: Path, facts: RunFacts) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo', encoding="utf-8")
    replace(facts, plan={}, samples=(), eval_rows=0).save(folder)
    page = Page(render_report(folder))
    assert "steps of 20" in page.text
    assert "None: they are taken from the certificate" in page.text
    (folder / "metrics.jsonl").unlink()
    assert "Nothing was logged." in Page(render_report(folder)).text


def test_what_is_no_run_is_refused_and_leaves_no_page(folder: Path) -> None:
    (folder / "report.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataFileError, match=r"report\.json: cannot be read"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_facts_come_back_as_they_were(folder: Path, facts: RunFacts) -> None:
    found = RunFacts.load(folder)
    assert json.loads(json.dumps(facts.plan)) == found.plan
    assert (found.samples, found.notes, found.rows) == (facts.samples, list(facts.notes), 40)


def test_metrics_without_a_step_or_cut_off_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"loss": 1}\n{"step"', encoding="utf-8")
    assert read_metrics(tmp_path) == [{"step": 1}]


class TestALineChart:
    def test_lies_inside_its_frame_and_begins_and_ends_at_its_sides(self) -> None:
        chart = line_chart("c", [("a", "train", [(1, 5.0), (2, 3.0), (11, -1.0)])], lambda value: f"{value:g}")
        assert chart is not None
        points = [tuple(map(float, point.split(","))) for point in chart.curves[0].path.split()]
        assert points[0][0] == chart.left
        assert points[-1][0] == chart.right
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
        assert [y for _, y in points] == sorted(y for _, y in points)  # it falls: larger y is lower

    def test_leaves_out_what_is_no_number_and_draws_nothing_of_nothing(self) -> None:
        assert line_chart("c", [("a", "train", [(1, float("nan"))]), ("b", "eval", [])], str) is None

    def test_one_point_and_equal_values_can_be_drawn(self) -> None:
        for points in ([(3, 0.0)], [(1, 7.0), (2, 7.0)]):
            chart = line_chart("c", [("a", "train", points)], str)
            assert chart is not None
            assert chart.y_ticks[0].at > chart.y_ticks[-1].at

    def test_long_runs_are_thinned_to_means(self) -> None:
        points = [(float(step), float(step % 2)) for step in range(6000)]
        assert len(thinned(points)) == 600
        assert {value for _, value in thinned(points)} == {0.5}

    @pytest.mark.parametrize(("low", "high"), [(0, 7.9), (1e-9, 3e-9), (-4, 1200), (0.98, 1.0)])
    def test_marks_are_round_and_enclose(self, low: float, high: float) -> None:
        marks = round_marks(low, high)
        assert marks[0] <= low < high <= marks[-1]
        assert 2 <= len(marks) <= 7


def test_lengths_are_counted_once_each() -> None:
    bins = length_bins([3, 3, 9, 200])
    assert sum(count for _, _, count in bins) == 4
    assert (bins[0][0], bins[-1][1] > 200) == (3, True)
    assert length_bins([5]) == [(5, 6, 1)]


@pytest.mark.train
def test_a_real_run_writes_its_page_with_the_answers_of_its_certificate(base: Path, data: Path, tmp_path: Path) -> None:
    from edgelora.train import Recipe, train

    out = tmp_path / "run"
    settings = Recipe(rank=2, alpha=4, max_steps=2, batch_size=2, logging_steps=1, certificate_probes=2)
    train(data, str(base), out, settings)
    facts, lines = RunFacts.load(out), read_metrics(out)
    assert len(facts.samples) == 2
    assert "What colour is lamp" in facts.samples[0].prompt
    assert facts.report["steps"] == facts.steps == 2
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1e8 for line in lines)
    written = (out / "report.html").read_text(encoding="utf-8")
    assert f"{facts.trained_tokens:,}" in written
    shutil.rmtree(out / "checkpoints")
    assert render_report(out) == written  # from what lies in the folder, again
