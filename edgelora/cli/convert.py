"""`edgelora convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.options import FILE, config_option, template_option
from edgelora.cli.progress import bytes_bar

if TYPE_CHECKING:
    from converters.adapter import AdapterReport
    from converters.base import BaseReport


class QuantName(click.ParamType[str]):
    """A row of `converters.quant_types.RECIPES`, which `edgelora --help` does not need."""

    name = "NAME"

    def _choice(self) -> click.Choice[str]:
        from converters.quant_types import RECIPES

        return click.Choice([*RECIPES], case_sensitive=False)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self._choice().get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return self._choice().convert(value, param, ctx)


@click.command("convert")
@click.argument("source", type=FILE)
@click.option(
    "-o", "--out", type=click.Path(), help="File or folder to write.  [default: NAME-QUANT.gguf or NAME.gguf, here]"
)
@click.option(
    "--quant",
    type=QuantName(),
    help="Quantization of a base.  [default: q4_k_m]",
)
@click.option("--base", type=FILE, help="The adapter's base: its HF folder, or a GGUF.  [default: found]")
@template_option
@click.option(
    "--threads", type=click.IntRange(min=1), help="Cores to quantize on.  [default: all this process may use]"
)
@click.option("--force", is_flag=True, help="Replace OUT; convert an adapter against a base it was not made for.")
@config_option
def command(
    source: Path,
    out: str | None,
    quant: str | None,
    base: Path | None,
    chat_template: str | None,
    threads: int | None,
    force: bool,
) -> None:
    """Turn an HF base or a PEFT adapter into GGUF.

    What SOURCE is, is seen from its files. Weights convert exactly, or SOURCE is refused by name.

    \b
    Examples:
      edgelora convert my-model/ --quant q4_k_m
      edgelora convert support/ -o support.gguf
      edgelora convert support/ --base my-model-q4_k_m.gguf
    """
    from edgelora.conversion import ConvertOptions, convert

    options = ConvertOptions(quant=quant, base=base, chat_template=chat_template, threads=threads, force=force)
    with bytes_bar(f"Converting {source}") as bar:
        report = convert(source, out, options, progress=bar)
    _print(report)


def _print(report: BaseReport | AdapterReport) -> None:
    from converters.base import BaseReport

    click.echo(f"{report.path}  {report.size_bytes / 1e6:.1f} MB")
    if isinstance(report, BaseReport):
        types = ", ".join(f"{count} {name}" for name, count in sorted(report.types.items()))
        _note(f"  base {report.name}, {report.architecture}, {report.n_tensors} tensors: {types}")
    else:
        _note(f"  adapter for {report.base_name}, {report.n_tensors} tensors")
    for notice in report.notices:
        click.secho(f"  {notice}", err=True, fg="yellow")
    option = "--base" if isinstance(report, BaseReport) else "--adapter"
    _note(f"Next: edgelora chat {option} {shlex.quote(str(report.path))}")


def _note(text: str) -> None:
    click.echo(text, err=True)
