"""`edgelora eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import (
    FILE,
    adapter_option,
    base_option,
    config_option,
    context_options,
    force_option,
    sampling_of,
    sectioned,
    template_option,
)
from edgelora.cli.progress import count_bar
from edgelora.cli.screen import cell, print_columns
from edgelora.cli.visible import visible

if TYPE_CHECKING:
    from edgelora.evaluation.evaluate import Evaluation
    from edgelora.evaluation.judge import Judge
    from edgelora.evaluation.settings import EngineSettings
    from edgelora.evaluation.text_perplexity import TextEvaluation
    from edgelora.evaluation.thresholds import Threshold

# Headings of the help, and which options are under each; those of no heading come first.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Rows": ("prompt", "reference", "system", "limit", "sample"),
    "Metrics": ("metrics", "function", "minimum", "maximum", "resamples"),
    "A judge": ("judge", "judge_model", "judge_mode", "judge_key_env"),
    "Replies": ("temperature", "max_tokens", "seed", "schema", "stop", "parallel"),
    "Perplexity on a plain text": ("text", "chunk_size", "chunks"),
    "Engine": ("ctx_size", "threads", "gpu_layers", "kv_type", "chat_template", "force"),
}
# What only one of the two ways to evaluate reads.
OF_ROWS = (*SECTIONS["Rows"], "metrics", "function", *SECTIONS["A judge"], "out", "ctx_size", "kv_type", "temperature",
           "max_tokens", "schema", "stop", "parallel")  # fmt: skip
OF_TEXT = ("chunk_size", "chunks")


@click.command("eval", cls=sectioned(SECTIONS))
@click.argument("data", type=FILE, required=False)
@base_option
@adapter_option
@click.option("--against", type=FILE, multiple=True, metavar="GGUF",
              help="Another quantization of the base: what it costs, or gains; repeat for several.")  # fmt: skip
@click.option("-o", "--out", type=FILE, metavar="DIR", help="Folder for results, rows and a page; work is kept there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--prompt", metavar="TEMPLATE", help="Make prompts of columns: 'Classify: {text}'.")
@click.option("--reference", metavar="TEMPLATE", help="Make references of columns: '{category}'.")
@click.option("--system", help="System prompt for rows without one, instead of the adapter's own.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Evaluate the first so many rows.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Evaluate so many rows, drawn by --seed.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME",
              help="perplexity, exact-match, contains, regex=PATTERN, f1, rouge-l, json, json-fields or accuracy; "
              "repeat for several.  [default: as the references suggest]")  # fmt: skip
@click.option("--function", metavar="FILE.py:NAME", help="A metric of your own: def NAME(reply, reference, row).")
@click.option("--min", "minimum", multiple=True, metavar="METRIC=VALUE",
              help="End with exit code 1 where an adapter has less; support:f1=80% means one of them.")  # fmt: skip
@click.option("--max", "maximum", multiple=True, metavar="METRIC=VALUE", help="The same where it has more.")
@click.option("--resamples", type=click.IntRange(min=100), default=2000, show_default=True, metavar="N",
              help="Of the bootstrap.")  # fmt: skip
@click.option("--judge", metavar="URL", help="A model that judges, behind an OpenAI-compatible API: http://host/v1.")
@click.option("--judge-model", metavar="NAME", default="", help="Its name there.")
@click.option("--judge-mode", type=click.Choice(["score", "pairwise"]), default="score", show_default=True,
              help="A score from 1 to 10; or each adapter beside the base, in both orders.")  # fmt: skip
@click.option("--judge-key-env", metavar="VARIABLE", default="",
              help="Environment variable with the API's key; without, none is sent.")  # fmt: skip
@click.option("--temperature", type=float, help="0 is greedy.  [default: 0]")
@click.option("--max-tokens", type=int, help="End a reply after this many tokens.  [default: 512]")
@click.option("--seed", type=int, help="Of sampling, --sample and the bootstrap.  [default: 0]")
@click.option("--schema", type=FILE, help="A JSON schema (a file) that each reply fits.")
@click.option("--stop", multiple=True, help="End a reply at this string; repeat for several.")
@click.option("--parallel", type=click.IntRange(1, 256), metavar="N",
              help="Replies that are written at the same time.  [default: at most 8, as memory allows]")  # fmt: skip
@click.option("--perplexity", "text", type=FILE, metavar="TEXT",
              help="Instead of DATA: read a text in windows, as llama-perplexity does.")  # fmt: skip
@click.option("--chunk-size", type=click.IntRange(min=16), default=512, show_default=True, metavar="N",
              help="Tokens in a window.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Windows to read.  [default: all]")
@template_option
@context_options
@force_option
@config_option
def command(
    data: Path | None,
    base: Path | None,
    adapters: tuple[AdapterRef, ...],
    against: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    text: Path | None,
    minimum: tuple[str, ...],
    maximum: tuple[str, ...],
    **options: Any,
) -> None:
    """Score a base and adapters side by side.

    DATA has rows as training takes them: the last reply of each is the reference. Every adapter is compared with the
    bare base, by paired bootstrap over the rows: better, worse or the same. With --against, all of it is done on
    another quantization as well. With -o, a run that was stopped goes on where it ended.

    \b
    Examples:
      edgelora eval held-out.jsonl --adapter support.gguf
      edgelora eval held-out.jsonl --base base-q8_0.gguf --adapter a.gguf --adapter b.gguf -o results/
      edgelora eval test.csv --prompt 'Classify: {text}' --reference '{category}' --adapter a.gguf --min accuracy=0.9
      edgelora eval held-out.jsonl --base base-f16.gguf --adapter support.gguf --against base-q4_k_m.gguf
      edgelora eval held-out.jsonl --adapter support.gguf --judge http://localhost:8000/v1 --judge-model big
      edgelora eval --perplexity wiki.test.raw --base base-q4_k_m.gguf
    """
    from edgelora.evaluation.thresholds import Threshold

    if (data is None) == (text is None):
        raise click.UsageError("name a DATA file, or a text with --perplexity" if data is None else
                               "DATA and --perplexity: one at a time")  # fmt: skip
    if unread := typed(OF_TEXT if text is None else OF_ROWS):
        raise click.UsageError(f"{unread}: for rows, and --perplexity reads a text" if text is not None else
                               f"{unread}: for a text, and DATA has rows: give --perplexity TEXT")  # fmt: skip
    thresholds = tuple(Threshold.parse(each, is_least=True) for each in minimum)
    thresholds += tuple(Threshold.parse(each, is_least=False) for each in maximum)
    if text is not None:
        failures = _text(text, base, adapters, against, thresholds, as_json=as_json, **options)
    else:
        assert data is not None
        failures = _rows(data, base, adapters, against, thresholds, as_json=as_json, out=out, **options)
    for failure in failures:
        click.secho(visible(failure), err=True, fg="red")
    if failures:
        click.get_current_context().exit(1)


def typed(names: Sequence[str]) -> str:
    """Those of the options that are on the command line, as they are spelt there."""
    context = click.get_current_context()
    return ", ".join(
        option.opts[-1]
        for option in context.command.params
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    )


def _rows(
    data: Path,
    base: Path | None,
    adapters: Sequence[AdapterRef],
    against: Sequence[Path],
    thresholds: tuple[Threshold, ...],
    *,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> Sequence[str]:
    from edgelora.evaluation.evaluate import EvalSettings, Listeners, evaluate
    from edgelora.evaluation.results import to_dict, write_results
    from edgelora.evaluation.rows import RowSettings

    seed = options["seed"] or 0
    settings = EvalSettings(
        rows=RowSettings(
            options["prompt"], options["reference"], options["system"], options["limit"], options["sample"], seed
        ),
        metrics=options["metrics"],
        function=options["function"],
        judge=_judge(options),
        thresholds=thresholds,
        seed=seed,
        resamples=options["resamples"],
        folder=out,
        engine=engine_settings(options),
    )
    with count_bar("Evaluating", "answers") as bar:
        listeners = Listeners(bar.update, lambda notice: click.secho(visible(notice), err=True, dim=True))
        found = evaluate(data, base, adapters, against, settings, listeners)
    if out:
        *_, page = write_results(out, found)
        click.echo(f"{page}", err=True)
    if as_json:
        click.echo(json.dumps(to_dict(found), indent=2, ensure_ascii=False))
    else:
        print_evaluation(found)
    _print_account(found)
    return found.failures


def engine_settings(options: Mapping[str, Any]) -> EngineSettings:
    """Of the command's options."""
    from edgelora.evaluation.settings import EngineSettings

    return EngineSettings(
        sampling=sampling_of(
            {name: options.get(name) for name in ("temperature", "max_tokens", "seed", "schema", "stop")}
        ),
        n_ctx=options["ctx_size"],
        threads=options["threads"],
        gpu_layers=options["gpu_layers"],
        kv_type=options["kv_type"],
        chat_template=options["chat_template"],
        parallel=options["parallel"],
        force=options["force"],
    )


