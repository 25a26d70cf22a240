"""Prompts made of columns: what is a column, what is a brace, and what a stranger's template cannot reach."""

from __future__ import annotations

from typing import Any

import pytest

from edgelora.batch_template import PromptTemplate
from edgelora.errors import SettingsError

RENDERED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a column": ("Classify: {text}", {"text": "It broke."}, "Classify: It broke."),
    "twice": ("{a}{b}{a}", {"a": "x", "b": "y"}, "xyx"),
    "braces": ('{{"text": "{text}"}}', {"text": "x"}, '{"text": "x"}'),
    "a value with braces": ("{text}", {"text": "{other} {{"}, "{other} {{"),
    "a number": ("{n} of {m}", {"n": 3, "m": 0.5}, "3 of 0.5"),
    "null": ("<{n}>", {"n": None}, "<>"),
    "a list": ("{tags}", {"tags": ["é", 1, True]}, '["é", 1, true]'),
    "a name with spaces and dots": ("{the text}{a.b}", {"the text": "x", "a.b": "y"}, "xy"),
}


@pytest.mark.parametrize("case", RENDERED)
def test_columns_become_a_prompt(case: str) -> None:
    template, row, prompt = RENDERED[case]
    assert PromptTemplate(template).render(row) == prompt


def test_an_empty_cell_of_a_known_column_is_the_empty_text() -> None:
    assert PromptTemplate("<{a}>").render({"b": "x"}, ("a", "b")) == "<>"
    with pytest.raises(SettingsError, match=r"names {a}; the columns are b"):
        PromptTemplate("<{a}>").render({"b": "x"})


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{text}}", "{{text}", "{a{b}}"])
def test_a_single_brace_is_refused_with_its_place(template: str) -> None:
    with pytest.raises(SettingsError, match=r"a single [{}] at character \d"):
        PromptTemplate(template)


def test_a_template_without_columns_is_refused() -> None:
    with pytest.raises(SettingsError, match="every row would get the same prompt"):
        PromptTemplate("Hello {{text}}!")


@pytest.mark.parametrize("name", ["text.__class__", "text[0]", "text!r", "text:>10", "0", "text.upper()"])
def test_no_attribute_index_or_format_is_followed(name: str) -> None:
    with pytest.raises(SettingsError, match="the columns are label, text"):
        PromptTemplate(f"{{{name}}}").render({"text": "x", "label": "y"})


def test_many_columns_are_not_all_listed() -> None:
    with pytest.raises(SettingsError, match="and 80 more"):
        PromptTemplate("{x}").check([f"c{n:03}" for n in range(100)])
