"""`edgelora keys`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.options import FILE
from edgelora.cli.screen import cell, print_columns, print_notices

if TYPE_CHECKING:
    from edgelora.serve.keys import Key, Rate

_RELOAD = "A running server knows of it when it reads the file again: kill -HUP PID."


class RateType(click.ParamType["Rate"]):
    """`60/min`."""

    name = "N/UNIT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rate:
        from edgelora.errors import SettingsError
        from edgelora.serve.keys import Rate

        try:
            return value if isinstance(value, Rate) else Rate.parse(value)
        except SettingsError as error:
            self.fail(f"It {error.message}.", param, ctx)


file_option = click.option(
    "--file", "path", type=FILE, default=Path("keys.toml"), show_default=True, help="The file of keys."
)


@click.group("keys")
def command() -> None:
    """Make the keys that a server lets its clients in by, and say what each may use.

    They are kept in a TOML file, as salted hashes: no key can be read from it. `edgelora serve --keys keys.toml` asks
    every client for one.

    \b
    Examples:
      edgelora keys add acme --adapter support --rate 60/min --tokens 100k/day
      edgelora keys add me --admin --all-adapters
      edgelora keys list
      edgelora keys remove acme
    """


@command.command("add")
@click.argument("name")
@file_option
@click.option("--adapter", "adapters", metavar="NAME", multiple=True,
              help="An adapter that it may use; repeat for several.")  # fmt: skip
@click.option("--all-adapters", is_flag=True, help="It may use every adapter there ever is, and the bare base.")
@click.option("--base", is_flag=True, help="It may use the bare base.")
@click.option("--admin", is_flag=True, help="It may load and unload adapters.")
@click.option("--rate", type=RateType(), help="So many requests per s, min, h or day: 60/min.  [default: no limit]")
@click.option("--concurrency", type=click.IntRange(min=1), metavar="N",
              help="So many requests at once.  [default: no limit]")  # fmt: skip
@click.option("--tokens", type=RateType(),
              help="So many tokens of prompts and replies: 100k/day, 2M/day.  [default: no limit]")  # fmt: skip
@click.option("--replace", is_flag=True, help="Put it in the place of the key of this name, with a new secret.")
def add(
    name: str,
    path: Path,
    adapters: tuple[str, ...],
    all_adapters: bool,
    base: bool,
    admin: bool,
    rate: Rate | None,
    concurrency: int | None,
    tokens: Rate | None,
    replace: bool,
) -> None:
    """Add a key and print its secret, this once: the file holds no more than its hash.

    NAME is what logs and metrics call it. The file is made where there is none, for its owner alone to read; comments
    in one that is there are not kept.

    \b
    Examples:
      edgelora keys add acme --adapter support --adapter vip --rate 60/min --concurrency 4 --tokens 100k/day
      edgelora keys add laptop --base > secret.txt
    """
    from edgelora.serve.keys import BASE, EVERYTHING, Key, add_key

    names = {*adapters, *[BASE] * base, *[EVERYTHING] * all_adapters}
    key = Key(name, frozenset(names), admin, rate, concurrency, tokens)
    click.echo(add_key(path, key, replace_old=replace))
    print_columns([_row(key)], err=True)
    click.echo(f"Keep the key: it is not shown again. {_RELOAD}", err=True)


@command.command("list")
@file_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(path: Path, as_json: bool) -> None:
    """Show the keys, what each may use, and how much."""
    from edgelora.serve.keys import KeyRing

    ring = KeyRing.read(path)
    if as_json:
        click.echo(json.dumps({"keys": [key.to_dict() for key in ring.keys], "notices": ring.notices}, indent=2))
        return
    if ring.keys:
        print_columns([_row(key) for key in ring.keys])
    print_notices(ring.notices)


@command.command("remove")
@click.argument("name")
@file_option
def remove(name: str, path: Path) -> None:
    """Remove a key: what it opened stays shut to it."""
    from edgelora.serve.keys import remove_key

    remove_key(path, name)
    click.echo(f"{cell(name)}  removed")
    click.echo(_RELOAD, err=True)


def _row(key: Key) -> list[str]:
    used = [{"*": "everything"}.get(name, name) for name in sorted(key.adapters)]
    limits = [
        f"{key.rate} requests" if key.rate else "",
        f"{key.concurrency} at once" if key.concurrency else "",
        f"{key.tokens} tokens" if key.tokens else "",
    ]
    made = f"{key.created:%Y-%m-%d}" if key.created else ""
    return [key.name, "admin" if key.admin else "", ", ".join(used), ", ".join(filter(None, limits)), made]
