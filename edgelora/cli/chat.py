"""`edgelora chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import (
    adapter_option,
    base_option,
    config_option,
    engine_options,
    sampling_of,
    sampling_options,
    template_option,
)
from edgelora.cli.screen import cell, print_columns

if TYPE_CHECKING:
    from edgelora.chat.history import History


@click.command("chat")
@click.argument("prompt", required=False)
@adapter_option
@base_option
@click.option("--system", help="System prompt, instead of the adapter's own.")
@click.option("--stats", is_flag=True, help="Print speed and time to first token on stderr.")
@click.option("--no-log", is_flag=True, help="Keep nothing of this conversation.")
@click.option(
    "--history",
    is_flag=False,
    flag_value="",
    metavar="[WORDS|NUMBER]",
    help="List past conversations, search them for words, or show one by its number.",
)
@template_option
@sampling_options
@engine_options
@config_option
def command(
    prompt: str | None,
    adapters: tuple[AdapterRef, ...],
    base: Path | None,
    system: str | None,
    stats: bool,
    no_log: bool,
    history: str | None,
    **options: Any,
) -> None:
    """Talk to a base through an adapter.

    With PROMPT, or text piped in, one answer is written to stdout, and nothing else there. Without, a
    conversation starts in the terminal; with several adapters the first one answers until /adapter switches.
    Conversations are kept on this machine, in the store (--no-log keeps nothing); --history finds them again.

    \b
    Examples:
      edgelora chat --adapter support.gguf
      edgelora chat --adapter support.gguf "Is it waterproof?"
      cat mail.txt | edgelora chat --adapter extract.gguf --temperature 0
      edgelora chat --adapter support.gguf --adapter extract.gguf@0.8
      edgelora chat --history refund
    """
    from edgelora.chat import terminal
    from edgelora.chat.history import History
    from edgelora.chat.session import Session, describe
    from edgelora.cli.loading import open_engine
    from edgelora.store import default_folder

    if history is not None:
        _print_history(History(default_folder()), history)
        return
    sampling = sampling_of(options)
    question = _question(prompt)
    # One conversation at a time, and as many at once as /compare asks.
    with open_engine(adapters, base, parallel=min(8, 1 + len(adapters)), **options) as engine:
        first = adapters[0].name if adapters else None
        log = None if no_log else History(default_folder())
        session = Session(engine, adapter=first, system=system, sampling=sampling, history=log)
        if question is None:
            terminal.run(session, stats=stats)
            return
        stream = session.ask(question)
        written: list[str] = []
        try:
            terminal.write(stream, written)
        except KeyboardInterrupt:
            stream.cancel()
            click.echo()
            raise
        terminal.keep(session, question, "".join(written))
        if stats:
            click.echo(describe(stream.completion), err=True)


def _question(prompt: str | None) -> str | None:
    """PROMPT, or what is piped in; None where a person sits at the terminal.

    With PROMPT, stdin is not read: under cron or in a script it may be a pipe that never ends.
    """
    if prompt is None or prompt == "-":
        if sys.stdin is None:
            raise click.UsageError("nothing was asked: stdin is closed, and there is no PROMPT argument")
        if sys.stdin.isatty() and prompt is None:
            return None
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace").strip("\n")
    if not prompt.strip():
        raise click.UsageError("nothing was asked: give a PROMPT argument or pipe text in")
    return prompt


def _print_history(history: History, wanted: str) -> None:
    """One conversation by its number, or a line for each that holds the words."""
    if wanted.isdecimal():
        for role, content, adapter in history.read(int(wanted)):
            click.secho(f"{role}{f' ({adapter})' if role == 'assistant' else ''}", bold=True)
            click.echo(f"{content}\n")
        return
    rows = [
        (str(each.id), each.started.replace("T", " ")[:16], ", ".join(each.adapters), cell(each.title))
        for each in history.find(wanted)
    ]
    if rows:
        print_columns(rows, right=[0])
        return
    click.echo(f"No conversation holds {wanted!r}." if wanted else "No conversation is kept yet.", err=True)
