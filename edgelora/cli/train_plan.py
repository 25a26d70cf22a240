"""`edgelora train --plan`: what a run would take, as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from edgelora.quantities import duration, size

if TYPE_CHECKING:
    from edgelora.dataset import DataSource
    from edgelora.train.plan import Plan
    from edgelora.train.progress import TrainStatus
    from edgelora.train.recipe import Recipe


class _OnStderr:
    def note(self, text: str) -> None:
        click.secho(text, err=True, dim=True)

    def update(self, status: TrainStatus) -> None:
        pass


def show_plan(
    data: Sequence[DataSource], base: str, recipe: Recipe, eval_data: DataSource | None, *, as_json: bool
) -> None:
    """Print the plan; end with 1 where the run does not fit."""
    from edgelora.train.plan import plan

    found = plan(data, base, recipe, eval_data=eval_data, progress=_OnStderr())
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(lines(found)))
    if not found.fits:
        click.get_current_context().exit(1)


def lines(plan: Plan) -> Iterator[str]:
    """A screen of it."""
    memory = plan.memory
    counts = f"{memory.trained:,} of {memory.total:,} parameters ({memory.trained / memory.total:.2%})"
    yield f"{plan.method} on {plan.base} ({plan.device}): {counts}"
    yield f"{plan.rows:,} rows, the longest of {plan.longest:,} tokens; {plan.steps:,} steps"
    yield ""
    for name, value in plan.memory_lines():
        yield f"  {name:<24}{size(value):>10}"
    low, high = memory.full_tuning
    yield f"  (full fine-tuning in mixed precision, 16 to 20 bytes a parameter: {size(low)} to {size(high)})"
    yield ""
    if plan.measured is not None:
        yield f"  measured in {plan.measured.steps} steps on the longest rows: {size(plan.measured.peak)}"
        speed = f"{plan.measured.seconds_per_step:.3g} s a step, {plan.measured.tokens_per_second:,.0f} tokens/s"
        yield f"  {speed}: about {duration(plan.seconds or 0.0)} in all"
    beside = f" beside {size(plan.libraries)} of libraries that are loaded now" if plan.libraries else ""
    verdict = "fits" if plan.fits else "does not fit"
    yield f"  {verdict}: {size(plan.peak)}{beside}; {size(plan.free)} are free"
    if plan.changes:
        yield "  what to change, in this order:"
    for change in plan.changes:
        yield f"    {change.options:<44}{'-' + size(change.saves):>10}   {change.costs}"
    if not plan.fits and plan.changes and plan.memory.needed - sum(each.saves for each in plan.changes) > plan.free:
        yield "  even so it does not fit: take a smaller base, or a machine with more memory"
