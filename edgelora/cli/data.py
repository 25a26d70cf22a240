"""`edgelora data`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from edgelora.cli.data_type import DataType
from edgelora.cli.screen import cell, print_columns
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from edgelora.dataset.check import DataCheck, FileSummary, Finding, ShownRow
    from edgelora.dataset.lengths import Bucket, Spread
    from edgelora.dataset.source import DataSource

BAR_WIDTH = 40
MAX_SHOWN = 6000
"""Characters of a row that are shown; `--json` has all."""
COLOURS = {"error": "red", "warning": "yellow", "note": None}
BRACKETS = ("\u27e6", "\u27e7")


@click.group("data")
def command() -> None:
    """Look at training data before a run does.

    \b
    Examples:
      edgelora data check support.jsonl
      edgelora data check support.jsonl general.csv@0.5 --base my-model/ --eval-data held-out.jsonl
    """


@command.command("check")
@click.argument("files", metavar="FILE...", type=DataType(), nargs=-1, required=True)
@click.option("--base", help="Count tokens as this base has them, and show a row as it sees it.")
@click.option("--eval-data", type=DataType(), help="Evaluation data: checked too, and for rows that are in both.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True,
              help="Tokens of a row that a run keeps (`edgelora train --max-length`).")  # fmt: skip
@click.option("--chat-template", metavar="NAME|FILE", help="Chat template to use instead of the base's own.")
@click.option(
    "--row", type=click.IntRange(min=1), metavar="LINE", help="Show this row of the first file.  [default: the first]"
)
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    files: tuple[DataSource, ...],
    base: str | None,
    eval_data: DataSource | None,
    max_length: int,
    chat_template: str | None,
    row: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Say what is in training data, and what is wrong with it.

    FILE is what `edgelora train` takes: JSONL, a JSON array, CSV, Parquet or plain text, or the id of a dataset on the
    Hugging Face hub. Rows are conversations (`messages`), ShareGPT's `conversations`, Alpaca's `instruction` and
    `output`, `prompt` and `completion`, preference pairs (`chosen` and `rejected`), or plain `text`.

    Every row is read, and none is kept: a file may be larger than memory. Exits with 1 where a run would refuse
    something.

    \b
    Examples:
      edgelora data check support.jsonl
      edgelora data check support.jsonl --base my-model/ --max-length 512 --eval-data held-out.jsonl
      edgelora data check support.jsonl --base my-model/ --row 17
    """
    from edgelora.dataset.check import check_data, example_at

    measure = None
    if base is None and (row is not None or chat_template is not None):
        raise click.UsageError("--row and --chat-template say how a base sees the data: give --base")
    if base is not None:
        from edgelora.train.token_check import TokenCheck

        measure = TokenCheck(base, chat_template, max_length)
    with _reading() as progress:
        found = check_data(files, (eval_data,) if eval_data else (), measure, progress)
    if measure and (row is not None or any(file.rows for file in found.files)):
        source = next(s for s, f in zip(files, found.files, strict=True) if row is not None or f.rows)
        shown = measure.shown(example_at(source, row))
        found = replace(found, template=measure.template_share(), shown=shown)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found, max_length if base else None)
    if not found.passes(strict=strict):
        raise click.exceptions.Exit(1)


@contextmanager
def _reading() -> Iterator[Callable[[str, int], None]]:
    """Says on a terminal's stderr which file is being read, and how far."""
    if not sys.stderr.isatty():
        yield lambda name, rows: None
        return
    from rich.console import Console

    with Console(stderr=True, markup=False, highlight=False).status("") as status:
        yield lambda name, rows: status.update(f"{cell(name)}: {rows:,} rows")


def _print(found: DataCheck, max_length: int | None) -> None:
    files = [_file_row(file, "") for file in found.files] + [_file_row(file, "evaluation") for file in found.eval_files]
    print_columns(files, right=(1,))
    print_columns([*_facts(found, max_length)])
    if found.histogram:
        click.echo()
        print_columns([*_bars(found.histogram, max_length)], right=(0, 2))
    if found.findings:
        click.echo()
    for finding in found.findings:
        _print_finding(finding)
    if found.shown:
        _print_row(found.shown)
    click.echo()
    click.secho(_verdict(found), fg="green" if found.passes() else "red")


