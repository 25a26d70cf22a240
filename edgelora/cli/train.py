"""`edgelora train`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.options import FILE, config_option
from edgelora.cli.progress import CountProgress, count_bar
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.progress import TrainStatus


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every field of `Recipe`, with the help and the choices that the field carries."""
    for field in reversed(fields(Recipe)):
        bound, default = field.metadata["bound"], field.default
        text = str(field.metadata["help"]).strip()
        shown = "" if default is None or default is MISSING else f"  [default: {default}]"
        kind: Any = click.Choice(bound.choices) if bound.choices else _option_type(field.name, default)
        flag: dict[str, Any] = {"is_flag": True, "default": None} if isinstance(default, bool) else {"type": kind}
        name = "--" + field.name.replace("_", "-")
        command = click.option(name, **flag, help=f"{text[:1].upper()}{text[1:]}.{shown}")(command)
    return command


def _option_type(name: str, default: Any) -> type:
    optional = {"max_steps": int, "eval_steps": int}
    return optional.get(name, str) if default is None else type(default)


class _Drawn:
    """Draws a training run on stderr."""

    def __init__(self, bar: CountProgress) -> None:
        self._bar = bar

    def note(self, text: str) -> None:
        click.secho(text, err=True, dim=True)

    def update(self, status: TrainStatus) -> None:
        evaluated = "" if status.eval_loss is None else f"  eval {status.eval_loss:.3f}"
        note = f"loss {status.loss:.3f}{evaluated}  lr {status.learning_rate:.1e}"
        self._bar.update(status.step, status.total_steps, note)


@click.command("train")
@click.argument("data", type=FILE)
@click.option("--base", required=True, help="What to fine-tune: a Hugging Face folder, or a hub id.")
@click.option(
    "-o", "--output", type=FILE, required=True, help="Folder for the adapter (PEFT's files, and edgelora's contract)."
)
@click.option("--eval-data", type=FILE, help="Rows to measure the loss on, in the format of DATA.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output folder.")
@recipe_options
@config_option
def command(data: Path, base: str, output: Path, eval_data: Path | None, resume: bool, **recipe: Any) -> None:
    """Fine-tune a base on your data with PEFT.

    The loss counts the assistant's tokens only.

    DATA is JSONL: one object on each line, with `messages` (as in the OpenAI chat API), or with `prompt` and
    `completion`.

    \b
    Examples:
      edgelora train support.jsonl --base my-model/ -o support/
      edgelora train support.jsonl --base my-model/ -o support/ --rank 8 --epochs 5 --eval-data held-out.jsonl
      edgelora train support.jsonl --base my-model/ -o support/ --resume
    """
    from edgelora.train.run import train

    settings = Recipe.from_mapping(recipe)
    with count_bar("Training", "steps") as bar:
        report = train(data, base, output, settings, eval_data=eval_data, resume=resume, progress=_Drawn(bar))
    evaluated = "" if report.eval_loss is None else f", eval loss {report.eval_loss:.3f}"
    click.echo(str(report.output))
    click.echo(
        f"  {report.method}, {report.rows} rows, {report.steps} steps in {report.seconds:.0f} s, "
        f"loss {report.loss:.3f}{evaluated}; "
        f"{report.trained_parameters:,} of {report.total_parameters:,} parameters trained",
        err=True,
    )
    click.echo(f"Next: edgelora convert {shlex.quote(str(report.output))}", err=True)
