"""The `edgelora` command: a plain Click group, one file a command, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
from typing import Any

import click

from converters.errors import ConversionError
from edgelora.cli import add, batch, bundle, chat, convert, data, doctor, fit, keys, remove, serve, show, train, verify
from edgelora.cli import eval as eval_command
from edgelora.cli import list as list_command
from edgelora.cli.visible import visible
from edgelora.errors import EdgeloraError
from edgelora.version import __version__

EXIT_MODEL_FILE = 3
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EBADF, errno.EIO, errno.EDQUOT)
EXIT_INTERRUPTED = 130


class ErrorBoundary(click.Group):
    """Turns the two error trees and Ctrl-C into a message and an exit code; anything else is a bug, shown whole."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeloraError as error:
            _report(error.message, error.hint)
            ctx.exit(error.exit_code)
        except ConversionError as error:
            _report(error.message, error.hint)
            ctx.exit(EXIT_MODEL_FILE)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and error.errno in _OUTPUT_ERRORS:
                _report(f"standard output cannot be written: {error.strerror}", "")
                ctx.exit(1)
            raise
        except KeyboardInterrupt as interrupt:
            click.echo(f"\nInterrupted. {interrupt}".rstrip(), err=True)
            ctx.exit(EXIT_INTERRUPTED)


def _report(message: str, hint: str) -> None:
    click.secho(f"Error: {visible(message)}", err=True, fg="red")
    if hint:
        click.echo(visible(hint), err=True)


@click.group(cls=ErrorBoundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgelora")
def cli() -> None:
    """Fine-tune adapters, convert them exactly, and run many of them on one base.

    \b
    The main job, in three commands:
      edgelora train support.jsonl --base my-model/ -o support/
      edgelora convert my-model/ --quant q4_k_m && edgelora convert support/
      edgelora chat --adapter support.gguf

    \b
    Exit codes: 0 done, 1 the work failed a check, 2 usage, 3 model or adapter file,
    4 data file, 5 packages missing, 130 interrupted.
    """


for module in (
    data,
    train,
    convert,
    bundle,
    chat,
    batch,
    serve,
    verify,
    eval_command,
    fit,
    show,
    list_command,
    add,
    remove,
    keys,
    doctor,
):
    cli.add_command(module.command)
