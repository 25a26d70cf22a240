"""What is trained: PEFT's layers on the base as its initialisation leaves them, or the base itself.

Some initialisations take a part of the base into the adapter, and some read the data. Such an adapter is kept as it
began (`initial`): a run that goes on puts that state on a base that was loaded anew, instead of beginning once more,
and what was moved is given back when the adapter is saved (`saving`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from converters.initialisation import moved_base
from edgelora.errors import SettingsError
from edgelora.train.base import Base
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.folder import RunFolder

Batches = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives batches of the training rows, on the model's device."""
ADAPTER = "default"
EVA_BATCHES = 1000
NEEDS_PREPARATION = {
    "corda": "CorDA begins with covariances that PEFT collects beforehand",
    "lora_ga": "LoRA-GA begins with gradients that PEFT collects beforehand",
    "loftq": "PEFT's LoftQ rounds the base on a CUDA device; --method loftq begins on a base in NF4, on any",
}


@dataclass(frozen=True)
class Trainee:
    """A model that is ready to be trained.

    Attributes:
        model: PEFT's around the base, or the base itself.
        initial: the folder of the adapter as it began; None where its beginning is neither undone nor repeated.
        is_moved: the adapter holds a part of the base, of which `initial` tells.
    """

    model: Any
    initial: Path | None = None
    is_moved: bool = False


def begin(
    model: Any, base: Base, recipe: Recipe, found: Mapping[str, Any], run: RunFolder, batches: Batches
) -> Trainee:
    """Put a recipe's adapter on a base that was just loaded; without an adapter, take the base itself.

    Args:
        found: arguments of the PEFT config that follow from the base; see `Method.peft_config`.
        run: gets the adapter as it began, where that is needed again; where it lies there already, the run goes on.

    Raises:
        SettingsError: PEFT has no such adapter for this base.
    """
    if recipe.row.trains_base:
        return Trainee(model.train())
    config = recipe.row.peft_config(recipe, **found)
    init = _initialisation(config)
    is_moved = bool(moved_base(init)) or recipe.row.loftq
    if not is_moved and init != "eva":
        adapted = _adapted(model, config, recipe)
        if getattr(config, "use_dora", False):
            _check_lengths(adapted)
        return Trainee(adapted)
    if run.initial.is_dir():
        return Trainee(_as_it_began(model, recipe, run.initial, is_moved=bool(moved_base(init))), run.initial, is_moved)
    adapted = _adapted(model, config, recipe)
    if is_moved:
        _check_ranks(adapted, recipe)
    if init == "eva":
        _begin_eva(adapted, batches())
    if recipe.row.loftq:
        _begin_loftq(adapted, base)
    _keep(adapted, run.initial)
    return Trainee(_plain(adapted), run.initial, is_moved)


def _initialisation(config: Any) -> Any:
    """Raises SettingsError for those that need more than the base and its data."""
    init = getattr(config, "init_lora_weights", None)
    if (name := str(init).lower()) in NEEDS_PREPARATION:
        raise SettingsError(
            f"init_lora_weights is {init!r}: {NEEDS_PREPARATION[name]}",
            hint="Leave it out, or take pissa, olora, eva, loftq (--method).",
        )
    return init


def _adapted(model: Any, config: Any, recipe: Recipe) -> Any:
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(recipe.seed)
    try:
        is_filled_later = getattr(config, "init_lora_weights", None) == "eva"
        return get_peft_model(model, config, low_cpu_mem_usage=is_filled_later)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, ImportError) as error:
        raise SettingsError(
            f"PEFT cannot put {recipe.method} on this base: {error}",
            hint="Name other layers with --target-modules, or choose another method.",
        ) from error


def _check_ranks(model: Any, recipe: Recipe) -> None:
    """Raises SettingsError for a rank that some layer does not have: nothing of the base could begin there."""
    sides = {name.rpartition(".")[2]: min(m.in_features, m.out_features) for name, m in lora_layers(model)}
    if low := {name: side for name, side in sides.items() if side < model.peft_config[ADAPTER].r}:
        name = min(low, key=lambda each: low[each])
        raise SettingsError(
            f"{recipe.method} begins with as many singular values as ranks, and {', '.join(sorted(low))} have fewer",
            hint=f"Give --rank {low[name]} or less.",
        )


