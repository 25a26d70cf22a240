"""Preference pairs, in the shapes that TRL and OpenAI have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import DataFileError
from edgelora.preferences import Preference, preference_of, read_preferences
from edgelora.rows import Row

ASKED, YES, NO = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
        {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
        {"prompt": "q", "chosen": [ASKED, YES], "rejected": [ASKED, NO], "score_chosen": 8.0},
        {"input": {"messages": [ASKED], "tools": []}, "preferred_output": [YES], "non_preferred_output": [NO]},
    ],
)
def test_every_shape_gives_the_same_pair(data: dict[str, Any]) -> None:
    assert preference_of(Row(1, data), "x:1") == Preference((ASKED,), (YES,), (NO,), "x:1")


def test_a_conversation_before() -> None:
    before = [SYSTEM, ASKED, YES, ASKED]
    found = preference_of(Row(1, {"chosen": [*before, YES], "rejected": [*before, NO]}), "x:1")
    assert found == Preference((SYSTEM, ASKED, YES, ASKED), (YES,), (NO,), "x:1")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"prompt": "q", "chosen": "yes"}, "no `rejected`; found `prompt`, `chosen`"),
        ({"chosen": "q yes", "rejected": "q no"}, "where the prompt ends cannot be told"),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, "are the same"),
        ({"prompt": "q", "chosen": "yes", "rejected": " "}, "`rejected` is empty"),
        ({"prompt": "q", "chosen": 3, "rejected": "no"}, "`chosen` is not a text"),
        ({"prompt": "q", "chosen": "yes", "rejected": "no \udc00"}, "half of a character"),
        ({"prompt": [ASKED, YES], "chosen": "yes", "rejected": "no"}, "no prompt that ends with the user's turn"),
        ({"prompt": "q", "chosen": [YES], "rejected": [ASKED]}, "`rejected` goes on with no reply"),
        ({"prompt": "q", "chosen": [{"role": "bot"}], "rejected": "no"}, "`chosen`: message 1 has role 'bot'"),
        ({"prompt": "q", "chosen": "yes", "rejected": "no", "tools": [{}]}, "`tools`"),
        ({"input": {"messages": [ASKED]}, "preferred_output": [YES]}, "`non_preferred_output` is not a text"),
        ({"messages": [ASKED, YES]}, "no `chosen` and no `rejected`; found `messages`"),
    ],
)
def test_what_is_no_pair(data: dict[str, Any], told: str) -> None:
    found = preference_of(Row(1, data), "x:1")
    assert isinstance(found, str)
    assert told in found


def test_a_tables_cells_hold_messages_as_json() -> None:
    messages = {"prompt": [ASKED], "chosen": [YES], "rejected": [{"role": "assistant", "content": "no"}]}
    cells = {name: json.dumps(value) for name, value in messages.items()}
    assert preference_of(Row(1, cells), "x:1") == preference_of(Row(1, messages), "x:1")
    found = preference_of(Row(1, {"prompt": "[3, 1]", "chosen": "[1, 3]", "rejected": "[]"}), "x:1")
    assert not isinstance(found, str)
    assert found.chosen[0]["content"] == "[1, 3]"


def test_all_bad_rows_of_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {"prompt": "q"}, good, {})))
    with pytest.raises(DataFileError) as caught:
        read_preferences(path)
    assert [line.split(": ")[0] for line in caught.value.message.splitlines()] == [f"{path}:2", f"{path}:4"]
    path.write_text(json.dumps(good) + "\n")
    assert [pair.source for pair in read_preferences(path)] == [f"{path}:1"]
