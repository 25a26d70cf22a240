"""`edgelora list`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from edgelora.cli.screen import (
    cell,
    column_widths,
    looking,
    print_columns,
    print_notices,
    shown_path,
    shown_size,
)

if TYPE_CHECKING:
    from edgelora.entry import Entry
    from edgelora.listing import Listing, Model

_NOTHING = """No bases and no adapters are known yet.
  edgelora convert my-model/     makes a base, and remembers it
  edgelora add FOLDER            remembers the GGUF files and adapters you have"""
_SIZE_COLUMN = 3


@click.command("list")
@click.option("--verbose", is_flag=True, help="Name the files that cannot be used, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(verbose: bool, as_json: bool) -> None:
    """Show the bases and adapters known, and which fits which.

    Known is what `convert` made, what `edgelora add` was told, and what lies in the Hugging Face cache and in the
    folders of LM Studio and Ollama, which are only read. An adapter stands under the base it was made for, whatever
    the quantization.
    """
    from edgelora.listing import list_known
    from edgelora.store import Store

    with looking() as told:
        listing = list_known(Store(), told)
    if as_json:
        click.echo(json.dumps(listing.to_dict(), indent=2))
        return
    _print(listing)
    _print_rest(listing, verbose=verbose)


def _print(listing: Listing) -> None:
    groups = [(_title(model), _rows(model)) for model in listing.models]
    groups += [(f"{_title(model)}: no base here that fits", _rows(model)) for model in listing.waiting]
    groups += [("Adapters that do not say which base they want", [_adapter(entry) for entry in listing.unclaimed])]
    groups += [("Gone from where they were", [_missing(entry) for entry in listing.missing])]
    shown = [(title, rows) for title, rows in groups if rows]
    widths = column_widths([row for _, rows in shown for row in rows]) if shown else []
    for number, (title, rows) in enumerate(shown):
        click.secho(("\n" if number else "") + title, bold=True)
        print_columns(rows, right=[_SIZE_COLUMN], widths=widths)
    if not shown:
        click.echo(_NOTHING)


def _print_rest(listing: Listing, *, verbose: bool) -> None:
    """What belongs beside the answer: how to go on where something is gone, and what could not be used."""
    if listing.missing:
        click.echo("`edgelora add NEW_PLACE` finds what has moved, `edgelora remove NAME` forgets it.", err=True)
    if verbose:
        print_notices([*(entry.problem for entry in listing.unusable), *listing.notices])
    elif count := len(listing.unusable) + len(listing.notices):
        files = "file or folder" if count == 1 else "files and folders"
        click.secho(f"{count} {files} could not be used: `edgelora list --verbose` says why.", err=True, dim=True)


def _title(model: Model) -> str:
    mark = f"  fingerprint {model.fingerprint[:12]}" if model.fingerprint else ""
    return cell(f"{model.name or 'A base without a name'}{mark}")


def _rows(model: Model) -> list[list[str]]:
    return [*map(_base, model.bases), *map(_adapter, model.adapters)]


def _base(entry: Entry) -> list[str]:
    kind = "HF folder" if entry.path.is_dir() else "GGUF" if entry.path.suffix == ".gguf" else entry.name
    return _row("base", entry.detail, kind, entry)  # a blob of Ollama's says nothing: its name does


def _adapter(entry: Entry) -> list[str]:
    return _row("adapter", entry.name, ("PEFT " if entry.path.is_dir() else "") + entry.detail, entry)


def _missing(entry: Entry) -> list[str]:
    role = "adapter" if entry.kind and "adapter" in entry.kind.value else "base"
    return _row(role, entry.name or entry.path.stem, "missing", entry)


def _row(role: str, name: str, detail: str, entry: Entry) -> list[str]:
    return [role, cell(name), cell(detail), shown_size(entry.size_bytes), entry.origin, shown_path(entry.path)]


def entry_rows(entries: Iterable[Entry]) -> Sequence[list[str]]:
    """The rows of `list`, for the commands that change what it shows."""
    return [_adapter(entry) if entry.is_adapter else _base(entry) for entry in entries]
