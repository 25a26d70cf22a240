"""The report of a batch: one HTML page that needs nothing else, with figures and two histograms for each adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgelora.batch_figures import BatchSummary, Distribution, Figures, round_edges
from edgelora.errors import DataFileError
from edgelora.quantities import duration
from edgelora.report_page import render_page
from edgelora.whole_file import whole_file

WIDTH, HEIGHT, FLOOR, TOP = (
    460,
    150,
    128,
    24,
)  # of a histogram, in its own units: whole, baseline, the highest bar's top
N_TICKS = 5


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    says: str


@dataclass(frozen=True)
class Mark:
    """A label at a place of the axis, or at its side where it would not fit."""

    x: float
    label: str
    anchor: str


@dataclass(frozen=True)
class Chart:
    """A histogram, ready to be drawn."""

    caption: str
    bars: list[Bar]
    ticks: list[Mark]
    median: Mark
    width: int = WIDTH
    height: int = HEIGHT
    floor: int = FLOOR


@dataclass(frozen=True)
class AdapterCharts:
    name: str
    says: str
    latency: Chart
    length: Chart


def check_report(path: Path | None, *used: Path) -> None:
    """Before the work: whether a report can be written there, and is not one of the files that are `used`.

    Raises:
        DataFileError: it cannot, or is.
    """
    if path is not None and path.resolve() in [other.resolve() for other in used]:
        raise DataFileError(f"{path}: is a file of rows too", hint="Name another page with --report.")
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        problem = "it is a folder" if path.is_dir() else f"there is no folder {path.resolve().parent}"
        raise DataFileError(f"{path}: cannot be written ({problem})", hint="Name another page with --report.")


def write_report(path: Path, summary: BatchSummary, *, title: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        DataFileError: it cannot be written.
    """
    page = render_report(summary, title=title, when=datetime.now().astimezone())
    try:
        with whole_file(path) as file:
            file.write(page.encode("utf-8", "replace"))  # replies may hold half characters
    except OSError as error:
        raise DataFileError(f"{path}: cannot be written ({error.strerror})") from None


def render_report(summary: BatchSummary, *, title: str, when: datetime) -> str:
    """The page as text."""
    return render_page(
        "edgelora",
        "batch_report.html",
        title=title,
        when=f"{when:%Y-%m-%d %H:%M %Z}",
        tiles=_tiles(summary),
        table=_table(summary),
        adapters=_charts(summary),
    )


def _tiles(summary: BatchSummary) -> list[tuple[str, str, bool]]:
    """Value, label, and whether it is bad news."""
    before = f", {summary.resumed:,} done before" if summary.resumed else ""
    rows_per_second = summary.written / summary.seconds if summary.seconds else 0.0
    return [
        (f"{summary.written:,}", f"rows of {summary.rows:,}{before}", False),
        (f"{summary.errors:,}", "errors", summary.errors > 0),
        (f"{summary.per_second(summary.completion_tokens):,.1f}", "tokens/s", False),
        (f"{rows_per_second:,.1f}", "rows/s", False),
        (duration(summary.seconds), "in all", False),
    ]


def _table(summary: BatchSummary) -> list[list[str]]:
    """The summary's table, with what only the page has room for."""
    header, *lines = summary.table()
    more = [_spread(figures) for _, figures in sorted(summary.by_adapter.items())]
    more += [[""] * 3] * (len(lines) - len(more))
    return [
        [*header, "latency p50", "p95", "length p50"],
        *([*line, *rest] for line, rest in zip(lines, more, strict=True)),
    ]


def _spread(figures: Figures) -> list[str]:
    if not figures.lengths.count:
        return ["", "", ""]
    latency = [_seconds(figures.latency.percentile(percent)) for percent in (50, 95)]
    return [*latency, f"{figures.lengths.percentile(50):,.0f}"]


def _charts(summary: BatchSummary) -> list[AdapterCharts]:
    """A pair for each adapter that answered, on axes that all share: they are there to be compared."""
    answered = {name: figures for name, figures in sorted(summary.by_adapter.items()) if figures.lengths.count}
    if not answered:
        return []
    shown = _seconds_up_to(max(figures.latency.most for figures in answered.values()))
    times = round_edges(max(figures.latency.most for figures in answered.values()))
    lengths = round_edges(max(figures.lengths.most for figures in answered.values()), least_step=1.0)
    return [
        AdapterCharts(
            name,
            f"{figures.rows - figures.errors:,} answered"
            + (f", {_counted(figures.errors, 'error')}" if figures.errors else ""),
            histogram("Seconds for a reply", figures.latency, times, shown),
            histogram("Tokens of a reply", figures.lengths, lengths, lambda value: f"{value:,.0f}"),
        )
        for name, figures in answered.items()
    ]


def histogram(caption: str, values: Distribution, edges: list[float], shown: Callable[[float], str]) -> Chart:
    """Bars of how many values are between neighbouring `edges`."""
    counts, end = values.bins(edges), edges[-1]
    highest, width = max([*counts, 1]), WIDTH / len(counts)
    caption = f"{caption}; the highest bar is {_counted(highest, 'row')}"
    bars = []
    for place, count in enumerate(counts):
        height = max(1.0, count / highest * (FLOOR - TOP))
        says = f"{shown(edges[place])} to {shown(edges[place + 1])}: {_counted(count, 'row')}"
        if count:
            bars.append(
                Bar(round(place * width + 0.75, 2), round(FLOOR - height, 2), round(width - 1.5, 2), height, says)
            )
    step = max(1, round(len(counts) / N_TICKS))
    ticks = [_mark(edge / end, shown(edge)) for edge in edges[::step]]
    median = values.percentile(50)
    return Chart(caption, bars, ticks, _mark(median / end, f"median {shown(median)}", at_side=True))


def _mark(share: float, label: str, *, at_side: bool = False) -> Mark:
    if at_side:
        anchor = "end" if share > 0.6 else "start"
    else:
        anchor = "start" if share < 0.03 else "end" if share > 0.97 else "middle"
    return Mark(round(share * WIDTH, 2), label, anchor)


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"


def _seconds_up_to(most: float) -> Callable[[float], str]:
    """One unit for a whole axis."""
    return (lambda value: f"{value:.3g} s") if most >= 1 else (lambda value: f"{value * 1000:.3g} ms")
