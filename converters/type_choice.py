"""The type of every tensor of one conversion, and the importance of its columns, from what somebody asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converters.block_types import PLAIN, BlockType
from converters.errors import FormatError, UnsupportedError, listed
from converters.imatrix import ImportanceMatrix, Means
from converters.model_shape import ModelShape
from converters.options import QuantizeOptions
from converters.quant_types import Overrides, Recipe, find_recipe, needs_imatrix, plan_types, without_effect
from converters.tensor_kinds import is_quantizable

Shapes = Mapping[str, Sequence[int]]
_IMATRIX_HINT = "Give one with `--imatrix FILE`, or measure one with `--calibrate TEXT`."


@dataclass(frozen=True)
class TypeChoice:
    """What becomes of the tensors.

    Attributes:
        types: by name, in llama.cpp's order of tensors.
        changed: names of those that are not what they were.
        importance: what the columns weigh, by name; absent without.
    """

    types: Mapping[str, BlockType]
    changed: tuple[str, ...]
    importance: Mapping[str, Means] = field(repr=False)
    notices: tuple[str, ...]


def choose(
    shapes: Shapes, stored: Mapping[str, BlockType], model: ModelShape, options: QuantizeOptions,
    fixed: frozenset[str] = frozenset(),
) -> TypeChoice:  # fmt: skip
    """Decide as llama-quantize does (`llama_model_quantize_impl`, src/llama-quant.cpp).

    Args:
        shapes: by name, in numpy order.
        stored: what the tensors are now.
        fixed: names of those that stay what they are, whatever is asked for.

    Raises:
        UnsupportedError: types that need an importance matrix without one, or an override that changes nothing; see
            also `plan_types`.
        FormatError: an importance matrix of another model.
    """
    recipe, overrides, imatrix = find_recipe(options.quant), options.overrides or Overrides(), options.imatrix
    candidates = [
        name for name, shape in shapes.items() if name not in fixed and is_quantizable(name, shape, model.architecture)
    ]
    if idle := without_effect(overrides, recipe, candidates):
        raise UnsupportedError(f"types chosen by hand change nothing:{listed(idle)}", hint=_named(candidates))
    plan = plan_types(shapes, recipe, model, overrides=overrides, has_imatrix=imatrix is not None, source_types=stored)
    types = {name: stored[name] if name in fixed else kind for name, kind in plan.types.items()}
    changed = [name for name, kind in types.items() if kind != stored[name]]
    importance = _importance(shapes, changed, imatrix)
    if imatrix is not None and not importance and changed and imatrix.entries.keys().isdisjoint(shapes):
        raise FormatError(
            f"none of the importance matrix's {len(imatrix.entries)} entries is a tensor of this model",
            hint="It was made for another model: make one with `edgelora convert --calibrate`.",
        )
    _check_needs(types, recipe, candidates, changed, importance, imatrix)
    notices = [*plan.notices(), *(_unmeasured(types, changed, importance) if imatrix is not None else [])]
    return TypeChoice(types, tuple(changed), importance, tuple(notices))


def _named(candidates: Sequence[str]) -> str:
    parts = sorted({name.split(".")[2] for name in candidates if name.count(".") >= 3})
    return f"The model's layers have {', '.join(parts[:12])}." if parts else ""


def _importance(shapes: Shapes, changed: Sequence[str], imatrix: ImportanceMatrix | None) -> dict[str, Means]:
    if imatrix is None:
        return {}
    shaped = ((name, shapes[name]) for name in changed)
    found = {name: imatrix.means_for(name, shape[-1], shape[-3] if len(shape) > 2 else 1) for name, shape in shaped}
    return {name: means for name, means in found.items() if means is not None}


def _check_needs(
    types: Mapping[str, BlockType], recipe: Recipe, candidates: Sequence[str], changed: Sequence[str],
    importance: Mapping[str, Means], imatrix: ImportanceMatrix | None,
) -> None:  # fmt: skip
    known, differing = frozenset(candidates), frozenset(changed)
    needing = [name for name in needs_imatrix(types, recipe) if name in known]
    if imatrix is None and needing:
        shown = listed([f"{name} ({types[name].name})" for name in needing])
        raise UnsupportedError(
            f"{recipe.name} needs an importance matrix: these types have too few bits without one:{shown}",
            hint=_IMATRIX_HINT,
        )
    missing = [name for name in needing if name in differing and name not in importance]
    if missing:
        shown = listed([f"{name} ({types[name].name})" for name in missing])
        raise UnsupportedError(
            f"the importance matrix has nothing for tensors that {recipe.name} cannot make without:{shown}",
            hint="Measure one on more text with `--calibrate TEXT`, or give these tensors another type with "
            "--tensor-type.",
        )


def _unmeasured(types: Mapping[str, BlockType], changed: Sequence[str], importance: Mapping[str, Means]) -> list[str]:
    names = [name for name in changed if types[name].name not in PLAIN and name not in importance]
    if not names:
        return []
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return [f"the importance matrix has nothing for {shown}: quantized without"]
