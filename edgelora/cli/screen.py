"""How `show`, `list`, `add` and `remove` print: labels and values in columns, sizes and paths as people read them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from edgelora.cli.visible import visible

LABEL_WIDTH = 14
Row = tuple[str, str]


def print_card(title: str, kind: str, rows: Iterable[Row]) -> None:
    """A title line, then a line for each row; on a terminal long values are wrapped, in a pipe each stays a line."""
    click.echo(f"{click.style(_line(title), bold=True)}  {click.style(kind, dim=True)}\n")
    for label, value in rows:
        if value:
            click.echo(f"  {click.style(f'{label:{LABEL_WIDTH}}', dim=True)}{_wrapped(value)}")


def _wrapped(value: str) -> str:
    """`value` under the column of values; its own lines stay lines."""
    indent = " " * (LABEL_WIDTH + 2)
    width = shutil.get_terminal_size((100, 24)).columns - len(indent) if sys.stdout.isatty() else 10_000
    lines = [
        piece
        for line in visible(value).splitlines()
        for piece in textwrap.wrap(line, max(40, width), break_long_words=False, break_on_hyphens=False) or [""]
    ]
    return f"\n{indent}".join(lines)


def print_columns(
    rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), widths: Sequence[int] = (), err: bool = False
) -> None:
    """Rows of cells under one another, indented; columns of the numbers in `right` are flush right."""
    for row in rows:
        cells = [
            f"{cell:>{width}}" if column in right else f"{cell:{width}}"
            for column, (cell, width) in enumerate(zip(row, widths or column_widths(rows), strict=True))
        ]
        click.echo("  " + "  ".join(cells).rstrip(), err=err)


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def print_notices(notices: Iterable[str]) -> None:
    for notice in notices:
        click.secho(f"  {_line(notice)}", err=True, fg="yellow")


@contextmanager
def looking() -> Iterator[Callable[[Path], None] | None]:
    """Says on a terminal's stderr which file is being opened for the first time; silent otherwise."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    status = Console(stderr=True, markup=False, highlight=False).status("")

    def told(path: Path) -> None:
        status.update(f"looking at {_line(path.name)}")
        status.start()

    try:
        yield told
    finally:
        status.stop()


def _line(text: str) -> str:
    return visible(text).replace("\n", " ")


def cell(text: object) -> str:
    """Text from a file as one line of a table."""
    return _line(str(text))


def shown_path(path: Path) -> str:
    """Short where it can be: below the current folder, or below the home folder."""
    for folder, before in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_absolute() and path.is_relative_to(folder) and path != folder:
            return cell(before + str(path.relative_to(folder)))
    return cell(path)


def shown_size(size_bytes: int) -> str:
    """As sizes of files are given: 1 MB is a million bytes."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def shown_count(count: int) -> str:
    """2,836,736 is "2.8 million"; small ones stay exact."""
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
