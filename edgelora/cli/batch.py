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
from edgelora.cli.screen import cell, print_columns

if TYPE_CHECKING:
    from edgelora.batch import BatchSummary, Progress


@click.command("batch")
@click.argument("input", type=FILE)
@click.option("-o", "--out", type=FILE, default="-", show_default="stdout", help="JSONL file to append to.")
@adapter_option
@base_option
@click.option("--system", help="System prompt for rows without one, instead of the adapter's own.")
@click.option("--prompt", metavar="TEMPLATE", help="Make each row's prompt of its columns: 'Classify: {text}'.")
@click.option("--limit", type=click.IntRange(min=1), help="Answer the first so many rows.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help="Answer so many rows, drawn at random: the same ones in every run with the same --seed.",
)
@click.option("--ordered", is_flag=True, help="Write in the order of INPUT, and not as rows are done.")
@click.option("--retry-errors", is_flag=True, help="Do rows again that ended in an error.")
@click.option(
    "--redo",
    is_flag=True,
    help="Do rows of OUT again that were edited or that another base, adapter or setting answered.",
)
@click.option("--strict", is_flag=True, help="End with exit code 1 if a row ended in an error.")
@click.option("--report", type=FILE, help="Write an HTML page with figures and charts of this run.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    help="Rows that are answered at the same time.  [default: OUT's, else at most 8, as memory allows]",
)
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
    prompt: str | None,
    limit: int | None,
    sample: int | None,
    ordered: bool,
    retry_errors: bool,
    redo: bool,
    strict: bool,
    report: Path | None,
    parallel: int | None,
    **options: Any,
) -> None:
    """Answer every row of a JSONL, CSV or Parquet file.

    A row has `prompt` or `messages`, and may have `id`, `adapter` (a name, or a path; the first --adapter answers rows
    that name none), `system` and sampling settings; or it is a request of OpenAI's batch format, whose `model` names
    the adapter. A row that cannot be answered becomes an error row. Run it again after a stop or a kill: it does what
    is missing, and nothing twice. `-` reads JSONL from stdin.

    \b
    Examples:
      edgelora batch rows.jsonl -o replies.jsonl --adapter support.gguf
      edgelora batch rows.jsonl -o replies.jsonl --adapter support.gguf --adapter extract.gguf --temperature 0
      edgelora batch reviews.csv -o labels.jsonl --base base.gguf --prompt 'Good or bad? {review}' --sample 100
    """
    from edgelora.batch import BatchOptions, Defaults, Selection, run_batch
    from edgelora.batch_report import check_report, write_report
    from edgelora.cli.loading import open_engine
    from edgelora.results import parallel_of

    sampling = sampling_of(options)
    check_report(report, input, out)
    parallel = parallel or parallel_of(out)
    with open_engine(adapters, base, parallel=parallel, reproducible=True, **options) as engine:
        defaults = Defaults(adapters[0].name if adapters else None, system, sampling, prompt)
        selection = Selection(limit, sample, sampling.get("seed", 0))
        with count_bar("Answering", "rows") as bar:
            how = BatchOptions(ordered, selection, redo, retry_errors)
            summary = run_batch(engine, input, out, defaults=defaults, options=how, on_row=_Drawn(bar))
    _print(summary, out)
    if report:
        write_report(report, summary, title=f"{input} to {out}")
    if strict and summary.all_errors:
        click.get_current_context().exit(1)


class _Drawn:
    """Draws the batch on stderr."""

    def __init__(self, bar: CountProgress) -> None:
        self._bar = bar

    def __call__(self, row: Mapping[str, Any], progress: Progress) -> None:
        errors = f"{progress.errors} errors  " if progress.errors else ""
        self._bar.update(progress.done, progress.total, f"{errors}{progress.tokens_per_second:.0f} tokens/s")


def _print(summary: BatchSummary, out: Path) -> None:
    resumed = f", {summary.resumed} done before" if summary.resumed else ""
    rate = f", {summary.per_second(summary.completion_tokens):.1f} tokens/s" if summary.completion_tokens else ""
    click.echo(f"{out}: {summary.written} rows written in {summary.seconds:.1f} s{rate}{resumed}", err=True)
    if summary.written:
        print_columns([list(map(cell, line)) for line in summary.table()], right=range(1, 6), err=True)
    if summary.all_errors:
        where = f"grep '\"error\": [^n]' {out}" if str(out) != "-" else "look for the rows with `error`"
        click.secho(f"  {summary.all_errors} rows ended in an error: {where}", err=True, fg="yellow")
