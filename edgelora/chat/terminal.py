"""The interactive chat: reads lines, streams answers, and survives Ctrl-C in the middle of one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable

import click

from edgelora.chat.session import Leave, Session, describe
from edgelora.errors import EdgeloraError

FENCE = '"""'  # a line that starts with it begins a message of several lines


def run(session: Session, *, stats: bool) -> None:
    """Talk until the user leaves (Ctrl-D, /exit).

    Ctrl-C stops the answer being written and keeps what there is; at the prompt it clears the line, and twice in a row
    it leaves.

    Raises:
        KeyboardInterrupt: Ctrl-C twice at the prompt.
    """
    _enable_line_editing()
    session.width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    _note(f"Answering: {session.describe_adapter()}. /help lists the commands; Ctrl-D leaves.")
    interrupted = False
    while True:
        try:
            line = _read_message()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            _note("\nCtrl-C again, or Ctrl-D, leaves.")
            continue
        interrupted = False
        try:
            _take(session, line, stats)
        except Leave:
            return
        except EdgeloraError as error:
            _note(f"{error.message}\n{error.hint}".rstrip())
        except KeyboardInterrupt:
            _note("\nStopped.")


def _take(session: Session, line: str, stats: bool) -> None:
    if not line.strip():
        return
    if line.startswith("/"):
        for said in session.command(line):
            _note(said)
        return
    stream = session.ask(line)
    written: list[str] = []
    try:
        write(stream, written)
    except KeyboardInterrupt:
        stream.cancel()
        click.echo()
        if written:
            keep(session, line, "".join(written))
        raise
    keep(session, line, "".join(written))
    if stream.completion.finish_reason == "length":
        _note("(cut off: the token limit or the end of the context window; /reset starts again)")
    if stats:
        _note(describe(stream.completion))


def keep(session: Session, question: str, answer: str) -> None:
    """`Session.keep`; a history that cannot be written is told once, and costs nothing else."""
    try:
        session.keep(question, answer)
    except EdgeloraError as error:
        _note(f"{error.message}\n{error.hint}".rstrip())


def write(pieces: Iterable[str], written: list[str] | None = None) -> None:
    """Write an answer to stdout as it comes; `written` is given each piece that is on the screen."""
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
        if written is not None:
            written.append(piece)
    click.echo()


def _read_message() -> str:
    line = _read_line("> ")
    if not line.startswith(FENCE):
        return line
    lines = [line.removeprefix(FENCE)]
    while not lines[-1].endswith(FENCE) or (len(lines) == 1 and line == FENCE):
        lines.append(_read_line("... "))
    return "\n".join(lines).removesuffix(FENCE).strip("\n")


def _read_line(prompt: str) -> str:
    """A line from the terminal; the prompt never goes into a redirected stdout."""
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)
    return input()


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - importing it is what gives input() history and editing
    except ImportError:  # Windows: the console edits lines itself
        return


def _note(text: str) -> None:
    click.secho(text, err=True, dim=True)
