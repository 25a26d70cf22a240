"""Metrics of single replies, against values that the papers print and slow implementations of their formulas."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from edgelora.errors import DataFileError, EdgeloraError, SettingsError
from edgelora.evaluation.json_fields import NotJSONError, field_counts, field_shares, fields_of, is_json, parse_json
from edgelora.evaluation.labels import NO_LABEL, Confusion, Labels
from edgelora.evaluation.own_function import OwnFunction
from edgelora.evaluation.pattern import Pattern
from edgelora.evaluation.text_overlap import (
    common_subsequence,
    contains,
    exact_match,
    rouge_l,
    rouge_tokens,
    squad_tokens,
    token_f1,
)


@pytest.mark.parametrize(
    ("candidate", "score"),
    [("police kill the gunman", 0.75), ("the gunman kill police", 0.5), ("the gunman police killed", 0.5)],
)
def test_rouge_l_is_what_lin_prints(candidate: str, score: float) -> None:
    """Lin 2004, section 3.1: sentences S2, S3 and S4 beside S1."""
    assert rouge_l(candidate, "police killed the gunman") == score


def test_rouge_l_has_precision_and_recall() -> None:
    reference = "The quick brown fox jumps over the lazy dog."
    assert rouge_l("the fox jumps", reference) == pytest.approx(2 * 1.0 * (3 / 9) / (1.0 + 3 / 9))
    assert rouge_l(reference.upper(), reference) == 1.0
    assert (rouge_l("", ""), rouge_l("...", "a"), rouge_l("a", "")) == (1.0, 0.0, 0.0)
    assert rouge_tokens("Don't_stop: Ärger 3.5") == ["don", "t", "stop", "ärger", "3", "5"]


def longest(one: list[str], other: list[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def test_the_common_subsequence_is_that_of_the_textbook() -> None:
    rng = random.Random(1)
    for _ in range(200):
        one, other = (rng.choices("abcde", k=rng.randrange(90)) for _ in range(2))
        assert common_subsequence(one, other) == longest(one, other)


@pytest.mark.parametrize(
    ("reply", "reference", "score"),
    [
        ("The Denver Broncos!", "Denver Broncos", 1.0),  # articles and punctuation do not count
        ("Denver", "Denver Broncos", 2 * 1.0 * 0.5 / 1.5),
        ("Broncos of Denver", "Denver Broncos", 2 * (2 / 3) * 1.0 / (2 / 3 + 1)),
        ("to be to be", "to be", 2 * 0.5 * 1.0 / 1.5),  # each word counts as often as both have it
        ("Carolina Panthers", "Denver Broncos", 0.0),
        ("the", "a", 1.0),  # SQuAD's own rule: nothing is left of either
        ("", "Denver", 0.0),
    ],
)
def test_token_f1_is_squads(reply: str, reference: str, score: float) -> None:
    assert token_f1(reply, reference) == pytest.approx(score)


def test_exact_match_and_contains() -> None:
    assert squad_tokens("An APPLE, a day.") == ["apple", "day"]
    assert (exact_match(" yes\n", "yes"), exact_match("Yes", "yes")) == (1.0, 0.0)
    assert (contains("I think it is  IN\nNorway.", "in norway"), contains("Norwegian", "norway")) == (1.0, 0.0)


def test_json_is_json_and_nothing_else() -> None:
    assert [is_json(text) for text in ('{"a": 1}', " [1]\n", '"x"', "null")] == [1.0] * 4
    assert [is_json(text) for text in ("{a: 1}", 'Sure: {"a": 1}', "", "NaN", '{"a": Infinity}', "[" * 9999)] == [
        0.0
    ] * 6
    with pytest.raises(NotJSONError):
        parse_json("{")


def test_fields_are_compared_by_path() -> None:
    reference = '{"name": "Mina", "items": [{"n": 11}, {"n": 2}], "day": null}'
    assert fields_of(json.loads(reference)) == {"name": "Mina", "items.0.n": 11, "items.1.n": 2, "day": None}
    assert field_counts(reference, reference)[:2] == (4, 4)
    right, count, by_path = field_counts(
        '{"name": "Nina", "items": [{"n": 11.0}], "day": null, "colour": "red"}', reference
    )
    assert (right, count) == (2, 5)  # what is made up counts as a field, and what is missing too
    assert by_path == {"name": False, "items.0.n": True, "items.1.n": False, "day": True}
    assert field_counts("no JSON", reference)[:2] == (0, 4)
    assert field_counts('{"a": true}', '{"a": 1}')[0] == 0
    assert field_counts("{}", '{"a": {}}')[:2] == (0, 2)


def test_fields_have_shares_over_rows() -> None:
    rows = [
        ('{"a": 1, "l": [{"n": 1}, {"n": 3}]}', '{"a": 1, "l": [{"n": 1}, {"n": 2}]}'),
        ("nothing", '{"a": 2, "b": null}'),
    ]
    assert field_shares(rows) == {"a": 0.5, "l.*.n": 0.5, "b": 0.0}


def test_labels_are_found_in_replies() -> None:
    labels = Labels(["card", "card_arrival", "Top Up", "card"])
    assert labels.names == ["Top Up", "card", "card_arrival"]
    told = ["card", "Card.", "the category is card_arrival!", "top   up", "**card**"]
    assert [labels.of(text) for text in told] == ["card", "card", "card_arrival", "Top Up", "card"]
    assert [labels.of(text) for text in ("cardboard", "card or top up", "", "discard")] == [NO_LABEL] * 4


def test_a_number_is_no_label_inside_another() -> None:
    labels = Labels(["1", "3", "-2"])
    said = ["3.", "It is 3", "3.5 stars", "about 1,300", "-3", "minus: -1", "-2", "A score of -2!"]
    assert [labels.of(text) for text in said] == ["3", "3", *[NO_LABEL] * 4, "-2", "-2"]
    assert [Labels(["card", "cash"]).of(text) for text in ("1.card", "Answer: -cash")] == ["card", "cash"]


def test_confusions_are_counted() -> None:
    labels = Labels(["a", "b", "c"])
    table = Confusion.of(labels, [("a", "a"), ("a", "b"), ("b", "b"), ("c", "?"), ("a", "b")])
    assert table.counts == {("a", "a"): 1, ("a", "b"): 2, ("b", "b"): 1, ("c", NO_LABEL): 1}
    assert table.recalls == {"a": 1 / 3, "b": 1.0, "c": 0.0}
    # F1: a has precision 1 and recall 1/3, b has 1/3 and 1, c none.
    assert table.macro_f1 == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert table.mistakes(1) == [("a", "b", 2)]


def test_patterns_are_found_or_compared() -> None:
    assert [Pattern(r"\byes\b").score(text, "") for text in ("oh yes!", "eyes")] == [1.0, 0.0]
    answer = Pattern(r"#### (-?[\d,]+)")
    assert answer.score("so 3+4=7\n#### 6\n#### 7", "#### 7") == 1.0  # the last one counts
    assert [answer.score(text, "#### 7") for text in ("#### 8", "7", "")] == [0.0] * 3
    with pytest.raises(SettingsError, match=r"'\(' is no regular expression"):
        Pattern("(")


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import math\n"
        "def polite(reply, reference, row):\n    return 'please' in reply and row['n'] > 1\n"
        "def broken(reply, reference, row):\n    return row['missing']\n"
        "def text(reply, reference, row):\n    return '1'\n"
        "def endless(reply, reference, row):\n    return math.inf\n"
        "def huge(reply, reference, row):\n    return 10**400\n"
        "def leaving(reply, reference, row):\n    raise SystemExit(0)\n"
    )
    polite = OwnFunction.load(f"{path}:polite")
    assert [polite.score("please", "", {"n": n}, "x:1") for n in (1, 2)] == [0.0, 1.0]
    with pytest.raises(EdgeloraError, match=r"broken failed on rows.jsonl:7: KeyError: 'missing'"):
        OwnFunction.load(f"{path}:broken").score("", "", {}, "rows.jsonl:7")
    with pytest.raises(EdgeloraError, match="leaving failed on x:1: SystemExit"):
        OwnFunction.load(f"{path}:leaving").score("", "", {}, "x:1")
    for name in ("text", "endless", "huge"):
        with pytest.raises(EdgeloraError, match=f"{name} returned .* expected a finite number"):
            OwnFunction.load(f"{path}:{name}").score("", "", {}, "x:1")


def test_functions_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def one(reply, reference, row):\n    return 1\n")
    with pytest.raises(SettingsError, match="has no function 'two'; it has one"):
        OwnFunction.load(f"{path}:two")
    for spec in (str(path), f"{path}:"):
        with pytest.raises(SettingsError, match=r"expected FILE\.py:NAME"):
            OwnFunction.load(spec)
    with pytest.raises(DataFileError, match="no such file"):
        OwnFunction.load(f"{tmp_path}/none.py:one")
    path.write_text("1 / 0\n")
    with pytest.raises(DataFileError, match="ZeroDivisionError"):
        OwnFunction.load(f"{path}:one")
    path.write_text("raise SystemExit(0)\n")
    with pytest.raises(DataFileError, match="running it failed: SystemExit"):  # and no exit code that says all is well
        OwnFunction.load(f"{path}:one")
