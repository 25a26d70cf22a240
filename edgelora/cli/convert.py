"""`edgelora convert`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.base_settings import BaseSettings
from edgelora.cli.options import FILE, AdapterType, config_option, sectioned, template_option
from edgelora.cli.progress import stage_bars
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from converters.adapter import AdapterReport
    from converters.base import BaseReport
    from converters.plan import Plan
    from edgelora.engine.perplexity import PerplexityChange


class QuantName(click.ParamType[str]):
    """A row of `converters.quant_types.RECIPES`, which `edgelora --help` does not need."""

    name = "NAME"

    def _choice(self) -> click.Choice[str]:
        from converters.quant_types import RECIPES

        return click.Choice([*RECIPES], case_sensitive=False)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return self._choice().convert(value, param, ctx)


# Headings of the help, and which options are under each; those of no heading come first.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Adapters": ("dtype", "rank", "max_error", "merge", "blend", "blend_way", "initial", "allow_bin", "certify"),
    "Repair of a quantized base by an adapter": ("repair_rank", "repair_reference", "repair_text"),
    "Types of tensors": ("tensor_types", "output_type", "embedding_type", "pure", "untie", "allow_requantize"),
    "Importance of columns (IQ1 to IQ3 need it)": (
        "imatrix", "calibrate", "calibrate_adapter", "calibrate_chunks", "save_imatrix",
    ),
    "Looking before and after": ("dry_run", "as_json", "check", "check_chunks"),
    "Several files": ("split_max_size", "split_max_tensors"),
}  # fmt: skip


MAX_NOTICES = 20


@click.command("convert", cls=sectioned(SECTIONS))
@click.argument("source", required=False)
@click.option(
    "-o", "--out", type=click.Path(), help="File or folder to write.  [default: NAME-QUANT.gguf or NAME.gguf]"
)
@click.option("--quant", type=QuantName(), help="q8_0, q6_k, q4_k_m, iq4_xs, bf16 ... (README lists all).  "
              "[default: q4_k_m]")  # fmt: skip
@click.option("--base", type=FILE, help="The adapter's base: its HF folder, or a GGUF.  [default: found]")
@template_option
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Cores to quantize on.  [default: all]")
@click.option("--strict", is_flag=True, help="Refuse weights that are NaN or infinite (without: a warning).")
@click.option("--force", is_flag=True, help="Replace OUT; convert an adapter against a base it was not made for.")
@click.option("--dtype", type=click.Choice(["f16", "f32", "bf16", "q8_0"], case_sensitive=False),
              help="Of an adapter's tensors.  [default: f16]")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Cut an adapter to at most so many ranks.")
@click.option("--max-error", type=click.FloatRange(0, min_open=True), metavar="SHARE",
              help="Largest error of what is approximated or cut, for each tensor.  [default: 0.01]")  # fmt: skip
@click.option("--merge", type=AdapterType(), multiple=True, help="Merge an adapter of any method into the base SOURCE.")
@click.option("--blend", type=AdapterType(), multiple=True, help="Make one adapter of several, instead of SOURCE.")
@click.option("--blend-way", type=click.Choice(["cat", "linear"]), default="cat", show_default=True,
              help="Exact sum, or PEFT's sum of factors.")  # fmt: skip
@click.option("--initial", type=FILE, metavar="FOLDER",
              help="The adapter as it was before training (PiSSA, OLoRA, CorDA, LoRA-GA).")  # fmt: skip
@click.option("--allow-bin", is_flag=True, help="Read adapter_model.bin, a pickle; nothing in it is executed.")
@click.option("--certify", type=FILE, metavar="ROWS|general",
              help="Record for `verify` what PEFT computes on these rows (needs the train extra).")  # fmt: skip
@click.option("--repair-rank", type=click.IntRange(min=1), metavar="N",
              help="Add ranks that repair what quantization took from --base; kept where that helps.")  # fmt: skip
@click.option("--repair-reference", type=FILE, metavar="FOLDER",
              help="The base before it was quantized.  [default: found]")  # fmt: skip
@click.option("--repair-text", type=FILE, metavar="TEXT", help="Tell by the perplexity on it whether it helps.")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="EXPR=TYPE",
              help="For tensors whose name has EXPR in it, 'ffn_down=q6_k'; repeat for several.")  # fmt: skip
@click.option("--output-tensor-type", "output_type", metavar="TYPE", help="Type of the output.")
@click.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="Type of the token embeddings.")
@click.option("--pure", is_flag=True, help="One type for all tensors, not the quantization's mixture.")
@click.option("--untie", is_flag=True, help="Write a tied output as a tensor of its own: adapters may change it then.")
@click.option("--allow-requantize", is_flag=True, help="Quantize a GGUF that has lost precision already.")
@click.option("--imatrix", type=FILE, metavar="FILE", help="Importance matrix, in either of llama.cpp's formats.")
@click.option("--calibrate", type=FILE, metavar="TEXT", help="Measure one on this text, or on .jsonl or .csv rows.")
@click.option("--calibrate-adapter", type=FILE, metavar="ADAPTER", help="Have this adapter active while measuring.")
@click.option("--calibrate-chunks", type=click.IntRange(min=1), metavar="N",
              help="Windows of 512 tokens to read.  [default: all]")  # fmt: skip
@click.option("--save-imatrix", type=FILE, metavar="FILE", help="Keep what --calibrate measures.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the plan: each tensor, sizes, memory, time. Write no GGUF (a hub id is downloaded).",
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: the plan as JSON.")
@click.option("--check", type=FILE, metavar="TEXT", help="Compare the perplexity before and after on this text.")
@click.option("--check-chunks", type=click.IntRange(min=1), metavar="N",
              help="Windows of 512 tokens to read.  [default: all]")  # fmt: skip
@click.option("--split-max-size", default="", metavar="SIZE", help="At most 2G, 500M ... of tensors in each.")
@click.option("--split-max-tensors", default=0, type=click.IntRange(min=0), metavar="N",
              help="At most so many tensors in each.")  # fmt: skip
@config_option
def command(
    source: str | None,
    out: str | None,
    base: Path | None,
    chat_template: str | None,
    revision: str | None,
    as_json: bool,
    threads: int | None,
    force: bool,
    blend: tuple[AdapterRef, ...],
    blend_way: str,
    **settings: Any,
) -> None:
    """Turn a base or an adapter into GGUF.

    SOURCE is a model folder (config.json), a hub id (Qwen/Qwen3-0.6B, also with @REVISION), a GGUF base to quantize
    again, an adapter folder that PEFT or MLX saved, or a GGUF adapter to give another type: which one is seen from its
    files. Everything converts exactly, or within an error that is stated, or is refused by name. No intermediate file,
    and memory that does not grow with the model.

    \b
    Examples:
      edgelora convert my-model/ --quant q4_k_m
      edgelora convert Qwen/Qwen3-0.6B --quant q8_0 --dry-run
      edgelora convert my-model/ --quant iq3_xs --calibrate rows.jsonl --check held-out.txt
      edgelora convert my-model-bf16.gguf --quant q4_k_m --tensor-type ffn_down=q6_k
      edgelora convert support/ -o support.gguf
      edgelora convert support/ --base my-model-q4_k_m.gguf
      edgelora convert support/ --base base-q2_k.gguf --repair-rank 16 --repair-text rows.jsonl
      edgelora convert my-model/ --merge dora/ --quant q4_k_m
      edgelora convert --blend support.gguf@0.7 --blend billing.gguf@0.3 -o both.gguf
    """
    from converters.hub import fetch
    from edgelora.base_conversion import BaseProgress, check_perplexity, read_inputs
    from edgelora.conversion import ConvertOptions, blend_adapters, convert

    for_adapter = AdapterSettings(**{field.name: settings.pop(field.name) for field in fields(AdapterSettings)})
    chosen = BaseSettings(**settings)
    if as_json and not chosen.dry_run:
        raise click.UsageError("--json goes with --dry-run")
    if bool(source) == bool(blend):
        raise click.UsageError("name a SOURCE, or the adapters to --blend" if not source else "--blend takes no SOURCE")
    if blend and revision:
        raise click.UsageError("--revision: of a hub id, and --blend takes files and folders")
    if blend_way != "cat" and not blend:
        raise click.UsageError("--blend-way goes with --blend")
    read_inputs(chosen)  # what is wrong with them is said before a download
    options = ConvertOptions(
        settings=chosen, base=base, chat_template=chat_template, threads=threads, force=force, adapter=for_adapter
    )
    if not source:
        with stage_bars() as stages:
            blended = blend_adapters(blend, out, options, way=blend_way, progress=stages.bytes("Blending"))
        _print(blended)
        return
    name = Path(source).name
    with stage_bars() as stages:
        path = fetch(source, revision=revision, progress=stages.bytes(f"Downloading {name}"), notice=_warn)
        report = convert(
            path,
            out,
            options,
            progress=stages.bytes(f"Converting {name}"),
            measured=stages.windows("Measuring importance"),
            prepared=stages.bytes("Unquantized copy"),
        )
    if plan := getattr(report, "plan", None):
        _print_plan(plan, report.notices, as_json=as_json)
        return
    _print(report)
    if chosen.check:
        with stage_bars() as stages:
            progress = BaseProgress(
                measured=stages.windows("Measuring perplexity"),
                prepared=stages.bytes("Unquantized copy"),
            )
            change = check_perplexity(
                path,
                report.path,
                chosen.check,
                chunks=chosen.check_chunks,
                threads=threads,
                chat_template=chat_template,
                progress=progress,
            )
        _print_change(change)


def _print(report: BaseReport | AdapterReport) -> None:
    from converters.adapter import AdapterReport

    click.echo(f"{report.path}  {report.size_bytes / 1e6:.1f} MB")
    if isinstance(report, AdapterReport):
        _note(f"  {report.method} adapter for {report.base_name}, {report.n_tensors} tensors, {_exactness(report)}")
    else:
        types = ", ".join(f"{count} {name}" for name, count in sorted(report.types.items()))
        _note(f"  base {report.name}, {report.architecture}, {report.n_tensors} tensors: {types}")
    _warn_of(report.notices)
    option = "--adapter" if isinstance(report, AdapterReport) else "--base"
    _note(f"Next: edgelora chat {option} {shlex.quote(str(report.path))}")


def _exactness(report: AdapterReport) -> str:
    """How near the file is to what was trained."""
    error = report.max_relative_error
    rounding = f"{report.dtype}, which rounds by {error:.2g}" if error else report.dtype
    if report.kind == "exact":
        return f"exact ({rounding})"
    if report.from_quantized and not report.max_residual:
        return f"approximate: computed from a base that was quantized ({rounding})"
    return f"approximate: up to {report.max_residual:.1%} of a tensor's change is left out ({rounding})"


def _print_change(change: PerplexityChange) -> None:
    click.echo(f"perplexity {change.before} before, {change.after} after: {change.ratio - 1:+.2%}")
    _note(f"  over {change.before.n_tokens} tokens in {change.before.n_chunks} windows")


def _print_plan(plan: Plan, notices: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**plan.to_dict(), "notices": list(notices)}, indent=2))
        return
    width = max(len(tensor.name) for tensor in plan.tensors)
    for tensor in plan.tensors:
        name, shape = visible(tensor.name), "x".join(map(str, tensor.shape))
        click.echo(f"{name:{width}}  {shape:>14}  {tensor.source:>8} -> {tensor.type:7} {tensor.size_bytes:>14,}")
    for file in plan.files:
        click.echo(f"{file.path}  {file.size_bytes:,} bytes, {file.n_tensors} tensors")
    if not plan.fits:
        _warn(f"does not fit on that disk: {plan.size_bytes - plan.free_bytes:,} bytes more are needed")
    click.echo(
        f"about {plan.peak_memory_bytes / 1e6:.0f} MB of memory and {plan.seconds:.0f} s; "
        f"{plan.free_bytes:,} bytes are free there"
    )
    _warn_of(notices)


def _warn(text: str) -> None:
    click.secho(f"  {visible(text)}", err=True, fg="yellow")


def _warn_of(notices: Sequence[str]) -> None:
    for notice in notices[:MAX_NOTICES]:
        _warn(notice)
    if len(notices) > MAX_NOTICES:
        _warn(f"and {len(notices) - MAX_NOTICES} notices more")


def _note(text: str) -> None:
    click.echo(visible(text), err=True)