def _judge(options: Mapping[str, Any]) -> Judge | None:
    from edgelora.evaluation.judge import Judge
    from edgelora.evaluation.judge_client import JudgeClient

    if not options["judge"]:
        if given := typed(SECTIONS["A judge"]):
            raise click.UsageError(f"{given} goes with --judge")
        return None
    client = JudgeClient(options["judge"], options["judge_model"], options["judge_key_env"])
    return Judge(client, options["judge_mode"])


def print_evaluation(found: Evaluation) -> None:
    """Every metric, with a line for each variant."""
    from edgelora.evaluation.table import table

    for metric, lines in table(found):
        print_metric(metric.name, lines, is_lower_better=metric.is_lower_better)
    for name, confusion in found.confusions.items():
        if mistakes := confusion.mistakes(5):
            said = ", ".join(f"{cell(label)} as {cell(answer)} ({count})" for label, answer, count in mistakes)
            click.echo(f"  {cell(name)} mistakes: {said}")
    for name, shares in found.fields.items():
        worst = sorted(shares, key=lambda field: (shares[field], field))[:5]
        click.echo(f"  {cell(name)} fields: {', '.join(f'{cell(field)} {shares[field]:.1%}' for field in worst)}")


def _print_account(found: Evaluation) -> None:
    """How long it took, which replies were cut, and which rows could not be measured."""
    from edgelora.evaluation.table import n_cut

    before = f", {found.n_before:,} answers from before" if found.n_before else ""
    click.echo(f"{len(found.rows):,} rows in {found.seconds:.1f} s{before}", err=True)
    limit, notes = found.settings.engine.asked["max_tokens"], []
    for variant in found.variants:
        if cut := n_cut(found, variant):
            notes.append(f"{variant.name}: of {len(found.rows)} replies, {cut} cut at {limit} tokens (--max-tokens)")
    for name, measured in found.measured.items():
        without = {variant: len(found.rows) - each.n_rows for variant, each in measured.items()}
        notes += [f"{variant}: {count} rows have no {name}" for variant, count in without.items() if count]
    for note in notes:
        click.secho(visible(note), err=True, fg="yellow")


