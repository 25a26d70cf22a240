"""What becomes of every adapter, measured: tests/equivalence/measured.json, from which the README's tables are made.

    python -m bench.adapters_table

Each adapter is made by PEFT with random weights on a tiny base, merged and converted with the default settings; errors
are of the change in logits, llama.cpp's beside PEFT's own. The tests hold the file to what they measure themselves.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from tests.contracts.adapter_tables import MEASURED
from tests.equivalence import table_cases
from tests.equivalence.outcomes import Bases, Outcome
from tests.equivalence.table_rows import OTHERS, Outcomes, both_of_case


def described(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": outcome.kind}
    if outcome.reason:
        return {**found, "reason": outcome.why}
    found["error"] = float(f"{outcome.error:.1e}")
    return {**found, "stated": float(f"{outcome.stated:.1e}")} if outcome.stated else found


def row(outcomes: Outcomes) -> dict[str, Any]:
    adapter, merged = outcomes
    return {"adapter": described(adapter), "merged": described(merged)}


def measure(folder: Path) -> dict[str, Any]:
    bases, names = Bases(folder / "bases"), table_cases.named_rows()
    methods = {}
    for number, (name, case) in enumerate(table_cases.CASES.items()):
        about = {"peft_type": table_cases.peft_type(case), "title": names.get(name, ""), "model": case.model}
        methods[name] = about | row(both_of_case(case, bases, folder / f"case-{number}"))
    others = {name: row(make(bases, folder / f"row-{number}")) for number, (name, make) in enumerate(OTHERS.items())}
    return {"methods": methods, "others": others}


def a_row_a_line(tables: dict[str, dict[str, Any]]) -> str:
    """JSON whose lines are rows: a row that is measured anew changes one."""
    parts = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(row)}" for key, row in rows.items())
        + "\n}"
        for name, rows in tables.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


def main() -> None:
    warnings.simplefilter("ignore")  # of PEFT, about its own methods
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    MEASURED.write_text(a_row_a_line(found), encoding="utf-8")


if __name__ == "__main__":
    main()
