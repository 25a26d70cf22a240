"""What memory a run takes, by part, before its weights are loaded; and what to change where it takes too much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.train.base import Base, Placement, placement
from edgelora.train.outline import Outline, outline
from edgelora.train.recipe import Recipe
from edgelora.train.step_memory import BatchShape, step_memory

ADAM_STATES = 2  # means of gradients and of their squares, in the type of what is trained
FULL_TUNING = (16, 20)
"""Bytes a parameter of mixed-precision training with Adam (arXiv:1910.02054, section 3.1): 2 + 2 of weights and
gradients, 12 of a float32 copy and Adam's states; 4 more where gradients are also kept in float32."""
HEAP_LOSS = 0.65
"""glibc does not fit an aligned block into the hole that an equal one left: of memory kept in blocks below
`MAPPED_BLOCK`, so much again is lost (0.4 to 1.05 measured; `bench/plan.py`). CUDA's allocator loses little."""
LIBRARIES_AT_WORK = 60 << 20
"""Bytes that torch, MKL and the tokenizer take once they compute, beside what they hold when they are imported."""
CERTIFICATE_TOKENS, LOGIT_COPIES = 288, 3
"""Longest prompt and answer that a certificate records, and its logits with what is computed from them."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part at the highest point of a run.

    Attributes:
        weights: of the base and an adapter, as they are kept.
        gradients, optimizer: of what is trained.
        activations: kept for the backward pass, and what is computed with at the moment.
        rest: what allocators and libraries need beside.
        loading, certificate: whole sums of the moments before and after training: the base is read from its files, and
            is run once more as it will be served.
    """

    trained: int
    total: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    rest: int
    loading: int
    certificate: int

    @property
    def training(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.rest

    @property
    def peak(self) -> int:
        return max(self.training, self.loading, self.certificate)

    @property
    def needed(self) -> int:
        """What must be free: files that are mapped while the base is loaded count as resident, and give way."""
        return max(self.training, self.certificate)

    @property
    def full_tuning(self) -> tuple[int, int]:
        """What the usual full fine-tuning of this model takes, without activations: least and most."""
        low, high = (self.total * each for each in FULL_TUNING)
        return low, high


@dataclass(frozen=True)
class Change:
    """Something to change in a recipe.

    Attributes:
        options: as they are typed.
        saves: bytes, beside the changes before it.
        costs: what it is paid with.
    """

    options: str
    saves: int
    costs: str


def memory_plan(base: Base, recipe: Recipe, found: Mapping[str, Any], length: int, *, padded: bool) -> MemoryPlan:
    """The memory of a run.

    Args:
        found: arguments of the PEFT config that follow from base and template.
        length: tokens of the longest rows, at most `recipe.max_length` of which are kept.

    Raises:
        ModelFileError, SettingsError: see `outline`.
    """
    place = placement(recipe)
    model = outline(base, recipe, place, found)
    shape = BatchShape(recipe.batch_size * recipe.objective_row.sequences, min(length, recipe.max_length), padded)
    step = step_memory(
        model, shape, checkpointing=recipe.gradient_checkpointing, accumulates=recipe.gradient_accumulation > 1
    )
    weights, rest = model.weights + _reference(model, recipe), LIBRARIES_AT_WORK
    if place.device == "cpu":
        rest += int(HEAP_LOSS * step.kept_in_small_blocks)
    return MemoryPlan(
        trained=model.trained,
        total=model.total,
        weights=weights,
        gradients=step.gradients,
        optimizer=ADAM_STATES * step.gradients,
        activations=step.activations,
        rest=rest,
        loading=_loading(base, weights, place),
        certificate=_certificate(model, recipe, weights, place) + LIBRARIES_AT_WORK,
    )


def _reference(model: Outline, recipe: Recipe) -> int:
    """What preferences are measured against: a copy of the adapter as it began, or a second model."""
    if recipe.objective != "dpo":
        return 0
    return model.weights if recipe.row.trains_base else model.trained_bytes


def _loading(base: Base, weights: int, place: Placement) -> int:
    """The files are mapped while their tensors are converted; on GPUs, that memory is the system's."""
    files = sum(file.stat().st_size for file in base.path.glob("*.safetensors")) if base.path.is_dir() else 0
    return weights + LIBRARIES_AT_WORK + (files if place.device == "cpu" else 0)


def _certificate(model: Outline, recipe: Recipe, weights: int, place: Placement) -> int:
    if not recipe.certificate_probes or recipe.row.trains_base:
        return 0
    logits = CERTIFICATE_TOKENS * model.vocabulary * 4 * LOGIT_COPIES
    return weights + logits + (model.total * place.dtype.itemsize if place.quantization else 0)


def changes(base: Base, recipe: Recipe, found: Mapping[str, Any], length: int, room: int) -> Iterator[Change]:
    """What to change, one thing after the other, until the run fits into `room` bytes, or nothing is left to change."""
    now = memory_plan(base, recipe, found, length, padded=True).needed
    for settings, costs in _steps_down(recipe, length):
        if now <= room:
            return
        smaller = Recipe.from_mapping({**recipe.to_dict(), **settings})
        then = memory_plan(base, smaller, found, length, padded=True).needed
        if then < now:
            options = " ".join(
                f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                for name, value in settings.items()
            )
            yield Change(options, now - then, costs)
            recipe, now = smaller, then


def _steps_down(recipe: Recipe, length: int) -> Iterator[tuple[dict[str, Any], str]]:
    """From what costs least to what costs most."""
    if not recipe.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "about a fifth of the speed"
    if recipe.batch_size > 1:
        accumulation = recipe.batch_size * recipe.gradient_accumulation
        yield {"batch_size": 1, "gradient_accumulation": accumulation}, "some speed; the result is the same"
    smaller = {"lora": "qlora", "rslora": "qlora", "dora": "qdora", "full": "lora"}.get(recipe.method)
    if smaller:
        yield {"method": smaller}, "the base is rounded" if smaller.startswith("q") else "an adapter instead"
    if recipe.rank and recipe.rank > 4:
        yield {"rank": recipe.rank // 2}, "half of what the adapter can learn"
    if min(length, recipe.max_length) > 256:
        yield {"max_length": min(length, recipe.max_length) // 2}, "the ends of longer rows"
