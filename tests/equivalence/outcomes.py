"""What becomes of an adapter: PEFT's change of the logits beside llama.cpp's, with the adapter merged and converted.

bases = Bases(tmp_path)
adapted = adapt(Case("LoHaConfig", {"r": 4}), bases["llama"], tmp_path / "loha")
merged_outcome(adapted)     Outcome(kind="exact", error=2e-6)
adapter_outcome(adapted)    Outcome(kind="approximate", error=0.008, stated=0.0098), or a reason to refuse it
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from converters.adapter import AdapterOptions, convert_adapter
from converters.base import convert_base
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.merge import Merged, merge
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import LINEARS, Case, Floats
from tests.equivalence.tiny_models import TINY, some_ids

EXACT, APPROXIMATE, REFUSED = "exact", "approximate", "refused"
REFUSALS = (UnsupportedAdapterError, BaseMismatchError)
TOKENS = 40
SIZE = (0.05, 0.5)  # of the logits: a change that proves something, and is not lost in its own amplification
MAX_STEPS = 10


@dataclass(frozen=True)
class Base:
    """A tiny model, in transformers and in F32 for llama.cpp.

    Attributes:
        logits: transformers', float32 (tokens, vocabulary); `gguf_logits` are llama.cpp's.
    """

    name: str
    folder: Path
    gguf: Path
    network: Any
    ids: Sequence[int]
    logits: Floats
    gguf_logits: Floats

    @property
    def context(self) -> int:
        return TINY[self.name].context


class Bases:
    """Tiny models by name, each built and converted once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[str, Base] = {}

    def __getitem__(self, name: str) -> Base:
        if name not in self._built:
            self._built[name] = self._build(name)
        return self._built[name]

    def _build(self, name: str) -> Base:
        folder = tiny_models.build(name, self._folder / name)
        gguf = convert_base(folder, self._folder / f"{name}.gguf", quant="f32").path
        network, ids = load_model(folder), some_ids(folder, TOKENS)
        before = llamacpp.logits(gguf, ids, context=TINY[name].context)
        return Base(name, folder, gguf, network, ids, logits_of(network, ids), before)


@dataclass(frozen=True)
class Adapted:
    """An adapter with random weights on a base, as PEFT saved it.

    Attributes:
        network: PEFT's model, in evaluation mode.
        effect: how it changes the logits, float32 (tokens, vocabulary).
    """

    base: Base
    folder: Path
    network: Any
    effect: Floats

    def beside(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{what}.gguf")

    def error(self, *, adapter: Path | None = None, merged: Path | None = None) -> float:
        """|llama.cpp's change - PEFT's| / |PEFT's|, of the logits."""
        base = self.base
        found = llamacpp.logits(merged or base.gguf, base.ids, adapter, context=base.context)
        return float(np.linalg.norm(found - base.gguf_logits - self.effect) / np.linalg.norm(self.effect))


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        kind: `EXACT`, `APPROXIMATE` or `REFUSED`.
        error: relative, of the change of the logits.
        stated: the largest error of a tensor's change that the conversion reported.
        reason: what a refusal said, and what it advises.
    """

    kind: str
    error: float = 0.0
    stated: float = 0.0
    reason: str = ""
    method: str = ""
    residual: Mapping[str, float] = field(default_factory=dict)


def logits_of(network: Any, ids: Sequence[int]) -> Floats:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = network(torch.tensor([list(ids)])).logits[0].float().numpy()
    return found


def adapt(case: Case, base: Base, folder: Path) -> Adapted:
    """Put an adapter with random weights on a copy of the base, and save it as PEFT does."""
    import peft

    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", "target_modules": list(LINEARS), **case.settings}
    network = peft.get_peft_model(copy.deepcopy(base.network), getattr(peft, case.config)(**settings)).eval()
    effect = randomized(network, case, base)
    network.save_pretrained(folder)
    return Adapted(base, folder, network, effect)


def randomized(network: Any, case: Case, base: Base) -> Floats:
    """Give the adapter random weights, nearer to its initialisation or farther until its effect is of `SIZE`.

    Returns:
        The effect: float32 (tokens, vocabulary).
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        case.randomize(name, parameter)
    for _ in range(MAX_STEPS):
        effect = logits_of(network, base.ids) - base.logits
        size = float(np.linalg.norm(effect) / np.linalg.norm(base.logits))
        if SIZE[0] <= size <= SIZE[1]:
            return effect
        for name, parameter in trained.items():
            distance = parameter.data - before[name]
            parameter.data = before[name] + distance * (2.0 if size < SIZE[0] else 0.5)
    assert size > SIZE[0], f"its effect stays at {size:.2g} of the logits"
    return effect  # PEFT's initialisation does much already


def merged_outcome(adapted: Adapted) -> Outcome:
    """Merged into the F32 base."""
    try:
        report = merge(adapted.base.gguf, [Merged(adapted.folder)], adapted.beside("merged"), force=True)
    except REFUSALS as error:
        return Outcome(REFUSED, reason=f"{error.message} {error.hint}")
    return Outcome(EXACT, adapted.error(merged=report.path))


def adapter_outcome(adapted: Adapted, options: AdapterOptions | None = None) -> Outcome:
    """Converted against the F32 base."""
    out = adapted.beside("adapter")
    try:
        report = convert_adapter(adapted.folder, adapted.base.gguf, out, options, force=True)
    except REFUSALS as error:
        return Outcome(REFUSED, reason=f"{error.message} {error.hint}")
    error_of_logits = adapted.error(adapter=report.path)
    return Outcome(
        report.kind, error_of_logits, report.max_residual, method=report.method, residual=report.residual_energy
    )