def _begin_eva(model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """Principal directions of each layer's inputs over the training rows, which also settle its rank.

    PEFT goes round the batches until no direction moves any more, for ever if one always does.
    """
    from peft import initialize_lora_eva_weights

    seen = 0

    def run(model: Any, batch: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen > EVA_BATCHES:
            raise ValueError(f"its directions still move after {EVA_BATCHES} batches")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)

    try:
        initialize_lora_eva_weights(model, list(batches), forward_fn=run, show_progress_bar=False)
    except ValueError as error:
        raise SettingsError(f"EVA cannot begin: {error}", hint="Lower --rank or --eva-rho.") from error


def _check_lengths(model: Any) -> None:
    """Raises SettingsError where DoRA would divide a row by a length of zero."""
    rows = {
        name: int((layer.lora_magnitude_vector[ADAPTER].weight == 0).sum())
        for name, layer in lora_layers(model)
        if ADAPTER in layer.lora_magnitude_vector
    }
    if zero := {name: count for name, count in rows.items() if count}:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in zero}))
        raise SettingsError(
            f"DoRA divides each row of a weight by its length, and {sum(zero.values())} rows of this base are zero: "
            f"{', '.join(list(zero)[:3])}{' ...' if len(zero) > 3 else ''}",
            hint=f"Leave out {names} with --target-modules, or choose another method.",
        )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _begin_loftq(model: Any, base: Base) -> None:
    """B @ A begins as the best low-rank part of what NF4 took from each weight: one step of LoftQ's algorithm 1.

    PEFT's `replace_lora_weights_loftq` does it too, on CUDA devices alone.
    """
    from bitsandbytes.functional import dequantize_4bit

    from converters.adapted_base import open_base
    from converters.compile import weight_of

    with open_base(base.path) as released:
        for name, layer in lora_layers(model):
            stored = layer.get_base_layer().weight
            kept = dequantize_4bit(stored.data, stored.quant_state).float()
            whole = torch.from_numpy(weight_of(released, f"{name}.weight")).to(kept.device)
            u, s, vt = torch.linalg.svd(whole - kept, full_matrices=False)
            rank, root = layer.r[ADAPTER], s.sqrt()
            b, a = layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
            count = min(rank, len(s))
            b.zero_()
            b[:, :count] = (u * root)[:, :count] / layer.scaling[ADAPTER]
            a[:count] = (root[:, None] * vt)[:count]


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """PEFT's LoRA layers with linear ones inside, by their names in transformers."""
    named = model.get_base_model().named_modules()
    return [(name, module) for name, module in named if ADAPTER in getattr(module, "lora_A", {})]


def _keep(model: Any, folder: Path) -> None:
    """The adapter as it stands, whole or not at all."""
    from edgelora.train.folder import complete_folder

    with complete_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _as_it_began(model: Any, recipe: Recipe, initial: Path, *, is_moved: bool) -> Any:
    """A base that was just loaded, with the adapter that lies in `initial` on it and its part taken out."""
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(initial)
    config.inference_mode, config.init_lora_weights, config.eva_config = False, True, None
    adapted = _adapted(model, config, recipe)
    set_peft_model_state_dict(adapted, load_file(initial / "adapter_model.safetensors"))
    for _, layer in lora_layers(adapted) if is_moved else ():
        weight = layer.get_base_layer().weight
        weight.data = (weight.data.float() - layer.get_delta_weight(ADAPTER).float()).to(weight.dtype)  # as PEFT does
    return adapted


def _plain(model: Any) -> Any:
    """From here on it is a LoRA like others: PEFT shall not begin it again for a copy of it."""
    config = model.peft_config[ADAPTER]
    config.init_lora_weights, config.eva_config = True, None
    return model
