"""`edgelora show`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.screen import (
    Row,
    cell,
    looking,
    print_card,
    print_notices,
    shown_count,
    shown_path,
    shown_size,
)

if TYPE_CHECKING:
    from edgelora.adapter_description import AdapterDescription, CertificateSummary, Exactness, ModuleGroup
    from edgelora.base_description import BaseDescription, BundledDescription
    from edgelora.description import Description, Fit, TemplateSummary
    from edgelora.peft_description import PeftDescription

MAX_LINES = 6  # of one row: the screen stays one
MAX_TEXT = 160
_TRAINING_FIRST = ("method", "rank", "alpha", "rows", "steps", "loss", "eval_loss", "epochs", "learning_rate")
_HASH = re.compile(r"[0-9a-f]{64}")


@click.command("show")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(file: str, as_json: bool) -> None:
    """Show what a base or an adapter is, on one screen.

    FILE is a GGUF base (also one part of several), a GGUF adapter, a Hugging Face model folder, a PEFT adapter
    folder, or a name from `edgelora list`. No weights are read but the norms.

    \b
    Examples:
      edgelora show support.gguf
      edgelora show my-model/ --json
    """
    from edgelora.description import describe, to_dict
    from edgelora.registration import find
    from edgelora.store import Store

    store = Store()
    with looking() as told:
        description = describe(find(store, file), store, told)
    if as_json:
        click.echo(json.dumps({**to_dict(description), "store_notices": store.notices}, indent=2))
        return
    print_card(description.name, f"{description.kind}, {shown_path(description.path)}", _rows(description))
    print_notices(store.notices)


def _rows(description: Description) -> Iterable[Row]:
    from edgelora.adapter_description import AdapterDescription
    from edgelora.base_description import BaseDescription

    if isinstance(description, BaseDescription):
        return _base(description)
    return _adapter(description) if isinstance(description, AdapterDescription) else _peft(description)


def _base(base: BaseDescription) -> list[Row]:
    files = f" in {base.n_files} files" if base.n_files > 1 else ""
    ties = {True: "tied: the output is the embeddings", False: "not tied: the output has weights of its own", None: ""}
    return [
        ("architecture", cell(base.architecture)),
        ("parameters", shown_count(base.parameters)),
        ("size", shown_size(base.size_bytes) + files),
        ("quantization", cell(f"{base.quantization}: {_counts(base.tensor_types)}")),
        ("context", _number(base.sizes, "context_length", "tokens")),
        ("layers", _layers(base.sizes)),
        ("vocabulary", _vocabulary(base)),
        ("embeddings", ties[base.is_tied]),
        ("template", _template(base.template, "none: a base that was not taught to chat")),
        ("fingerprint", base.fingerprint),
        ("merged", cell(", ".join(base.merged))),
        ("inside", _lines(_inside(adapter) for adapter in base.bundled)),
        ("adapters", "" if base.bundled else _fits(base.adapters) or "none known that fit"),
        ("notices", _lines(base.notices)),
        ("problem", base.problem),
        ("use", base.use),
    ]


def _inside(adapter: BundledDescription) -> str:
    scale = f", scale {adapter.scale:g}" if adapter.scale != 1.0 else ""
    training = _training(adapter.training)
    return cell(
        f"{adapter.name}: {adapter.token} (token {adapter.token_id}){scale}{f'; {training}' if training else ''}"
    )


def _layers(sizes: Mapping[str, Any]) -> str:
    parts = [
        _number(sizes, "layers", ""),
        _number(sizes, "heads", "heads") + (f" ({_spread(sizes['heads_kv'])} for keys and values)"
                                            if "heads_kv" in sizes else ""),
        _number(sizes, "embedding_length", "wide"),
        _number(sizes, "feed_forward_length", "in the feed-forward"),
        _number(sizes, "experts", "experts"),
    ]  # fmt: skip
    return ", ".join(part for part in parts if part)


def _vocabulary(base: BaseDescription) -> str:
    count = f"{base.vocabulary_size:,} tokens" if base.vocabulary_size is not None else ""
    return cell(f"{count} ({base.tokenizer})" if base.tokenizer else count)


def _adapter(adapter: AdapterDescription) -> list[Row]:
    contract_rows = [
        ("template", _template(adapter.template, "none: the base's own is used")),
        ("golden ids", f"{adapter.golden_tokens} tokens, compared where it is loaded" if adapter.golden_tokens else ""),
        ("stops at", ", ".join(json.dumps(stop, ensure_ascii=False) for stop in adapter.stop)),
        ("sampling", _settings(adapter.sampling)),
        ("system", _short(adapter.system)),
        ("training", _training(adapter.training)),
        ("exactness", _exactness(adapter.exactness)),
        ("certificate", _certificate(adapter.certificate) or "none"),
    ]
    silent = [("contract", "none: it does not say its base, template or stops, and those cannot be checked")]
    return [
        ("wants", _wanted(adapter.base_name, adapter.base_fingerprint)),
        ("fits", _fits(adapter.bases) or _no_base(adapter.base_fingerprint)),
        ("architecture", cell(adapter.architecture)),
        ("method", cell(adapter.method)),
        ("modules", _groups(adapter.groups, adapter.scales_from)),
        ("size", f"{shown_size(adapter.size_bytes)}, {adapter.n_tensors} tensors: {_counts(adapter.dtypes)}"),
        ("acts after", f"tokens {' '.join(map(str, adapter.invocation_tokens))} (activated LoRA)"
         if adapter.invocation_tokens else ""),
        *(contract_rows if adapter.has_contract else silent),
        ("use", adapter.use),
    ]  # fmt: skip


def _peft(adapter: PeftDescription) -> list[Row]:
    numbers = f", {shown_count(adapter.parameters)} parameters" if adapter.parameters is not None else ""
    tensors = f", {adapter.n_tensors} tensors: {_counts(adapter.dtypes)}" if adapter.n_tensors else ""
    targets = adapter.target_modules
    return [
        ("base", _wanted(adapter.base_name, adapter.base_fingerprint)),
        ("fits", _fits(adapter.bases) or _no_base(adapter.base_fingerprint or adapter.base_name)),
        ("method", cell(adapter.method)),
        ("rank", _plain(adapter.rank)),
        ("alpha", _plain(adapter.alpha)),
        ("targets", cell(", ".join(map(str, targets))) if isinstance(targets, list) else _plain(targets)),
        ("rank pattern", _plain(adapter.rank_pattern)),
        ("alpha pattern", _plain(adapter.alpha_pattern)),
        ("initialised", "as usual" if adapter.init is True else _plain(adapter.init)),
        ("settings", _settings(adapter.settings)),
        ("size", f"{shown_size(adapter.size_bytes)}{numbers}{tensors}"),
        (
            "contract",
            "edgelora.json beside it" if adapter.has_contract else "none: the base's template and stops will be used",
        ),
        ("template", _template(adapter.template, "")),
        ("stops at", ", ".join(json.dumps(stop, ensure_ascii=False) for stop in adapter.stop)),
        ("system", _short(adapter.system)),
        ("training", _training(adapter.training)),
        ("certificate", _certificate(adapter.certificate)),
        ("problem", adapter.problem),
        ("convert", adapter.convert),
        ("use", adapter.use),
    ]


def _wanted(name: str, fingerprint: str) -> str:
    mark = f"  fingerprint {fingerprint[:12]}" if fingerprint else ""
    return cell((name or ("a base it does not name" if fingerprint else "")) + mark)


def _no_base(wanted: str) -> str:
    return "no base known here: `edgelora add FOLDER` if you have it" if wanted else ""


def _fits(found: Iterable[Fit]) -> str:
    return _lines(f"{cell(fit.name)}  {cell(fit.detail)}  {shown_path(fit.path)}" for fit in found)


def _groups(groups: Iterable[ModuleGroup], scales_from: str) -> str:
    """Groups of the same rank and scale on one line: "attn_q attn_k: rank 8, scale 2, 4 of each"."""
    alike: dict[str, list[str]] = {}
    for group in groups:
        scale = f"scale {_spread(group.scales)}" if scales_from != "folded into B" else "scale folded into B"
        alike.setdefault(f"rank {_spread(group.ranks)}, {scale}, {group.n_modules} of each", []).append(group.name)
    return _lines(cell(f"{' '.join(names)}: {what}") for what, names in alike.items())


def _exactness(report: Exactness | None) -> str:
    if report is None:
        return "not reported"
    parts = [
        report.kind,
        f"rounding {report.rounding:.1e}" if report.rounding is not None else "",
        f"error at most {report.max_error:.2%} of the change" if report.max_error is not None else "",
    ]
    worst = [f"{name} leaves out {energy:.2%} of its change" for name, energy in report.worst.items()]
    return _lines(cell(line) for line in [", ".join(part for part in parts if part), *worst])


def _certificate(certificate: CertificateSummary | None) -> str:
    if certificate is None:
        return ""
    probes = "1 probe" if certificate.n_probes == 1 else f"{certificate.n_probes} probes"
    return f"{certificate.problem or probes}, {shown_size(certificate.size_bytes)}"


def _template(template: TemplateSummary | None, otherwise: str) -> str:
    if template is None:
        return otherwise
    known = f"{template.name}, " if template.name else ""
    return f"{known}{template.n_characters:,} characters, sha256 {template.sha256[:12]}\n{cell(template.first_line)}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _number(sizes: Mapping[str, Any], name: str, unit: str) -> str:
    return f"{_spread(sizes[name])} {unit}".rstrip() if name in sizes else ""


def _spread(value: Any) -> str:
    """A number, or the range that a list of numbers covers."""
    items = sorted(value) if isinstance(value, (list, tuple)) else [value]
    ends = [f"{item:,}" if isinstance(item, int) else f"{item:g}" for item in (items[0], items[-1])] if items else [""]
    return ends[0] if ends[0] == ends[-1] else " to ".join(ends)


def _settings(values: Mapping[str, Any]) -> str:
    return _short(", ".join(f"{key} {_plain(value)}" for key, value in values.items()), 2 * MAX_TEXT)


def _training(values: Mapping[str, Any]) -> str:
    """The figures people ask for come first; versions of packages are in the JSON."""
    first = {key: values[key] for key in _TRAINING_FIRST if key in values}
    return _settings(first | {key: value for key, value in values.items() if key != "versions"})


def _plain(value: Any) -> str:
    if value in (None, "", [], {}):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:12]
    return _short(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _short(text: str, longest: int = MAX_TEXT) -> str:
    line = cell(text)
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _lines(lines: Iterable[str]) -> str:
    """At most `MAX_LINES`, and how many more there are."""
    all_lines = list(lines)
    more = [f"and {len(all_lines) - MAX_LINES} more"] if len(all_lines) > MAX_LINES else []
    return "\n".join([*all_lines[:MAX_LINES], *more])
