"""Settings of a PEFT method in `adapter_config.json`: what each must be, and what stands for one that is absent.

A method names every key that its configuration class in PEFT has, in one of three groups: those that say what the
saved tensors mean (`Setting`), those of training alone, and those that must be off. A key in none of them is refused
by name, unless its value says "off": a newer PEFT may mean anything by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from converters.peft_patterns import MATCH, is_name, too_many

MAX_QUANTIFIERS = 3
F32_MAX = 3.4e38
OFF: tuple[Any, ...] = (None, False, [], {}, "", "none")

# Of every method: they say where the adapter was, and its tensors show that themselves.
COMMON_FREE = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One key.

    Attributes:
        default: PEFT's own, for a file without the key.
        problem: a value to what is wrong with it; "" for nothing.
    """

    default: Any
    problem: Callable[[Any], str]


def _one(default: Any, is_valid: Callable[[Any], bool], expected: str) -> Setting:
    return Setting(default, lambda value: "" if is_valid(value) else f"expected {expected}")


def rank(default: int) -> Setting:
    return _one(default, _is_rank, "a whole number, 1 or more")


def number(default: float) -> Setting:
    return _one(default, _is_number, "a number")


def whole(default: int) -> Setting:
    return _one(default, lambda value: type(value) is int and value >= 0, "a whole number, 0 or more")


def seed(default: int) -> Setting:
    """Of torch's generator."""
    return _one(default, lambda value: type(value) is int and -(2**63) <= value < 2**64, "a whole number of 64 bits")


def flag(default: bool) -> Setting:
    return _one(default, lambda value: isinstance(value, bool), "true or false")


def choice(default: Any, *values: Any) -> Setting:
    known = ", ".join(map(repr, values))
    return _one(default, lambda given: any(given == v and type(given) is type(v) for v in values), f"one of {known}")


def names() -> Setting:
    """Modules: a list of names, or one regular expression; see `is_target`."""
    return Setting((), lambda value: _names_problem(value))


def token_ids() -> Setting:
    return _one((), _are_ids, "a list of token ids")


def rank_pattern() -> Setting:
    return Setting({}, lambda value: _pattern_problem(value, _is_rank, "ranks"))


def number_pattern() -> Setting:
    return Setting({}, lambda value: _pattern_problem(value, _is_number, "numbers"))


def is_target(names: str | list[str] | tuple[str, ...], module: str) -> bool:
    """Whether a module is one of `names`, as `check_target_module_exists` (peft/tuners/tuners_utils.py) sees it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


@cache
def is_safe_expression(pattern: str) -> bool:
    """Whether a pattern for whole names is a regular expression that takes no exponential time."""
    return not _expression_problem(pattern, pattern)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= F32_MAX


def _are_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _names_problem(value: Any) -> str:
    if isinstance(value, str):
        return _expression_problem(value, value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        return "expected a list of names, or a regular expression"
    return ""


def _pattern_problem(value: Any, is_valid: Callable[[Any], bool], what: str) -> str:
    if not isinstance(value, dict) or not all(is_valid(item) for item in value.values()):
        return f"expected regular expressions to {what}"
    if problem := too_many(value):
        return problem
    wrong = (
        (pattern, problem)
        for pattern in value
        if not is_name(pattern) and (problem := _expression_problem(pattern, MATCH.format(pattern)))
    )
    return "; ".join(f"{short(pattern)}: {problem}" for pattern, problem in wrong)


def _expression_problem(pattern: str, whole_expression: str) -> str:
    """Why a pattern is not used: what it becomes must be an expression, and one that takes no exponential time."""
    try:
        re.compile(whole_expression)
    except (re.error, OverflowError, RecursionError) as error:
        return f"no regular expression for a module's name ({error})"
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # without escapes and classes
    if re.search(r"\)\s*[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > MAX_QUANTIFIERS:
        return "its quantifiers are nested or too many; write the modules' names out"
    return ""


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
