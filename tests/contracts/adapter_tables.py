"""The README's tables of adapters: from the methods that the code knows, and what became of each when it was measured.

tests/equivalence/measured.json has a row for every case; the tests hold it to what they measure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.methods import METHODS

MEASURED = Path(__file__).parents[1] / "equivalence" / "measured.json"
ALSO = {"MISS": ("BONE",)}  # older names that PEFT saved
EXACT, APPROXIMATE, REFUSED = KINDS = ("exact", "approximate", "refused")
SHOWN = 1e-5  # errors below are float32's
Measured = Mapping[str, Any]


def methods() -> Iterator[str]:
    """One row a method: those that an adapter holds exactly, then the approximated, then the refused."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["methods"]
    named = [row for row in rows.values() if row["title"]]
    names = {row["peft_type"]: (row["peft_type"], *ALSO.get(row["peft_type"], ())) for row in named}
    unchanged = [name for name, method in METHODS.items() if method.read is None]
    if missing := set(METHODS) - {name for several in names.values() for name in several} - set(unchanged):
        raise SystemExit(f"{MEASURED.name} has no row for {', '.join(sorted(missing))}; run: make adapters-table")
    yield from ("| method | `peft_type` | as an adapter | error | merged | error |", "|---|---|---|---|---|---|")
    for row in sorted(named, key=lambda row: (KINDS.index(row["adapter"]["kind"]), row["title"].lower())):
        types = ", ".join(f"`{name}`" for name in names[row["peft_type"]])
        yield f"| {row['title']} | {types} | {_cells(row, _exceptions(row, rows))} |"
    for name in sorted(unchanged, key=lambda name: METHODS[name].title.lower()):
        yield f"| {METHODS[name].title} | `{name}` | refused: {METHODS[name].refusal} | | refused | |"


def others() -> Iterator[str]:
    """One row for everything else that an adapter may be."""
    yield from ("| | as an adapter | error | merged | error |", "|---|---|---|---|---|")
    for name, row in json.loads(MEASURED.read_text(encoding="utf-8"))["others"].items():
        yield f"| {name} | {_cells(row)} |"


def _cells(row: Measured, exceptions: str = "") -> str:
    adapter, merged = row["adapter"], row["merged"]
    is_same = adapter.get("reason") == merged.get("reason")
    return " | ".join(
        (_outcome(adapter) + exceptions, _error(adapter), _outcome(merged, short=is_same), _error(merged))
    )


def _outcome(found: Measured, *, short: bool = False) -> str:
    return f"refused: {found['reason']}" if found["kind"] == REFUSED and not short else str(found["kind"])


def _error(found: Measured) -> str:
    if found["kind"] == REFUSED:
        return ""
    stated = f" (stated {_percent(found['stated'])})" if "stated" in found else ""
    return _percent(found["error"]) + stated


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= SHOWN else f"< {100 * SHOWN:g} %"


def _exceptions(row: Measured, rows: Mapping[str, Measured]) -> str:
    """What other settings of a method come to; a method that several rows share has none."""
    alike = [other for other in rows.values() if other["peft_type"] == row["peft_type"]]
    if sum(bool(other["title"]) for other in alike) > 1:
        return ""
    kinds = {other["adapter"]["kind"] for other in alike} - {row["adapter"]["kind"]}
    found = ["approximate at many ranks"] if APPROXIMATE in kinds and row["adapter"]["kind"] == EXACT else []
    found += ["refused where it changes biases"] if REFUSED in kinds else []
    return "".join(f"; {each}" for each in found)
