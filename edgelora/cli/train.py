"""`edgelora train`."""

from __future__ import annotations

import shlex
from dataclasses import Field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.data_type import DataType
from edgelora.cli.options import FILE, config_option
from edgelora.cli.progress import CountProgress, count_bar, stage_bars
from edgelora.cli.train_plan import show_plan
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from edgelora.dataset.source import DataSource
    from edgelora.export import ExportPlan
    from edgelora.train.progress import TrainStatus
    from edgelora.train.recipe import Recipe


class RecipeCommand(click.Command):
    """A command with an option for every field of `Recipe`, with the help and the choices that the field carries.

    They are made when they are looked at: `edgelora --help` does not need them.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        return [*own, *self._recipe_options, help_option]

    @cached_property
    def _recipe_options(self) -> list[click.Parameter]:
        from edgelora.train.recipe import Recipe

        return [_option_for(field) for field in fields(Recipe)]


def _option_for(field: Field[Any]) -> click.Option:
    from edgelora.train.recipe import default_text

    bound, default = field.metadata["bound"], default_text(field.name)
    text = str(field.metadata["help"]).strip()
    shown = f"  [default: {default}]" if default else ""
    kind: Any = click.Choice(bound.choices) if bound.choices else bound.kind
    flag: dict[str, Any] = {"is_flag": True, "default": None} if bound.kind is bool else {"type": kind}
    return click.Option(["--" + field.name.replace("_", "-")], **flag, help=f"{text[:1].upper()}{text[1:]}.{shown}")


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


@click.command("train", cls=RecipeCommand)
@click.argument("data", metavar="DATA...", type=DataType(), nargs=-1, required=True)
@click.option("--base", required=True, help="What to fine-tune: a Hugging Face folder, a GGUF file, or a hub id.")
@click.option("-o", "--output", type=FILE, help="Folder for the adapter (PEFT's files, and edgelora's contract).")
@click.option("--eval-data", type=DataType(), help="Rows to measure the loss on, given like DATA.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in the output folder.")
@click.option("--export", is_flag=False, flag_value="base", metavar="[QUANTS]",
              help="When it is trained, convert it, make the base in these quantizations (q4_k_m,q8_0) where there is "
              "none, and verify it on each; alone, on the GGUF file that was trained on.")  # fmt: skip
@click.option("--plan", "is_plan", is_flag=True, help="Only say what it would take: memory by part, time, whether it "
              "fits, and what to change. Trains a few steps, and keeps nothing.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@config_option
def command(
    data: tuple[DataSource, ...],
    base: str,
    output: Path | None,
    eval_data: DataSource | None,
    resume: bool,
    export: str | None,
    is_plan: bool,
    as_json: bool,
    **recipe: Any,
) -> None:
    """Fine-tune a base on your data with PEFT.

    The loss counts the assistant's tokens only; with `--objective dpo` it prefers chosen replies to rejected ones.

    DATA is JSONL, a JSON array, CSV, Parquet or plain text, or a dataset of the Hugging Face hub (OWNER/NAME[:SPLIT]).
    Its rows are conversations (`messages`, as in the OpenAI chat API, also with tools), ShareGPT's, Alpaca's, `prompt`
    and `completion`, or plain `text`; `edgelora data check` looks at them first. Several files are trained on
    together, each as often as its weight says: with general.jsonl@0.25, a quarter of its rows.

    \b
    Examples:
      edgelora train support.jsonl --base my-model/ -o support/
      edgelora train support.jsonl --base my-model/ -o support/ --rank 8 --epochs 5 --eval-data held-out.jsonl
      edgelora train support.jsonl --base my-model/ -o support/ --method qlora --eval-data held-out.jsonl --keep-best
      edgelora train pairs.jsonl --base my-model/ -o polite/ --objective dpo
      edgelora train support.jsonl general.parquet@0.25 --base my-model/ -o support/
      edgelora train support.jsonl --base my-model/ -o support/ --export q4_k_m
      edgelora train support.jsonl --base my-model-q2_k.gguf -o support/ --export
      edgelora train support.jsonl --base my-model/ -o support/ --resume
      edgelora train support.jsonl --base my-model/ --method qlora --plan
    """
    from edgelora.train.ranks import is_first
    from edgelora.train.recipe import Recipe
    from edgelora.train.run import train

    settings = Recipe.from_mapping(recipe)
    if is_plan:
        show_plan(data, base, settings, eval_data, as_json=as_json)
        return
    if as_json:
        raise click.UsageError("--json prints a plan: give --plan too")
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output': a folder for what is trained")
    plan = _planned(export, base, output, settings, resume) if export else None
    with count_bar("Training", "steps") as bar:
        report = train(data, base, output, settings, eval_data=eval_data, resume=resume, progress=_Drawn(bar))
    if not is_first():
        return
    evaluated = "" if report.eval_loss is None else f", eval loss {report.eval_loss:.3f}"
    click.echo(str(report.output))
    click.echo(
        f"  {report.method}, {report.rows} rows, {report.steps} steps in {report.seconds:.0f} s, "
        f"loss {report.loss:.3f}{evaluated}; "
        f"{report.trained_parameters:,} of {report.total_parameters:,} parameters trained",
        err=True,
    )
    if plan is None:
        click.echo(f"Next: edgelora convert {shlex.quote(str(report.output))}", err=True)
    elif not _export(plan, report.export):
        click.get_current_context().exit(1)


def _planned(export: str, base: str, output: Path, recipe: Recipe, resume: bool) -> ExportPlan:
    """Where an export goes; what stands in its way is said before training."""
    from edgelora.export import plan_export
    from edgelora.store import Store
    from edgelora.train.base import find_base

    if recipe.torch_only:
        raise click.UsageError("--export makes GGUF files, and --torch-only is for adapters that fit none")
    if not recipe.certificate_probes and recipe.row.exports_to in ("adapter", "approximate"):
        raise click.UsageError("--export verifies by the certificate, and --certificate-probes 0 records none")
    return plan_export(export, find_base(base, recipe.base_config).path, output, Store(), replace=resume)


def _export(plan: ExportPlan, outcome: str) -> bool:
    """Make and print everything of an export; whether all that was verified passed."""
    from edgelora.export import export
    from edgelora.store import Store

    with stage_bars() as stages:
        made = export(plan, outcome, Store(), stages.bytes("Exporting"))
    for path in filter(None, (made.adapter, *made.bases)):
        click.echo(str(path))
    for notice in made.notices:
        click.secho(f"  {visible(notice)}", err=True, fg="yellow")
    for report in made.reports:
        verdict = "passed" if report.passed else f"FAILED: {', '.join(report.failed)}"
        click.secho(f"  verified on {report.base}: {verdict}", err=True, fg="green" if report.passed else "red")
        if not report.passed:
            again = f"edgelora verify {shlex.quote(report.adapter)} --base {shlex.quote(report.base)}"
            click.echo(f"  everything is kept; for the details: {again}", err=True)
    served = f"--adapter {shlex.quote(str(made.adapter))}" if made.adapter else ""
    click.echo(f"Next: edgelora chat {served} --base {shlex.quote(str(made.bases[0]))}".replace("  ", " "), err=True)
    return made.passed
