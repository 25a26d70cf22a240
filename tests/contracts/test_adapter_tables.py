"""The README's tables of adapters have a row for every method, and no row that breaks its promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.methods import METHODS
from tests.contracts import adapter_tables
from tests.contracts.adapter_tables import EXACT, MEASURED

EXACT_ERROR = 0.005  # of the change in logits: what "exact" promises
ROWS = json.loads(MEASURED.read_text(encoding="utf-8"))


def test_every_method_has_a_row() -> None:
    table = "\n".join(adapter_tables.methods())
    assert [name for name in METHODS if f"`{name}`" not in table] == []


def test_a_method_that_was_not_measured_stops_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: row for name, row in ROWS["methods"].items() if row["peft_type"] != "VERA"}
    (tmp_path / "measured.json").write_text(json.dumps({**ROWS, "methods": others}))
    monkeypatch.setattr(adapter_tables, "MEASURED", tmp_path / "measured.json")
    with pytest.raises(SystemExit, match="no row for VERA; run: make adapters-table"):
        list(adapter_tables.methods())


@pytest.mark.parametrize("table", ROWS)
def test_what_is_called_exact_is(table: str) -> None:
    outcomes = [outcome for row in ROWS[table].values() for outcome in (row["adapter"], row["merged"])]
    assert [found for found in outcomes if found["kind"] == EXACT and found["error"] >= EXACT_ERROR] == []
    assert sum(found["kind"] == EXACT for found in outcomes) > 20
