"""The page of a run: one HTML file that needs nothing else, light and dark, made from what lies in the run's folder.

It is made again after every session of a run, and of any finished folder with `write_report`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError
from edgelora.quantities import duration, size
from edgelora.report_page import render_page
from edgelora.train.folder import RunFolder, RunRecord
from edgelora.train.line_chart import LineChart, line_chart
from edgelora.train.run_facts import RunFacts
from edgelora.whole_file import write_whole

FILE = "report.html"
BARS, FLOOR, TOP = 460, 108, 8  # of the histogram: width, baseline and the highest bar's top
PARTS = ("weights", "gradients", "optimizer", "activations", "rest")
PHASES = ("training", "loading", "certificate")
NO_SAMPLES = "None: they are taken from the certificate, which this run has not recorded."


@dataclass(frozen=True)
class Bar:
    x: float
    y: float
    width: float
    height: float
    says: str


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all; finished or not, and as often as wanted.

    Raises:
        DataFileError: the folder holds no run of ours, or the page cannot be written.
        SettingsError: its run.json cannot be read.
    """
    path = folder / FILE
    page = render_report(folder)
    try:
        write_whole(path, page)
    except OSError as error:
        raise DataFileError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def render_report(folder: Path) -> str:
    """The page as text."""
    record, facts, lines = RunFolder(folder).load_record(), RunFacts.load(folder), read_metrics(folder)
    method = record.recipe.get("method") or "lora"
    return render_page(
        "edgelora.train",
        FILE,
        title=f"{folder.resolve().name}: {method} on {Path(record.base).name}",
        subtitle=_subtitle(record),
        tiles=list(_tiles(facts, lines)),
        notes=facts.notes,
        charts=[chart for chart in _charts(facts, lines) if chart],
        samples=facts.samples,
        no_samples=NO_SAMPLES,
        memory=list(_memory(facts, lines)),
        data=_data(facts),
        settings=[
            (name.replace("_", " "), _shown(value)) for name, value in record.recipe.items() if value is not None
        ],
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; one that a crash cut off is left out."""
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""  # a device may never end
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


def _shown(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else f"{value}"


def _subtitle(record: RunRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return f"edgelora train; base {record.base} in {record.dtype or 'its own type'}; {versions}"


def _tiles(facts: RunFacts, lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    report, done = facts.report, max((line["step"] for line in lines), default=0)
    losses, evals = _points(lines, "loss"), _points(lines, "eval_loss")
    yield f"{done:,}", f"steps of {facts.steps:,}"
    if losses:
        yield f"{losses[-1][1]:.3f}", f"loss, {losses[0][1]:.3f} at first"
    if evals:
        best = min(evals, key=lambda point: point[1])
        yield f"{evals[-1][1]:.3f}", f"eval loss, lowest {best[1]:.3f} at step {best[0]:,.0f}"
    speeds = [speed for _, speed in _points(lines, "tokens_per_second")]
    if speeds:
        yield f"{statistics.median(speeds):,.0f}", "tokens/s, median"
    if report:
        yield duration(report["seconds"]), "with loading and saving"
        share = report["trained_parameters"] / report["total_parameters"]
        yield f"{report['trained_parameters']:,}", f"parameters trained, {share:.2%} of all"


def _charts(facts: RunFacts, lines: Sequence[Mapping[str, Any]]) -> Iterator[LineChart | None]:
    loss = [("training", "train", _points(lines, "loss")), ("evaluation", "eval", _points(lines, "eval_loss"))]
    yield line_chart("Loss, nats a trained token", loss, lambda value: f"{value:.3g}")
    accuracy = [
        ("training", "train", _points(lines, "token_accuracy")),
        ("evaluation", "eval", _points(lines, "eval_token_accuracy")),
    ]
    yield line_chart("Share of trained tokens that are the likeliest", accuracy, lambda value: f"{value:.0%}")
    preferred = [
        ("training", "train", _points(lines, "preference_accuracy")),
        ("evaluation", "eval", _points(lines, "eval_preference_accuracy")),
    ]
    yield line_chart("Share of pairs whose chosen reply is preferred", preferred, lambda value: f"{value:.0%}")
    rate = [("learning rate", "rate", _points(lines, "learning_rate"))]
    yield line_chart("Learning rate", rate, lambda value: f"{value:.2g}", from_zero=True)
    speed = [("tokens/s", "speed", _points(lines, "tokens_per_second"))]
    caption = "Tokens a second; padding left out, saving counted in"
    yield line_chart(caption, speed, lambda value: f"{value:,.0f}" if value >= 10 else f"{value:.2g}", from_zero=True)
    memory = [
        ("highest so far", "memory", _points(lines, "peak_memory_bytes")),
        ("at the moment", "speed", _points(lines, "memory_bytes")),
    ]
    yield line_chart("Memory of the process", memory, size, from_zero=True)


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    values = ((line["step"], line.get(name)) for line in lines)
    return [(float(step), float(value)) for step, value in values if isinstance(value, (int, float))]


def _memory(facts: RunFacts, lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, bool]]:
    """Name, planned, taken, whether it is a sum."""
    plan, libraries = facts.plan, int(facts.plan.get("libraries", 0))
    peaks = _points(lines, "peak_memory_bytes")
    taken = size(max(value for _, value in peaks)) if peaks else ""
    for name in PARTS if plan else ():
        yield name, size(plan[name]), "", False
    if not plan:
        yield "the whole process, at its highest", "", taken, True
        return
    yield "libraries", size(libraries), "", False
    yield "the whole process, training", size(plan["training"] + libraries), taken, True
    for name in PHASES[1:]:
        if plan[name]:
            yield f"while {'loading' if name == 'loading' else 'certifying'}", size(plan[name] + libraries), "", False


def _data(facts: RunFacts) -> dict[str, Any]:
    highest = max((count for _, _, count in facts.lengths), default=1)
    width = BARS / max(1, len(facts.lengths))
    bars = []
    for place, (low, high, count) in enumerate(facts.lengths):
        height = max(1.0, count / highest * (FLOOR - TOP)) if count else 0.0
        says = f"{low} to {high - 1} tokens: {count:,} rows"
        bars.append(
            Bar(round(place * width + 1, 1), round(FLOOR - height, 1), round(width - 2, 1), round(height, 1), says)
        )
    return {
        "bars": [bar for bar in bars if bar.height],
        "highest": f"{highest:,} rows",
        "ends": [f"{facts.lengths[0][0]:,}", f"{facts.lengths[-1][1] - 1:,}"] if facts.lengths else ["", ""],
        "facts": [
            ("training sequences", f"{facts.rows:,}"),
            ("evaluation sequences", f"{facts.eval_rows:,}"),
            ("tokens", f"{facts.tokens:,}"),
            ("tokens that are trained", f"{facts.trained_tokens:,}"),
        ],
    }
