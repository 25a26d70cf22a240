"""Curves over the steps of a run, as coordinates for an SVG (stdlib only)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24  # margins around the plot: room for labels
N_TICKS = 4
MAX_POINTS = 600  # of a curve: more than a screen shows; neighbours are averaged

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line of the chart: `path` has its points as SVG's `points` wants them; `dots` where there are few."""

    name: str
    kind: str
    path: str
    dots: Sequence[Point]
    says: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class LineChart:
    """Curves on shared axes, ready to be drawn; `level` is a horizontal line, such as what was planned."""

    caption: str
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    level: Tick | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    floor: int = HEIGHT - BOTTOM


def line_chart(
    caption: str,
    curves: Sequence[tuple[str, str, Sequence[Point]]],
    shown: Callable[[float], str],
    *,
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> LineChart | None:
    """A chart of what was measured; None where nothing was.

    Args:
        curves: name, kind (a CSS class) and (step, value) points of each; values that are no numbers are left out.
        shown: a value of the vertical axis as text.
        level: a label and a value of the vertical axis.
        from_zero: the vertical axis begins there.
    """
    kept = [(name, kind, [p for p in points if math.isfinite(p[1])]) for name, kind, points in curves]
    kept = [each for each in kept if each[2]]
    if not kept:
        return None
    steps = [x for _, _, points in kept for x, _ in points]
    values = [y for _, _, points in kept for _, y in points] + ([level[1]] if level else [])
    low, high = (0.0 if from_zero else min(values)), max(values)
    y_marks = round_marks(low, high if high > low else low + (abs(low) or 1.0))
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)
    x_marks = [x for x in round_marks(x_low, x_high) if x_low <= x <= x_high and x == round(x)]

    def x_at(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def y_at(value: float) -> float:
        share = (value - y_marks[0]) / (y_marks[-1] - y_marks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    drawn = []
    for name, kind, points in kept:
        places = [(x_at(x), y_at(y)) for x, y in thinned(points)]
        path = " ".join(f"{x},{y}" for x, y in places)
        (first, begin), (last, end) = points[0], points[-1]
        says = f"{name}: {shown(begin)} at step {first:g}, {shown(end)} at step {last:g}"
        drawn.append(Curve(name, kind, path, places if len(places) <= 30 else [], says))
    return LineChart(
        caption,
        drawn,
        [Tick(x_at(x), f"{x:,.0f}") for x in x_marks],
        [Tick(y_at(y), shown(y)) for y in y_marks],
        Tick(y_at(level[1]), level[0]) if level else None,
    )


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most `MAX_POINTS`, each the mean of its neighbours."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def round_marks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from just below `low` to just above `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / N_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= N_TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
