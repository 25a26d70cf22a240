"""`adapter_config.json`, as PEFT writes it: which method an adapter is, and the settings that say what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.peft_patterns import Patterns
from converters.peft_settings import COMMON_FREE, OFF, Setting, short

FILE_NAME = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter folder's configuration says.

    Attributes:
        peft_type: the method's name in PEFT ("LORA").
        values: all of the file.
        settings: those of the method, valid, with PEFT's defaults where the file has none.
        is_valid: `settings` are those of the file; otherwise they are defaults, and say nothing.
        problems: settings that cannot be kept, each with its reason.
    """

    path: Path
    peft_type: str
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    is_valid: bool = True
    problems: tuple[str, ...] = ()

    @property
    def base_model(self) -> str:
        return str(self.values.get("base_model_name_or_path") or "")

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def of_module(self, key: str, pattern: str, module: str) -> Any:
        """A setting as a pattern ("rank_pattern") overrides it for one module."""
        if not pattern:
            return self.settings[key]
        return self.settings[pattern].get(self._patterns_of(pattern).key(module), self.settings[key])

    def rivals(self, pattern: str, module: str) -> str:
        """Patterns that would give a module different values; "" where there are none.

        PEFT takes the first that matches, and saves them sorted: in training it may have been another one.
        """
        values = self.settings[pattern]
        found = self._patterns_of(pattern).keys(module)
        if len({values[key] for key in found}) < 2:
            return ""
        return " and ".join(f"{short(key)} ({values[key]})" for key in found)

    def _patterns_of(self, pattern: str) -> Patterns:
        return self._patterns.get(pattern) or self._patterns.setdefault(pattern, Patterns(self.settings[pattern]))

    @cached_property
    def _patterns(self) -> dict[str, Patterns]:
        return {}


def read_peft_config(folder: Path) -> PeftConfig:
    """Read `adapter_config.json`; its settings are still to be understood (`with_settings`).

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not JSON.
    """
    path = folder / FILE_NAME
    values = read_json(path)
    return PeftConfig(path, str(values.get("peft_type")), values, {})


def with_settings(
    config: PeftConfig, settings: Mapping[str, Setting], free: tuple[str, ...], refused: Mapping[str, str]
) -> PeftConfig:
    """The configuration with its method's settings checked. See `methods.Method` for the arguments."""
    given = {key: setting.default if config.values.get(key) is None else config.values[key]
             for key, setting in settings.items()}  # fmt: skip
    wrong = [
        f"{key} is {short(given[key])}: {problem}"
        for key, setting in settings.items()
        if (problem := setting.problem(given[key]))
    ]
    unknown = _unknown(config.values, {*settings, *free, *COMMON_FREE}, refused)
    valid = {key: setting.default for key, setting in settings.items()} if wrong else given
    return PeftConfig(config.path, config.peft_type, config.values, valid, not wrong, (*unknown, *wrong))


def _unknown(values: Mapping[str, Any], known: set[str], refused: Mapping[str, str]) -> list[str]:
    return [
        f"{key} is {short(value)}: {refused[key]}"
        if key in refused
        else f"unknown setting {key if key.isprintable() else ascii(key)} = {short(value)}"
        for key, value in sorted(values.items())
        if key not in known and value not in OFF
    ]