def print_metric(name: str, lines: Sequence[Sequence[str]], *, is_lower_better: bool) -> None:
    click.secho(f"{name}{' (lower is better)' if is_lower_better else ''}", bold=True)
    print_columns([[cell(each) for each in line] for line in lines], right=(1, 3))


def _text(
    text: Path,
    base: Path | None,
    adapters: Sequence[AdapterRef],
    against: Sequence[Path],
    thresholds: tuple[Threshold, ...],
    *,
    as_json: bool,
    **options: Any,
) -> Sequence[str]:
    from edgelora.evaluation.text_perplexity import TextSettings, evaluate_text

    settings = TextSettings(
        chunk_size=options["chunk_size"],
        chunks=options["chunks"],
        threads=options["threads"],
        gpu_layers=-1 if options["gpu_layers"] is None else options["gpu_layers"],
        chat_template=options["chat_template"],
        thresholds=thresholds,
        seed=options["seed"] or 0,
        resamples=options["resamples"],
        force=options["force"],
    )
    with count_bar("Reading", "windows") as bar:
        found = evaluate_text(
            text, base, adapters, against, settings, lambda name, done, total: bar.update(done, total, name)
        )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print_text(found)
    return found.failures


def _print_text(found: TextEvaluation) -> None:
    from edgelora.evaluation.table import shown_comparison

    lines = [
        [variant.name, str(found.perplexities[variant.name]), *shown_comparison(found.measured[variant.name])[:3]]
        for variant in found.variants
    ]
    print_metric("perplexity", lines, is_lower_better=True)
    first = found.perplexities[found.variants[0].name]
    click.echo(f"  over {first.n_tokens:,} tokens in {first.n_chunks:,} windows", err=True)
