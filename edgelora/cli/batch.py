"""`edgelora batch`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import (
    FILE,
    adapter_option,
    base_option,
    config_option,
    engine_options,
    sampling_of,
    sampling_options,
    template_option,
)
from edgelora.cli.progress import CountProgress, count_bar

if TYPE_CHECKING:
    from edgelora.batch import BatchSummary


@click.command("batch")
@click.argument("input", type=FILE)
@click.option("-o", "--out", type=FILE, default="-", show_default="stdout", help="JSONL file to append to.")
@adapter_option
@base_option
@click.option("--system", help="System prompt for rows without one, instead of the adapter's own.")
@click.option("--retry-errors", is_flag=True, help="Do rows again that ended in an error.")
@click.option(
    "--redo",
    is_flag=True,
    help="Do rows of OUT again that were edited or that another base, adapter or setting answered.",
)
@click.option("--strict", is_flag=True, help="End with exit code 1 if a row ended in an error.")
@template_option
@sampling_options
@engine_options
@config_option
def command(
    input: Path,
    out: Path,
    adapters: tuple[AdapterRef, ...],
    base: Path | None,
    system: str | None,
    retry_errors: bool,
    redo: bool,
    strict: bool,
    **options: Any,
) -> None:
    """Answer every row of a JSONL or CSV file.

    A row has `prompt` or `messages`, and may have `id`, `adapter` (a name, or a path; the first --adapter answers rows
    that name none), `system` and sampling settings. A row that cannot be answered becomes an error row. Run it again
    after a stop or a kill: it does what is missing, and nothing twice. `-` reads JSONL from stdin.

    \b
    Examples:
      edgelora batch rows.jsonl -o replies.jsonl --adapter support.gguf
      edgelora batch rows.jsonl -o replies.jsonl --adapter support.gguf --adapter extract.gguf --temperature 0
    """
    from edgelora.batch import Defaults, run_batch
    from edgelora.cli.loading import open_engine

    sampling = sampling_of(options)
    with open_engine(adapters, base, **options) as engine:
        defaults = Defaults(adapters[0].name if adapters else None, system, sampling)
        with count_bar("Answering", "rows") as bar:
            arguments: dict[str, Any] = {"defaults": defaults, "redo": redo, "retry_errors": retry_errors}
            summary = run_batch(engine, input, out, on_row=_Drawn(bar), **arguments)
    _print(summary, out)
    if strict and summary.all_errors:
        click.get_current_context().exit(1)


class _Drawn:
    """Draws the batch on stderr."""

    def __init__(self, bar: CountProgress) -> None:
        self._bar, self._errors = bar, 0

    def __call__(self, row: Mapping[str, Any], done: int, total: int) -> None:
        self._errors += "error" in row
        self._bar.update(done, total, f"{self._errors} errors" if self._errors else "")


def _print(summary: BatchSummary, out: Path) -> None:
    resumed = f", {summary.resumed} done before" if summary.resumed else ""
    rate = f", {summary.completion_tokens / summary.seconds:.1f} tokens/s" if summary.completion_tokens else ""
    click.echo(f"{out}: {summary.written} rows written in {summary.seconds:.1f} s{rate}{resumed}", err=True)
    for adapter, rows in sorted(summary.by_adapter.items()):
        click.echo(f"  {adapter}: {rows} rows", err=True)
    if summary.all_errors:
        where = f"grep '\"error\"' {out}" if str(out) != "-" else "look for the rows with `error`"
        click.secho(f"  {summary.all_errors} rows ended in an error: {where}", err=True, fg="yellow")
