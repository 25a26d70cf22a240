"""What a CI run insists on: `--min accuracy=0.9`, `--min support:f1=80%`, `--max perplexity=12`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edgelora.errors import SettingsError
from edgelora.evaluation.comparison import Measured
from edgelora.evaluation.variants import BARE, Variant

_THRESHOLD = re.compile(r"(?:(?P<variant>[^=]+):)?(?P<metric>[^=:]+)=(?P<number>[^=%]+)(?P<percent>%?)")


@dataclass(frozen=True)
class Threshold:
    """Attributes:
    variant: its name; empty for every adapter, or for the base where there is none.
    is_least: a metric below it fails; otherwise one above it.
    """

    metric: str
    value: float
    is_least: bool
    variant: str = ""

    @classmethod
    def parse(cls, text: str, *, is_least: bool) -> Threshold:
        """From `[VARIANT:]METRIC=VALUE`; a value may be per cent.

        Raises:
            SettingsError: it is of another form.
        """
        found, value = _THRESHOLD.fullmatch(text), math.nan
        if found:
            try:
                value = float(found["number"]) / (100 if found["percent"] else 1)
            except ValueError:
                found = None
        option = "--min" if is_least else "--max"
        if not found or not math.isfinite(value):
            raise SettingsError(
                f"{option} {text!r}: expected [ADAPTER:]METRIC=VALUE", hint=f"For example {option} accuracy=0.9."
            )
        name = found["metric"].strip()
        return cls(name.replace("_", "-"), value, is_least, (found["variant"] or "").strip())

    def bounds(self, metric: str) -> bool:
        """Whether it is for this metric: `my_own` and `my-own` are one name, as they are on the command line."""
        return metric.replace("_", "-").casefold() == self.metric.casefold()

    def __str__(self) -> str:
        who = f"{self.variant}:" if self.variant else ""
        return f"{'--min' if self.is_least else '--max'} {who}{self.metric}={self.value:g}"

    def concerns(self, variant: Variant, variants: Sequence[Variant]) -> bool:
        if self.variant:
            return variant.name == self.variant
        return variant.adapter != BARE or all(each.adapter == BARE for each in variants)


def check_names(thresholds: Sequence[Threshold], metrics: Collection[str], variants: Sequence[Variant]) -> None:
    """Raises:
    SettingsError: metrics that are not measured, or unknown variants; all of them.
    """
    names = [variant.name for variant in variants]
    problems = [f"{each}: {each.metric} is not measured" for each in thresholds if not any(map(each.bounds, metrics))]
    problems += [f"{each}: no {each.variant!r} is evaluated" for each in thresholds if each.variant not in ("", *names)]
    if problems:
        raise SettingsError(
            "; ".join(problems), hint=f"Measured are {', '.join(metrics)}, of {', '.join(names)}; --metric adds others."
        )


def failures(
    thresholds: Sequence[Threshold],
    variants: Sequence[Variant],
    measured: Mapping[str, Mapping[str, Measured]],
) -> list[str]:
    """What is beyond a threshold, a sentence each.

    Args:
        measured: metric's name to variant's name to what was measured.
    """
    said = []
    for each in thresholds:
        for variant in variants:
            if not each.concerns(variant, variants):
                continue
            by_variant = next((found for name, found in measured.items() if each.bounds(name)), {})
            found = by_variant.get(variant.name)
            if found is None:
                said.append(f"{variant.name}: {each.metric} has no value, and {each} asks for one")
                continue
            value = found.interval.value
            # A value that is no number fails either way.
            if not (value >= each.value if each.is_least else value <= each.value):
                shown, limit = found.metric.shown(value), found.metric.shown(each.value)
                bound = "at least" if each.is_least else "at most"
                said.append(f"{variant.name}: {found.metric.name} is {shown}, expected {bound} {limit}")
    return said
