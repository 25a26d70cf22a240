"""`edgelora add`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgelora.cli.list import entry_rows
from edgelora.cli.options import FILE
from edgelora.cli.screen import looking, print_columns, print_notices

_SIZE_COLUMN = 3


@click.command("add")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print what was added as JSON.")
def command(paths: tuple[Path, ...], as_json: bool) -> None:
    """Remember bases and adapters, so that an adapter finds its base.

    PATH is a GGUF file, a model folder, a PEFT adapter folder, or a folder with any of these in it, at most eight
    folders deep. Files stay where they are. One that has moved is known again when its new place is added, or looked
    at by any command.

    \b
    Examples:
      edgelora add ~/models
      edgelora add support.gguf tiny-q4_k_m.gguf
    """
    from edgelora.listing import entry_dict
    from edgelora.registration import add
    from edgelora.store import Store

    store = Store()
    with looking() as told:
        entries = add(store, paths, told)
    if as_json:
        click.echo(json.dumps({"added": [entry_dict(entry) for entry in entries], "notices": store.notices}, indent=2))
        return
    print_columns(entry_rows(entries), right=[_SIZE_COLUMN])
    print_notices(store.notices)
    click.echo("Next: edgelora list", err=True)
