"""`edgelora verify`."""

from __future__ import annotations

import json
from dataclasses import Field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import AdapterType, base_option, config_option
from edgelora.cli.progress import count_bar
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from edgelora.verification.report import Check, Report

_COLOURS = {"ok": "green", "FAIL": "red", "not checked": "yellow"}


class VerifyCommand(click.Command):
    """A command with an option for every threshold, made when they are looked at."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, help_option = super().get_params(ctx)
        return [*own, *self._threshold_options, help_option]

    @cached_property
    def _threshold_options(self) -> list[click.Parameter]:
        from edgelora.verification.thresholds import Thresholds

        return [_option_for(limit) for limit in fields(Thresholds)]


def _option_for(limit: Field[Any]) -> click.Option:
    text = f"{limit.metadata['help']}  [default: {limit.default:g}]"
    return click.Option(["--" + limit.name.replace("_", "-")], type=float, help=text)


@click.command("verify", cls=VerifyCommand)
@click.argument("adapter", type=AdapterType())
@base_option
@click.option("--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: as in chat]")
@click.option("--gpu-layers", type=click.IntRange(min=-1), default=-1, show_default="all", help="Layers on the GPU.")
@click.option("--force", is_flag=True, help="Replay on another base, too; its fingerprint fails all the same.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@config_option
def command(
    adapter: AdapterRef,
    base: Path | None,
    threads: int | None,
    gpu_layers: int,
    force: bool,
    as_json: bool,
    **limits: float | None,
) -> None:
    """Prove that an adapter does here what it did where it was trained.

    ADAPTER is a GGUF adapter or a PEFT folder. Its certificate, recorded by `edgelora train` (or by `edgelora
    convert --certify`) with Hugging Face's model and PEFT, is replayed on this device and base. Exit code 1 where a
    check fails.

    \b
    Examples:
      edgelora verify support.gguf
      edgelora verify support.gguf --base base-q4_k_m.gguf --json
      edgelora verify support.gguf --base base-q2_k.gguf --max-kl 0.5 --min-greedy 0.9
    """
    from edgelora.contract import Contract
    from edgelora.resolution import resolve_files
    from edgelora.verification.thresholds import Thresholds
    from edgelora.verify import VerifySettings, verify

    thresholds = Thresholds(**{name: value for name, value in limits.items() if value is not None})
    files = resolve_files([adapter], base, force=force)
    folder = Contract.load(adapter.path) if adapter.path.is_dir() else None
    if files.base_note:
        click.secho(files.base_note, err=True, dim=True)
    with count_bar("Verifying", "probes") as bar:
        settings = VerifySettings(threads, gpu_layers, force, thresholds)
        wanted = folder.base_fingerprint if folder else ""
        report = verify(files.adapters[0], files.base, settings, bar.update, wanted=wanted)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report, str(adapter.path))
    if not report.passed:
        click.get_current_context().exit(1)


def _print(report: Report, name: str) -> None:
    from edgelora.verification.report import PARTS

    click.echo(visible(f"{name} on {report.base} ({report.backend})"))
    for line in [_recorded(report), *report.notices]:
        if line:
            click.secho(visible(line), dim=True)
    widths = [max(len(getattr(check, part)) for check in report.checks) for part in ("title", "value", "limit")]
    for part, title in PARTS.items():
        rows = [check for check in report.checks if check.part == part]
        if rows:
            click.secho(f"\n{title}", bold=True)
        for check in rows:
            _print_row(check, widths, report)
    said = f"passed in {report.seconds:.1f} s" if report.passed else f"FAILED: {', '.join(report.failed)}"
    unchecked = f"; {len(report.unchecked)} checks could not be made" if report.unchecked else ""
    click.secho(f"\n{said}{unchecked}", fg=_COLOURS["ok" if report.passed else "FAIL"])


def _recorded(report: Report) -> str:
    recorded = report.recorded
    if not recorded:
        return ""
    versions = ", ".join(f"{package} {version}" for package, version in recorded["versions"].items())
    left_out = f" ({recorded['left_out']} left out)" if recorded["left_out"] else ""
    size = f"{recorded['probes']} probes, {recorded['positions']} positions{left_out}"
    return f"recorded with {versions}, {recorded['dtype']}: {size}"


def _print_row(check: Check, widths: list[int], report: Report) -> None:
    values = (check.title, check.value, check.limit)
    cells = "  ".join(visible(value).ljust(width) for value, width in zip(values, widths, strict=True))
    outcome = "" if check.outcome == "shown" else check.outcome
    click.echo(f"  {cells}".rstrip() if not outcome else f"  {cells}  {click.style(outcome, fg=_COLOURS[outcome])}")
    is_first = check.note not in (other.note for other in report.unchecked[: _position(check, report)])
    if check.note and (check.outcome == "FAIL" or (check.outcome == "not checked" and is_first)):
        click.secho(f"    {visible(check.note)}", dim=True)


def _position(check: Check, report: Report) -> int:
    return next((i for i, other in enumerate(report.unchecked) if other is check), 0)
