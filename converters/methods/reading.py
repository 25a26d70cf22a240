"""What PEFT saved, read by its method: every tensor of the file is part of a change, or a problem with its name."""

from __future__ import annotations

from converters.checkpoint import Tensors
from converters.methods.changes import Change, ModuleProblem, Reading
from converters.methods.method import PREFIX, BaseShape, BaseWeight, Method, Module, no_base, no_weights
from converters.methods.trained import read_trained
from converters.peft_config import PeftConfig, with_settings

MODEL_PREFIX = "base_model."


def read_modules(
    config: PeftConfig,
    method: Method,
    tensors: Tensors,
    shape_in_base: BaseShape = no_base,
    weight_in_base: BaseWeight = no_weights,
) -> Reading:
    """The changes of a method that is told module by module.

    Args:
        config: as `read_peft_config` gives it.
        shape_in_base: some methods save less than the sizes of the layers they change.
        weight_in_base: and some change biases by what weights are; called when a change is applied.
    """
    assert method.read is not None
    config = with_settings(config, method.settings, method.free, method.refused)
    parts, shared, others = _grouped(method, tensors)
    trained, problems = read_trained(config, tensors, others, frozenset(parts), shape_in_base)
    strange = [f"{name!r}: no tensor of an adapter" for name in tensors.tensors if not name.isprintable()]
    changes, wrong = list(trained), [*config.problems, *strange, *problems]
    if shared and not parts and not config.problems:
        wrong.append(f"{', '.join(sorted(shared.values()))}: shared by all layers, and there is none that takes it")
    siblings = tuple(parts)
    for name, of_module in parts.items():
        module = Module(name, config, tensors, of_module, shared, siblings, shape_in_base, weight_in_base)
        try:
            changes += _changes(method, module)
        except ModuleProblem as problem:
            wrong.append(f"{name}: {problem}")
    about = method.about(config)
    return Reading(tuple(changes), tuple(wrong), about.not_merged, about.metadata)


def _changes(method: Method, module: Module) -> list[Change]:
    assert method.read is not None
    missing = [role for role in method.needed if role not in module]
    if missing:
        raise ModuleProblem(f"has no {', '.join(missing)}")
    return list(method.read(module))


def _grouped(method: Method, tensors: Tensors) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Module to its parts, the shared tensors by role, and the names that are neither."""
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    others = []
    for name in filter(str.isprintable, tensors.tensors):
        ending = next((ending for ending in method.parts if name.endswith(ending)), None)
        role = _shared_role(method, name)
        if role:
            shared[role] = name
        elif ending is not None and name.startswith(PREFIX):
            modules.setdefault(name.removeprefix(PREFIX).removesuffix(ending), {})[method.parts[ending]] = name
        else:
            others.append(name)
    return modules, shared, others


def _shared_role(method: Method, name: str) -> str:
    """The role of a tensor that all modules share; "" for another."""
    if not method.shared or not name.startswith(MODEL_PREFIX):
        return ""
    plain = name.removeprefix(MODEL_PREFIX)
    for stored, role in method.shared.items():
        if plain == stored or (stored.endswith(".") and plain.startswith(stored)):
            return role + plain.removeprefix(stored)
    return ""
