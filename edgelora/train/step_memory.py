"""How much memory a training step takes, found by doing it on an outline: fake tensors, whose storages are counted.

Every operation of forward and backward is one of the run's own, so that checkpointing, dropout, DoRA's norms, a padded
batch's mask and TRL's tiled loss need no formula each. The highest sum of what is alive at once is the step's peak.
Steps on GPUs are done with a CPU's operations: only the loss then takes more than Triton's kernel for it does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgelora.train.outline import Outline

MAPPED_BLOCK = 32 << 20  # from here on, glibc maps each block by itself, and gives it back at once
LOSS_TILE = 32768
"""Columns of the buffer that TRL's loss computes logits in (`trl.trainer.utils`), however small the vocabulary is: of
the rest, a CPU's memory is never touched, and so never taken."""


@dataclass(frozen=True)
class BatchShape:
    """What a step reads: rows in a batch, tokens in the longest of them, and whether others are shorter."""

    rows: int
    length: int
    padded: bool = True


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step beside the weights.

    Attributes:
        peak: the most that is alive at once in forward and backward: kept for the backward pass, gradients so far, and
            what is computed with at the moment.
        gradients: of all that is trained, as the optimizer finds them.
        kept_in_small_blocks: the most that is alive at once in blocks below `MAPPED_BLOCK`.
    """

    peak: int
    gradients: int
    kept_in_small_blocks: int

    @property
    def activations(self) -> int:
        return max(0, self.peak - self.gradients)


class LiveBytes(TorchDispatchMode):  # type: ignore[misc]
    """Counts the storages that operations make, until they are freed.

    Attributes:
        now, peak: bytes alive, and the most of them at once; `small` and `small_peak` of blocks below `MAPPED_BLOCK`.
    """

    def __init__(self, there_before: Iterable[torch.Tensor], device: str, vocabulary: int = LOSS_TILE) -> None:
        super().__init__()
        self.now = self.peak = self.small = self.small_peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there_before}
        self._touched = min(1.0, vocabulary / LOSS_TILE) if device == "cpu" else 1.0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if op is torch.ops.aten._fused_sdp_choice.default:  # of fake tensors, torch would keep all scores
            return SDPBackend.FLASH_ATTENTION.value
        made = op(*args, **(kwargs or {}))
        is_tile = op is torch.ops.aten.empty.memory_format and made.shape[-1:] == (LOSS_TILE,)
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage(), self._touched if is_tile else 1.0)
        return made

    def _count(self, storage: Any, touched: float) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = size = int(storage.nbytes() * touched)
        self._add(size)
        self.peak, self.small_peak = max(self.peak, self.now), max(self.small_peak, self.small)
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self._add(-self._sizes.pop(key, 0))

    def _add(self, size: int) -> None:
        self.now += size
        self.small += size if abs(size) < MAPPED_BLOCK else 0


def step_memory(
    outline: Outline, shape: BatchShape, *, checkpointing: bool = False, accumulates: bool = False
) -> StepMemory:
    """The peak of forward and backward on batches of one shape.

    Args:
        checkpointing: activations are computed again in the backward pass.
        accumulates: the gradients of an earlier batch are there already.
    """
    model = outline.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _prepare(model, checkpointing=checkpointing)
    live = LiveBytes([*model.parameters(), *model.buffers()], outline.device, outline.vocabulary)
    with outline.fake, live, _autocast(outline):
        for _ in range(1 + accumulates):
            output = model(**_batch(shape), use_cache=False, fused_lm_head=True)
            loss = -output.log_probs.sum()
            del output
            loss.backward()
            del loss
    for parameter in parameters:
        parameter.grad = None
    return StepMemory(live.peak, outline.trained_bytes, live.small_peak)


def _prepare(model: Any, *, checkpointing: bool) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        if inner is not model:
            model.enable_input_require_grads()
    elif inner.is_activation_checkpointing:
        inner.activation_checkpointing_disable()


def _batch(shape: BatchShape) -> dict[str, torch.Tensor]:
    ids = torch.zeros((shape.rows, shape.length), dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if shape.padded:
        size = (shape.rows, 1, shape.length, shape.length)
        batch["attention_mask"] = torch.ones(size, dtype=torch.bool)
    return batch


def _autocast(outline: Outline) -> Any:
    """As transformers' `bf16` does it on GPUs."""
    if outline.autocast is None:
        return nullcontext()
    return torch.autocast("cpu", dtype=outline.autocast)
