"""The installed PEFT has no method and no setting that `converters.methods` does not know; a newer one may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import pytest

from converters.methods import METHODS, Method
from converters.peft_settings import COMMON_FREE

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own dependencies

NOT_OF_PEFT = {"BONE"}  # saved by PEFT 0.14 to 0.17
REFUSED_DEFAULTS = {"UNILORA.save_indices"}  # what PEFT leaves out of the file then cannot be found again


def configurations() -> Mapping[str, tuple[Field[Any], ...]]:
    """PEFT's name of a method to the fields of its configuration class."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: fields(config) for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def unknown(method: Method, config: tuple[Field[Any], ...]) -> set[str]:
    """Settings of a configuration class that are in none of the method's groups."""
    known = {*method.settings, *method.free, *method.refused, *COMMON_FREE}
    return {field.name for field in config} - known


def default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def read() -> Iterator[tuple[str, Method, tuple[Field[Any], ...]]]:
    """Every method that is no refusal."""
    found = ((name, METHODS[name], config) for name, config in configurations().items() if name in METHODS)
    yield from (row for row in found if row[1].read is not None)


def test_every_method_of_peft_is_read_or_refused() -> None:
    from peft.utils.peft_types import PeftType

    assert {kind.value for kind in PeftType} == set(METHODS) - NOT_OF_PEFT
    assert set(configurations()) == set(METHODS) - NOT_OF_PEFT


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_read_or_says_why_not(name: str) -> None:
    method = METHODS[name]
    assert (method.read is None) == bool(method.refusal)
    assert method.title
    assert method.read is None or method.parts or method.shared or name in ("LN_TUNING", "TRAINABLE_TOKENS")


def test_every_setting_of_peft_is_known() -> None:
    assert {name: found for name, method, config in read() if (found := unknown(method, config))} == {}


def test_a_setting_in_no_group_would_be_found() -> None:
    method = METHODS["LORA"]
    without = replace(method, settings={key: value for key, value in method.settings.items() if key != "use_dora"})
    assert unknown(without, configurations()["LORA"]) == {"use_dora"}


def test_no_group_names_a_setting_that_peft_does_not_have() -> None:
    wrong = {}
    for name, method, config in read():
        stale = {*method.settings, *method.free, *method.refused} - {field.name for field in config}
        wrong |= {name: stale} if stale else {}
    assert wrong == {}


def test_no_setting_is_in_two_groups() -> None:
    for name, method, _ in read():
        groups = [*method.settings, *method.free, *method.refused]
        assert len(set(groups)) == len(groups), name


def test_defaults_are_those_of_peft() -> None:
    wrong = {}
    for name, method, config in read():
        for field in config:
            if field.name in method.settings:
                ours, theirs = method.settings[field.name].default, default(field)
                if ours != theirs and (ours or theirs):
                    wrong[f"{name}.{field.name}"] = (ours, theirs)
    assert wrong == {}


def test_defaults_are_valid() -> None:
    wrong = {
        f"{name}.{key}"
        for name, method, _ in read()
        for key, setting in method.settings.items()
        if setting.problem(setting.default)
    }
    assert wrong == REFUSED_DEFAULTS
