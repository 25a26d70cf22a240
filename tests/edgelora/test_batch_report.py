"""Figures, the summary's table, and the page: it shows what was counted, and needs nothing from elsewhere."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgelora.batch_figures import BatchSummary, Distribution, Figures, round_edges
from edgelora.batch_report import check_report, histogram, render_report, write_report
from edgelora.errors import DataFileError

WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def distribution(*values: float) -> Distribution:
    made = Distribution()
    for value in values:
        made.add(value)
    return made


def summary(**adapters: int) -> BatchSummary:
    """Each adapter with so many rows, of 1, 2, 3 ... tokens and tenths of a second, and an error."""
    by_adapter = {}
    for name, n in adapters.items():
        lengths, latency = distribution(*range(1, n + 1)), distribution(*(i / 10 for i in range(1, n + 1)))
        by_adapter[name] = Figures(n + 1, 1, 100 * n, n * (n + 1) // 2, latency, lengths)
    return BatchSummary(100, 7, 2, 10.0, by_adapter)


def test_a_distribution_has_percentiles_and_bins() -> None:
    made = distribution(*range(1, 101))
    assert [made.percentile(p) for p in (0, 50, 95, 100)] == [1, 50, 95, 100]
    assert made.bins([0, 10, 50, 100]) == [9, 40, 51]
    assert (Distribution().percentile(50), Distribution().most) == (0, 0)


def test_a_distribution_stays_small() -> None:
    made = distribution(*(i / 1000 for i in range(1, 100_000)))
    assert made.count == 99_999
    assert len(made._counts) < 5 * 900
    assert made.percentile(50) == pytest.approx(50, rel=0.01)


@pytest.mark.parametrize(
    ("most", "least_step", "step"),
    [(8.1, 0, 0.5), (256, 1, 20), (3, 1, 1), (0, 1, 1), (0.004, 0, 0.0002), (1, 0, 0.05)],
)
def test_edges_are_round_and_hold_everything(most: float, least_step: float, step: float) -> None:
    edges = round_edges(most, least_step)
    assert edges[1] == pytest.approx(step)
    assert edges[-1] > most or edges[-1] == pytest.approx(most)
    assert 2 <= len(edges) <= 26
    assert sum(distribution(most).bins(edges)) == 1


def test_the_table_adds_up() -> None:
    header, blue, red, both = summary(red=10, blue=20).table()
    assert header == ["adapter", "rows", "errors", "prompt tokens", "completion tokens", "tokens/s"]
    assert blue == ["blue", "21", "1", "2,000", "210", "21.0"]
    assert red == ["red", "11", "1", "1,000", "55", "5.5"]
    assert both == ["all", "32", "2", "3,000", "265", "26.5"]
    assert len(summary(red=10).table()) == 2


def test_bars_are_as_high_as_what_they_count() -> None:
    chart = histogram("Tokens", distribution(1, 1, 1, 1, 5, 5), [0, 2, 4, 6], str)
    low, high = chart.bars
    assert low.height == 2 * high.height
    assert (low.says, high.says) == ("0 to 2: 4 rows", "4 to 6: 2 rows")
    assert "the highest bar is 4 rows" in chart.caption
    assert low.y + low.height == pytest.approx(chart.floor)


class Page(HTMLParser):
    """The page's text, and every attribute that could load something."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.loads, self.tags = "", list[str](), list[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_the_page_shows_each_adapter_and_needs_nothing_else() -> None:
    source = render_report(summary(red=10, blue=200), title="in.jsonl to out.jsonl", when=WHEN)
    page = Page(source)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", source)
    assert page.tags.count("svg") == 4
    for text in ("in.jsonl to out.jsonl", "2026-03-01 12:00 UTC", "7 done before", "200 answered, 1 error", "20,100"):
        assert text in page.text
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize(
    ("n", "ticks"),
    [
        (20, ["0 s", "0.4 s", "0.8 s", "1.2 s", "1.6 s", "2 s"]),
        (5, ["0 ms", "100 ms", "200 ms", "300 ms", "400 ms", "500 ms"]),
    ],
)
def test_an_axis_has_one_unit(n: int, ticks: list[str]) -> None:
    source = render_report(summary(red=n), title="x", when=WHEN)
    assert re.findall(r">([\d.]+ m?s)</text>", source) == ticks


def test_a_name_cannot_become_markup() -> None:
    hostile = '<script>alert("x")</script>'
    page = Page(render_report(summary(**{hostile: 3}), title=hostile, when=WHEN))
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 3


@pytest.mark.parametrize("rows", [{}, {"red": 0}])
def test_a_run_without_answers_has_a_page_too(rows: dict[str, int]) -> None:
    page = Page(render_report(summary(**rows), title="x", when=WHEN))
    assert "No row was answered in this run." in page.text
    assert "svg" not in page.tags


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(DataFileError, match=r"report\.html: cannot be written \(No space left on device\)"):
            write_report(path, summary(red=3), title="x")
    assert (path.read_text(), [found.name for found in tmp_path.iterdir()]) == ("earlier", ["report.html"])
    write_report(path, summary(red=3), title="x \ud800")
    assert path.read_text().startswith("<!doctype html>")
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("path", ["missing/report.html", "."])
def test_a_page_that_cannot_be_written_is_told_before_the_work(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="cannot be written"):
        check_report(tmp_path / path)
    check_report(tmp_path / "report.html", tmp_path / "out.jsonl")
    with pytest.raises(DataFileError, match="is a file of rows too"):
        check_report(tmp_path / "x" / ".." / "out.jsonl", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    check_report(None)
