"""`edgelora fit`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.convert import QuantName
from edgelora.cli.eval import engine_settings
from edgelora.cli.options import FILE, AdapterType, config_option, context_options, force_option, template_option
from edgelora.cli.progress import count_bar
from edgelora.cli.screen import cell, print_columns, shown_size
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from edgelora.evaluation.quant_candidate import Candidate
    from edgelora.evaluation.quant_sweep import Sweep

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}I": 1024**power for power, name in enumerate("KMGT", start=1)}


class MemorySize(click.ParamType[int]):
    """`6GB`, `6G`, `5.5GiB` or a number of bytes; GB are powers of 1000, GiB of 1024."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper(), re.ASCII)
        size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write 6GB, 5.5GiB or a number of bytes", param, ctx)
        return size


class QuantNames(click.ParamType[tuple[str, ...]]):
    """Names of quantizations with commas between."""

    name = "NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(QuantName().convert(name.strip(), param, ctx) for name in str(value).split(","))


class Ranks(click.ParamType[tuple[int, ...]]):
    """Ranks with commas between."""

    name = "N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        rank = click.IntRange(min=1)
        return tuple(rank(each.strip(), param, ctx) for each in str(value).split(","))


@click.command("fit")
@click.argument("data", type=FILE)
@click.option("--base", type=FILE, required=True, help="A model folder, or a GGUF in full precision.")
@click.option("--adapter", type=AdapterType(), help="A GGUF adapter or a PEFT folder; without, the base alone.")
@click.option("--ram", type=MemorySize(), help="Memory that one conversation may take: 6GB.  [default: what is free]")
@click.option("--quants", type=QuantNames(), help="To try.  [default: q8_0,q6_k,q5_k_m,q4_k_m,q3_k_m,q2_k]")
@click.option("--imatrix", type=FILE, metavar="FILE", help="Importance matrix: each is tried without and with it.")
@click.option("--calibrate", type=FILE, metavar="TEXT", help="Measure one on this text, or on .jsonl or .csv rows.")
@click.option("--repair-ranks", type=Ranks(), help="Try each also repaired by so many ranks in the adapter: 8,32.")
@click.option("-o", "--out", type=FILE, metavar="GGUF", help="Write the one that is picked; without, nothing is kept.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--metric", default="perplexity", show_default=True, metavar="NAME",
              help="Decides: one of those of `edgelora eval`.")  # fmt: skip
@click.option("--prompt", metavar="TEMPLATE", help="Make prompts of columns: 'Classify: {text}'.")
@click.option("--reference", metavar="TEMPLATE", help="Make references of columns: '{category}'.")
@click.option("--system", help="System prompt for rows without one, instead of the adapter's own.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Score on the first so many rows.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Score on so many rows, drawn by --seed.")
@click.option("--seed", type=int, help="Of --sample and the bootstrap.  [default: 0]")
@click.option("--max-tokens", type=int, help="End a reply after this many tokens.  [default: 512]")
@template_option
@context_options
@force_option
@config_option
def command(
    data: Path,
    base: Path,
    adapter: AdapterRef | None,
    ram: int | None,
    quants: tuple[str, ...] | None,
    imatrix: Path | None,
    calibrate: Path | None,
    repair_ranks: tuple[int, ...] | None,
    out: Path | None,
    as_json: bool,
    metric: str,
    **options: Any,
) -> None:
    """Find the quantization that answers best within some memory.

    Each is made, scored on DATA with the adapter, timed on this machine, and deleted; those that do not fit are not
    made. The best value wins; where a repaired adapter won, -o writes that one beside its base.

    \b
    Examples:
      edgelora fit held-out.jsonl --base my-model/ --adapter support/ --ram 6GB
      edgelora fit held-out.jsonl --base my-model/ --adapter support.gguf --ram 4GB --calibrate rows.jsonl -o best.gguf
      edgelora fit held-out.jsonl --base my-model/ --adapter support/ --quants q3_k_m,q2_k --repair-ranks 8,32
      edgelora fit test.csv --prompt '{text}' --reference '{category}' --base my-model/ --metric accuracy --limit 200
    """
    from edgelora.evaluation.quant_candidate import SweepSettings
    from edgelora.evaluation.quant_sweep import sweep
    from edgelora.evaluation.rows import RowSettings

    if imatrix and calibrate:
        raise click.UsageError("--imatrix and --calibrate exclude one another: one is enough")
    seed = options["seed"] or 0
    settings = SweepSettings(
        ram_bytes=_free_bytes() if ram is None else ram,
        quants=quants or (),
        metric=metric,
        imatrix=imatrix,
        calibrate=calibrate,
        repair_ranks=repair_ranks or (),
        rows=RowSettings(
            options["prompt"], options["reference"], options["system"], options["limit"], options["sample"], seed
        ),
        engine=engine_settings({**options, "parallel": None}),
        seed=seed,
        out=out,
        force=options["force"],
    )
    with count_bar("Fitting", "quantizations") as bar:
        found = sweep(data, base, adapter, settings, bar.update)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _print(found: Sweep) -> None:
    header = ["", "file", "memory", found.metric.name, "95 %", "beside picked", "reads", "writes", ""]
    lines = [header, *(_line(each, found) for each in found.candidates)]
    print_columns([[cell(each) for each in line] for line in lines], right=(1, 2, 3, 6, 7))
    click.secho(visible(found.why), bold=True)
    rows = f"{found.n_rows:,} rows with {found.adapter}" if found.adapter != "none" else f"{found.n_rows:,} rows"
    click.echo(
        f"  {rows}, a context of {found.n_ctx:,} tokens, tokens/s of one conversation, in {found.seconds:.1f} s",
        err=True,
    )
    for path in (found.path, found.adapter_path):
        if path:
            click.echo(visible(str(path)))


def _line(each: Candidate, found: Sweep) -> list[str]:
    sizes = [each.name, shown_size(each.file_bytes), shown_size(each.memory_bytes)]
    if each.interval is None or each.speed is None:
        return [*sizes, "", "", "", "", "", "does not fit"]
    metric, interval = found.metric, each.interval
    beside = each.compared.verdict if each.compared else ""
    return [
        *sizes,
        metric.shown(interval.value),
        f"[{metric.shown(interval.low)}, {metric.shown(interval.high)}]",
        beside,
        f"{each.speed.prefill:,.0f}",
        f"{each.speed.decode:,.1f}",
        "picked" if each.name == found.picked.name else "",
    ]
