"""What an evaluation found, as files.

    results.json    every metric of every variant, with intervals and comparisons
    rows.jsonl      every row: the prompt, the reference, and each variant's reply and values
    report.html     a page to look at
    work.sqlite     what was worked out, for the next run (`work_file`)

Files appear whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError
from edgelora.evaluation.evaluate import Evaluation
from edgelora.evaluation.labels import Confusion
from edgelora.evaluation.report import render_report
from edgelora.evaluation.table import n_cut
from edgelora.evaluation.variants import Variant
from edgelora.version import __version__
from edgelora.whole_file import write_whole


def to_dict(found: Evaluation) -> dict[str, Any]:
    """The whole result as JSON has it, but for single rows."""
    return {
        "edgelora": __version__,
        "data": found.data,
        "rows": len(found.rows),
        "sampling": dict(found.settings.engine.asked),
        "resamples": found.settings.resamples,
        "seed": found.settings.seed,
        "variants": [_variant(found, variant) for variant in found.variants],
        "failures": list(found.failures),
    }


def _variant(found: Evaluation, variant: Variant) -> dict[str, Any]:
    metrics = {name: each[variant.name].to_dict() for name, each in found.measured.items() if variant.name in each}
    confusion = found.confusions.get(variant.name)
    return {
        "name": variant.name,
        "base": str(variant.base),
        "adapter": variant.adapter,
        "compared_with": variant.reference,
        "metrics": metrics,
        "cut_replies": n_cut(found, variant),
        **({"labels": _labels(confusion)} if confusion else {}),
        **({"fields": found.fields[variant.name]} if found.fields else {}),
    }


def _labels(confusion: Confusion) -> dict[str, Any]:
    return {
        "macro_f1": confusion.macro_f1,
        "recall": confusion.recalls,
        "confusion": [
            {"label": label, "said": said, "rows": count} for (label, said), count in sorted(confusion.counts.items())
        ],
    }


def row_dicts(found: Evaluation) -> Iterator[dict[str, Any]]:
    """Every row, with what each variant said and how it was measured."""
    for place, row in enumerate(found.rows):
        yield {
            "line": row.line,
            "messages": list(row.messages),
            "reference": row.reference,
            "variants": {variant.name: _row_of(found, variant, place) for variant in found.variants},
        }


def _row_of(found: Evaluation, variant: Variant, place: int) -> dict[str, Any]:
    answer, values, verdicts = found.answers[variant.name][place], {}, {}
    for name, each in found.measured.items():
        if variant.name in each:
            values[name] = each[variant.name].by_row[place]
            if compared := each[variant.name].comparison:
                verdicts[name] = compared.by_row[place]
    said = {} if answer.reply is None else {"reply": answer.reply, "finish_reason": answer.finish_reason}
    return {**said, "values": values, **({"compared": verdicts} if verdicts else {})}


def write_results(folder: Path, found: Evaluation) -> list[Path]:
    """Write the three files.

    Raises:
        DataFileError: one cannot be written; what was there before is as it was.
    """
    texts = {
        "results.json": json.dumps(to_dict(found), indent=2, ensure_ascii=False) + "\n",
        "rows.jsonl": "".join(_line(row) for row in row_dicts(found)),
        "report.html": render_report(found),
    }
    for name, text in texts.items():
        try:
            write_whole(folder / name, text.encode("utf-8", "replace").decode("utf-8"))
        except OSError as error:
            raise DataFileError(f"{folder / name}: cannot be written ({error.strerror})") from None
    return [folder / name for name in texts]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
