"""Modules that an adapter's configuration names, held against the tensors in its file: what is missing is said.

    "target_modules": ["q_proj", "v_proj"]              v_proj has no tensor: a part of the adapter is missing
    "target_modules": ".*layers.[0-3].*q_proj"          layer 2 has none: likewise
    "target_modules": ["q_proj", "gate_proj"]           gate_proj are experts, which may be no modules: a notice

Which modules PEFT adapts: `check_target_module_exists`, peft/tuners/tuners_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from converters.adapted_base import AdaptedBase
from converters.adapter_source import AdapterSource
from converters.architectures import Row
from converters.peft_config import FILE_NAME
from converters.peft_settings import is_safe_expression, is_target
from converters.placement import find_slots

WHOLE = "modules_to_save"
KEYS = ("target_modules", "target_parameters", WHOLE)
LAYER = re.compile(r"(.*?\.[^.]*\.)(\d+)(\..*)")  # the first number, which is the layer's
PERHAPS = "the model that was trained may have had no such module"
LEFT_OUT = f"if it was trained without, say so in {FILE_NAME}: exclude_modules"


def missing_targets(adapter: AdapterSource, base: AdaptedBase) -> list[str]:
    """Modules that the configuration names, that are there for certain, and that the file has nothing of."""
    return [
        *_absent(adapter, base, certain=True),
        *_absent_of_expression(adapter, base),
        *_absent_in_layers(adapter, base),
    ]


def unused_targets(adapter: AdapterSource, base: AdaptedBase) -> list[str]:
    """Likewise, where the model that was trained may have had no such module: what should be known."""
    return _absent(adapter, base, certain=False)


def is_adapted(config: Mapping[str, Any], key: str, module: str) -> bool:
    """Whether PEFT changes a module because of a key of `KEYS`; no, where that takes an expression that is not safe."""
    names = config.get(key)
    if key == WHOLE:
        return any(f".{name}." in f".{module}." for name in _names(names))
    if _is_excluded(config, module) or not _is_named(names, module):
        return False
    return isinstance(names, str) or _is_in_layers(config.get("layers_to_transform"), module)


def _is_excluded(config: Mapping[str, Any], module: str) -> bool:
    excluded = config.get("exclude_modules")
    is_unsafe = isinstance(excluded, str) and not is_safe_expression(excluded)
    return is_unsafe or _is_named(excluded, module) or is_adapted(config, WHOLE, module)


def _is_named(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return is_safe_expression(names) and is_target(names, module)
    return is_target(_names(names), module)


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _is_in_layers(layers: Any, module: str) -> bool:
    if layers is None or layers == []:
        return True
    match = LAYER.match(module)
    return match is not None and int(match[2]) in (layers if isinstance(layers, list) else [layers])


def _absent(adapter: AdapterSource, base: AdaptedBase, *, certain: bool) -> list[str]:
    """Names without any tensor."""
    changed = [f".{_plain(base, change.tensor)}" for change in adapter.reading.changes]
    found = []
    for key in ("target_modules", WHOLE):
        for name in _names(adapter.config.get(key)):
            own = _plain(base, name)
            rows = [row for row, module in _modules(base) if is_adapted({**adapter.config, key: [own]}, key, module)]
            is_certain = key == WHOLE or any(row.is_linear for row in rows)
            if rows and is_certain == certain and not any(f".{own}." in tensor for tensor in changed):
                ending = {True: "" if key == WHOLE else f"; {LEFT_OUT}", False: f"; {PERHAPS}"}[certain]
                found.append(f"{key} has {name!r}, and no tensor belongs to it{ending}")
    return found


def _absent_of_expression(adapter: AdapterSource, base: AdaptedBase) -> list[str]:
    """Kinds of modules that a regular expression names, without a tensor in any layer."""
    if not isinstance(adapter.config.get("target_modules"), str):
        return []
    changed = {_kind(_plain(base, change.tensor).removesuffix(".weight")) for change in adapter.reading.changes}
    wanted = {
        _kind(module): module
        for row, module in _modules(base)
        if row.is_linear and is_adapted(adapter.config, "target_modules", module)
    }
    return [
        f"target_modules matches {module}, and no tensor belongs to it or its like in other layers; {LEFT_OUT}"
        for kind, module in wanted.items()
        if kind not in changed
    ]


def _kind(module: str) -> str:
    """A module's name without the number of its layer."""
    return LAYER.sub(r"\1\3", module)


def _plain(base: AdaptedBase, name: str) -> str:
    """A name of a loaded model's, as the family's table has it."""
    return base.family.module_name(name.replace("language_model.", ""))


def _modules(base: AdaptedBase) -> Iterator[tuple[Row, str]]:
    """Modules that the model has, with their rows; of experts the first, for all of them."""
    for row in base.family.rows:
        for layer in range(base.sizes["layers"]) if "{layer}" in row.gguf else (0,):
            name = row.gguf.replace("{layer}", str(layer)) + row.ends[1]
            if name in base.shapes or row.absent_if_tied:
                for module in row.modules:
                    yield row, module.replace("{layer}", str(layer)).replace("{each}", "0")


def _absent_in_layers(adapter: AdapterSource, base: AdaptedBase) -> list[str]:
    """Modules of one layer without a tensor, where other layers have theirs."""
    changed = {change.tensor for change in adapter.reading.changes}
    kinds = {(match[1], match[3]) for tensor in changed if (match := LAYER.match(tensor))}
    found = []
    for before, after in sorted(kind for kind in kinds if not kind[1].endswith(".bias")):
        names = [f"{before}{layer}{after}" for layer in range(base.sizes["layers"])]
        missing = [name for name in names if name not in changed and _is_expected(adapter, base, name)]
        if missing:
            more = f" and {len(missing) - 1} more layers" if len(missing) > 1 else ""
            found.append(f"{missing[0]}{more}: no tensor belongs to it, as to other layers; {LEFT_OUT}")
    return found


def _is_expected(adapter: AdapterSource, base: AdaptedBase, tensor: str) -> bool:
    """Whether the model has it for certain, and PEFT would have changed it; a layer of another kind has only tensors
    that could be taken for it."""
    is_there = any(slot.gguf == slot.place.gguf_name in base.shapes for slot in find_slots(base, tensor))
    return is_there and any(is_adapted(adapter.config, key, tensor.removesuffix(".weight")) for key in KEYS)
