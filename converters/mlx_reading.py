"""What MLX trained as changes of a base's tensors in transformers' names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from converters.adapted_base import AdaptedBase
from converters.checkpoint import Floats
from converters.methods import Change, LowRank, Reading, Replaced
from converters.methods.dora import with_lengths
from converters.methods.method import scaled
from converters.mlx_adapter import MlxAdapter, MlxModule
from converters.placement import find_slots, is_known

# MLX's names of an expert's parts to Mixtral's.
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def read_mlx(adapter: MlxAdapter, base: AdaptedBase) -> Reading:
    """The changes of an open adapter.

    Args:
        base: its family says what experts are called.
    """
    changes: list[Change] = []
    problems = list(adapter.problems)
    for tensor in adapter.whole:
        if any(slot.place.row.transposed for slot in find_slots(base, tensor.name)):
            problems.append(f"{tensor.name}: MLX holds it transposed, and a square one does not show that")
        changes.append(Replaced(tensor.name, tensor.shape, tensor.load))
    for module in adapter.modules:
        if module.kind != "experts":
            changes.append(_change(module))
        elif found := list(_experts(module, base)):
            changes += found
        else:
            architecture = base.family.architecture
            problems.append(f"{module.name}: experts that {architecture} stores in another form; train with PEFT")
    return Reading(changes, problems)


def _change(module: MlxModule) -> Change:
    tensor = f"{module.name}.weight"
    rows, columns = module.shape
    magnitude = module.load_magnitude
    if magnitude is None:
        is_embedding = module.kind == "embedding"
        return LowRank(tensor, (rows, columns), module.rank, module.scale, partial(_factors, module), is_embedding)

    def load() -> tuple[Floats, Floats, Floats]:
        return (*_factors(module), magnitude())

    return with_lengths(tensor, (rows, columns), load)


def _factors(module: MlxModule) -> tuple[Floats, Floats]:
    return scaled(module.load_b(), module.scale), module.load_a()


def _experts(module: MlxModule, base: AdaptedBase) -> Iterator[LowRank]:
    """One change for each expert; none where the family does not name them one by one."""
    count, rows, columns = module.shape
    before, _, part = module.name.partition(".*.")
    for number in range(count if module.load_magnitude is None else 0):
        names = [f"{before}.{number}.{name}.weight" for name in (part, MIXTRAL.get(part, part))]
        known = next((name for name in names if is_known(base.family, name)), None)
        if known is None:
            return
        yield LowRank(known, (rows, columns), module.rank, module.scale, partial(_expert, module, number))


def _expert(module: MlxModule, number: int) -> tuple[Floats, Floats]:
    return scaled(module.load_b()[number], module.scale), module.load_a()[number]
