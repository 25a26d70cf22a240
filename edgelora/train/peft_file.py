"""A PEFT configuration as a person writes it: a JSON file with `peft_type` and settings of that class.

    {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}

It is what PEFT saves as adapter_config.json, with as much left out as should be PEFT's own default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from converters.methods import METHODS
from edgelora.errors import SettingsError

# What PEFT leaves to a training loop of one's own, which TRL's is not: without it, this would be another method.
OWN_LOOP = {
    "ADALORA": "its ranks are moved between layers by a call after every step (update_and_allocate)",
    "ADAMSS": "its parts are chosen by a call after every step",
    "kasa_config": "it adds two penalties to the loss (LoraModel._get_kasa_loss)",
    "monteclora_config": "it adds the divergence of its samples to the loss",
}
SAVED = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


def read_config_values(path: str) -> Mapping[str, Any]:
    """The file's object, with `peft_type` in capitals.

    Raises:
        SettingsError: it cannot be read, or names no method of PEFT.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}", hint="Give a JSON file with peft_type.") from None
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise SettingsError(f"{path}: has no peft_type", hint=f"PEFT's methods: {', '.join(METHODS)}.")
    return {**values, "peft_type": values["peft_type"].upper()}


def refusal_of(path: str) -> str:
    """Why nothing trained with this file would run in llama.cpp, as far as its method says that; "" for nothing.

    Raises:
        SettingsError: see `read_config_values`.
    """
    peft_type = read_config_values(path)["peft_type"]
    method = METHODS.get(peft_type)
    return method.refusal if method else f"edgelora knows no method {peft_type!r}"


def read_config_file(path: str) -> Any:
    """The `peft.PeftConfig` in a file.

    Raises:
        SettingsError: unknown settings, or values that PEFT refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    values = read_config_values(path)
    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(values["peft_type"])
    if found is None:
        known = ", ".join(sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise SettingsError(f"{path}: this PEFT has no method {values['peft_type']!r}", hint=f"It has: {known}.")
    known_settings = {each.name for each in fields(found)}
    given = {name: value for name, value in values.items() if name != "peft_type" and name not in SAVED}
    if unknown := sorted(set(given) - known_settings):
        raise SettingsError(
            f"{path}: {found.__name__} has no {', '.join(unknown)}",
            hint=f"It has: {', '.join(sorted(known_settings - set(SAVED)))}.",
        )
    own_loop = [OWN_LOOP[name] for name in (values["peft_type"], *given) if name in OWN_LOOP and values.get(name, True)]
    if own_loop:
        raise SettingsError(
            f"{path}: it needs a training loop of its own: {'; '.join(own_loop)}",
            hint="Train it with PEFT alone, and convert the result.",
        )
    try:
        return found(task_type="CAUSAL_LM", **given)
    except (TypeError, ValueError, ImportError) as error:
        raise SettingsError(f"{path}: PEFT refuses it: {error}") from None