def _file_row(file: FileSummary, side: str) -> list[str]:
    weight = "" if file.weight == 1 else f"each {file.weight:g} times"
    bad = f"{file.bad_rows:,} refused" if file.bad_rows else ""
    notes = ", ".join(filter(None, (side, weight, bad)))
    return [cell(file.name), f"{file.rows:,}", "row " if file.rows == 1 else "rows", file.format, notes]


def _facts(found: DataCheck, max_length: int | None) -> Iterator[list[str]]:
    if found.turns:
        roles = ", ".join(f"{count:,} {role}" for role, count in sorted(found.roles.items()))
        tools = f"; tools in {found.with_tools:,} rows" if found.with_tools else ""
        yield ["messages", f"{_range(found.turns, ' a row')}; {roles}{tools}"]
    if found.tokens:
        share = f"{found.trained_tokens / found.tokens.total:.0%} of them trained".replace("%", " %")
        yield ["tokens", f"{_range(found.tokens, ' a row')}; {found.tokens.total:,} in all, {share}"]
    if found.template:
        special = f": {' '.join(map(cell, found.template.special))}" if found.template.special else ""
        yield ["template", f"adds {_range(found.template.tokens, ' tokens a row')}{special}"]
    if max_length is not None and found.tokens and found.tokens.largest <= max_length:
        yield ["cut", f"none: all rows fit into --max-length {max_length}"]


def _range(spread: Spread, unit: str) -> str:
    if spread.smallest == spread.largest:
        return f"{spread.smallest:,}{unit}"
    return f"{spread.smallest:,} to {spread.largest:,}{unit} (median {spread.median:,}, 95 % up to {spread.p95:,})"


def _bars(buckets: Sequence[Bucket], max_length: int | None) -> Iterator[list[str]]:
    most = max(bucket.rows for bucket in buckets)
    for bucket in buckets:
        end = "more" if bucket.high is None else f"{bucket.high:,}"
        filled = -(-bucket.rows * BAR_WIDTH // most)
        is_cut = max_length is not None and bucket.low >= max_length
        yield [f"{bucket.low:,} to {end:>5}", "\u2588" * filled, f"{bucket.rows:,}", "cut" if is_cut else ""]


def _print_finding(finding: Finding) -> None:
    label = click.style(f"{finding.level:9}", fg=COLOURS[finding.level], dim=finding.level == "note")
    click.echo(f"{label}{cell(finding.text)}")
    if finding.count:
        more = ", ..." if finding.count > len(finding.examples) > 0 else ""
        places = f": {', '.join(map(cell, finding.examples))}{more}" if finding.examples else ""
        click.secho(f"{'':9}{finding.count:,}{places}", dim=True)


def _print_row(row: ShownRow) -> None:
    coloured = sys.stdout.isatty()
    opening, closing = ("", "") if coloured else BRACKETS
    marked = click.style("trained", fg="green") if coloured else f"{opening}trained{closing}"
    click.echo(f"\n{cell(row.source)} as the model sees it ({marked}):\n")
    left = MAX_SHOWN
    for text, trained in row.segments:
        shown, left = visible(text[:left]), left - len(text[:left])
        if coloured:
            click.secho(shown, nl=False, fg="green" if trained else None, dim=not trained)
        else:
            click.echo(f"{opening}{shown}{closing}" if trained else shown, nl=False)
        if not left:
            break
    hidden = sum(len(text) for text, _ in row.segments) - (MAX_SHOWN - left)
    notes = [f"[{hidden:,} more characters; --json has all]"] * bool(hidden) + ["[cut here]"] * row.is_cut
    click.echo("".join(f"\n{note}" for note in notes))


def _verdict(found: DataCheck) -> str:
    if not found.of("error"):
        return f"A run would take this data. Warnings: {len(found.of('warning'))}."
    from edgelora.dataset.formats import HINT

    is_known = any(file.format for file in (*found.files, *found.eval_files))
    return "A run would refuse this data." + ("" if is_known else f" {HINT}")
