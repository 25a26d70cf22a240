"""`edgelora remove`."""

from __future__ import annotations

import json

import click

from edgelora.cli.screen import print_notices, shown_path


@click.command("remove")
@click.argument("names", metavar="NAME|PATH...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was removed as JSON.")
def command(names: tuple[str, ...], as_json: bool) -> None:
    """Forget bases and adapters; your files stay.

    NAME is what `edgelora list` shows, PATH a file, or a folder: then all that is known below it. Only adapters that
    edgelora itself made on the fly, in its own folder, are deleted; they are made again when they are needed.

    \b
    Examples:
      edgelora remove support
      edgelora remove ~/old-models
    """
    from edgelora.listing import entry_dict
    from edgelora.registration import remove
    from edgelora.store import Store

    store = Store()
    removed = remove(store, names)
    if as_json:
        told = [{**entry_dict(item.entry), "deleted": item.is_deleted} for item in removed]
        click.echo(json.dumps({"removed": told, "notices": store.notices}, indent=2))
        return
    for item in removed:
        done = "deleted (it was made on the fly)" if item.is_deleted else "forgotten"
        click.echo(f"{shown_path(item.entry.path)}  {done}")
    print_notices(store.notices)
