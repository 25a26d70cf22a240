"""The page: it shows what was found, needs nothing from elsewhere, and nothing in it becomes markup."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgelora.evaluation.answers import Answer
from edgelora.evaluation.comparison import measure
from edgelora.evaluation.evaluate import EvalSettings, Evaluation
from edgelora.evaluation.labels import Confusion, Labels
from edgelora.evaluation.metrics import make_metrics
from edgelora.evaluation.report import MAX_ROWS, marked, render_report
from edgelora.evaluation.rows import EvalRow
from edgelora.evaluation.variants import variants_of
from edgelora.messages import user_message

WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOSTILE = '<script>alert("x")</script>&amp;'
CHROMIUM = shutil.which("chromium")


def evaluation(replies: dict[str, list[str]], reference: str = "yes", question: str = "Is it?") -> Evaluation:
    """Of an adapter beside the base, by exact match and the label said."""
    n_rows = len(replies["base"])
    rows = [
        EvalRow(n, (user_message(f"{question} {n}"),), reference if n % 2 else "no", (), {})
        for n in range(1, n_rows + 1)
    ]
    adapters = [name for name in replies if name != "base"]
    variants, metrics = variants_of(Path("model-q8_0.gguf"), adapters), make_metrics(["exact-match", "accuracy"], rows)
    answers = {name: [Answer(text, "stop") for text in texts] for name, texts in replies.items()}
    sums = {metric.name: {name: metric.sums(given, rows) for name, given in answers.items()} for metric in metrics}
    measured = measure(metrics, variants, sums, resamples=100)
    labels = Labels([row.reference for row in rows])
    confusions = {
        name: Confusion.of(labels, [(row.reference, text) for row, text in zip(rows, texts, strict=True)])
        for name, texts in replies.items()
    }
    fields = {name: {"items.*.n": 0.25, "name": 1.0, HOSTILE: 0.5} for name in replies}
    failures = [f"red: exact-match is 50.0 %, expected at least 60.0 % {HOSTILE}"]
    return Evaluation(f"rows/{HOSTILE}.jsonl", rows, variants, metrics, answers, measured, confusions, fields, failures,
                      EvalSettings(), 1.0, 0)  # fmt: skip


class Page(HTMLParser):
    """The page's text, its tags, and every attribute that could load or run something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.loads, self.tags = "", list[str](), list[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        watched = ("src", "href", "srcset", "data", "xlink:href", "action")
        self.loads += [name for name, _ in attrs if name in watched or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_page_shows_what_changed_and_needs_nothing_else() -> None:
    source = render_report(evaluation({"base": ["no", "no", "ja"], "red": ["yes", "nein", "no"]}), WHEN)
    page = Page(source)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", source)
    for text in ("2026-03-01 12:00 UTC", "red beside base", "By exact-match: 1 better, 1 worse, 1 same", "1 reworded",
                 "items.*.n", "25.0 %", "macro F1", "(no label)", "model-q8_0.gguf", "33.3 %"):  # fmt: skip
        assert text in page.text
    assert "prefers-color-scheme: dark" in source


def test_nothing_becomes_markup() -> None:
    found = evaluation({"base": [HOSTILE] * 4, HOSTILE: ["yes"] * 4}, question=HOSTILE)
    page = Page(render_report(found, WHEN))
    assert "script" not in page.tags
    assert page.text.count("alert") >= 4


def test_many_rows_are_cut_and_counted() -> None:
    n_rows = 4 * MAX_ROWS
    page = Page(render_report(evaluation({"base": ["?"] * n_rows, "red": ["yes"] * n_rows}), WHEN))
    assert page.tags.count("article") == 2 * MAX_ROWS  # half of them better, half reworded
    assert f"Shown are {2 * MAX_ROWS} of {n_rows} rows that changed" in page.text


def test_a_page_without_changes_says_so() -> None:
    page = Page(render_report(evaluation({"base": ["yes"], "red": ["yes"]}), WHEN))
    assert "No row changed." in page.text
    assert "article" not in page.tags


def test_likelihoods_alone_are_shown_without_replies() -> None:
    found = evaluation({"base": ["no"] * 2, "red": ["yes"] * 2})
    silent = {name: [replace(answer, reply=None) for answer in answers] for name, answers in found.answers.items()}
    page = Page(render_report(replace(found, answers=silent), WHEN))
    assert "article" in page.tags
    assert "no reply" not in page.text
    empty = {**found.answers, "red": [Answer("", "stop")] * 2}
    assert "no reply" in Page(render_report(replace(found, answers=empty), WHEN)).text


def test_differences_are_marked_word_by_word() -> None:
    before, after = marked("The lamp is made in Norway.", "The lamp is made in Sweden, I think.")
    assert [(span.text, span.is_changed) for span in before] == [
        ("The lamp is made in ", False), ("Norway", True), (".", False),
    ]  # fmt: skip
    assert "".join(span.text for span in after) == "The lamp is made in Sweden, I think."
    assert [span.text for span in after if span.is_changed] == ["Sweden, I think"]
    assert not any(span.is_changed for side in marked("one two three", "four five six") for span in side)
    assert [span.text for span in marked("", "")[0]] == [""]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None or find_spec("playwright") is None:
        pytest.skip("needs playwright and Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_the_page_fits_its_window_and_filters(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    found = evaluation({"base": ["no", "no", "ja " * 300], "red": ["yes", "nein", "no" + "x" * 500]})
    path.write_text(render_report(found, WHEN))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    rows = page.locator("article")
    assert rows.count() == 3
    page.get_by_text("1 worse", exact=True).click()
    assert [row.is_visible() for row in rows.all()] == [True, False, False]
    page.get_by_text("all 3", exact=True).click()
    assert all(row.is_visible() for row in rows.all())
    assert problems == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python brings axe-core")
    from axe_playwright_python.sync_playwright import Axe

    path = tmp_path / "report.html"
    path.write_text(
        render_report(evaluation({"base": ["no", "no", "ja nein"], "red": ["yes", "nein", "ja doch"]}), WHEN)
    )
    page = browser.new_page(color_scheme=scheme)
    page.goto(path.as_uri())
    found = Axe().run(page).response["violations"]
    page.close()
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
