"""`edgelora bundle`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import FILE, AdapterType, config_option
from edgelora.cli.progress import stage_bars
from edgelora.cli.visible import visible


@click.command("bundle")
@click.argument("base", type=FILE)
@click.option("--adapter", "adapters", type=AdapterType(), multiple=True,
              help="A GGUF adapter or a PEFT folder, for good at its scale; repeat for several.")  # fmt: skip
@click.option("-o", "--out", type=FILE, help="File to write.  [default: BASE-bundle.gguf]")
@click.option("--dtype", type=click.Choice(["f16", "bf16", "f32"], case_sensitive=False),
              help="Of the adapters' tensors.  [default: their own, f32 where they differ]")  # fmt: skip
@click.option("--qkv-type", type=click.Choice(["f32", "f16", "bf16", "q8_0"], case_sensitive=False), default="f32",
              show_default=True, help="Where a layer's queries, keys and values are of different types; "
              "f32 holds the values of all.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Cores to use.  [default: all]")
@click.option("--force", is_flag=True, help="Replace OUT; take adapters that were made for another base.")
@config_option
def command(
    base: Path,
    adapters: tuple[AdapterRef, ...],
    out: Path | None,
    dtype: str | None,
    qkv_type: str,
    threads: int | None,
    force: bool,
) -> None:
    """Make one GGUF of a base and adapters, which any current llama.cpp program runs.

    BASE is a GGUF of a Llama-family model: no biases, no norms of queries and keys, no rope factors; others are refused
    by name. Its quantized weights stay as they are, bit for bit. Each conversation chooses its adapter by its first
    token: <|NAME|>, which llama-server's chat puts there for chat_template_kwargs {"adapter": "NAME"} or a system
    message that begins with it. What is computed is what the base computes with that adapter alone.

    \b
    Examples:
      edgelora bundle my-model-q4_0.gguf --adapter support.gguf --adapter billing.gguf -o shop.gguf
      edgelora bundle my-model-q8_0.gguf --adapter vip=tenants/7.gguf@0.5
      edgelora chat --base shop.gguf --adapter support
    """
    from converters.bundle import BundleOptions
    from edgelora.bundling import bundle_adapters

    target = out or base.with_name(f"{base.stem}-bundle.gguf")
    options = BundleOptions(dtype, qkv_type, threads)
    with stage_bars() as stages:
        report = bundle_adapters(base, adapters, target, options, progress=stages.bytes("Bundling"), force=force)
    click.echo(f"{report.path}  {report.size_bytes / 1e6:.1f} MB")
    rounded = f", which rounds by {report.rounding:.2g}" if report.rounding else ""
    click.echo(f"  {len(report.tokens)} adapters, rank {report.rank}, {report.dtype}{rounded}", err=True)
    for token in report.tokens:
        made = "added to the vocabulary" if token.is_added else "kept for later by the vocabulary"
        click.echo(f"  {token.text}  token {token.id}, {made}", err=True)
    for notice in report.notices:
        click.secho(f"  {visible(notice)}", err=True, fg="yellow")
    click.echo(
        f"Next: edgelora chat --base {shlex.quote(str(report.path))} --adapter {report.tokens[0].name}", err=True
    )
