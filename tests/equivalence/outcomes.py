"""What becomes of an adapter: PEFT's change of the logits beside llama.cpp's, with the adapter merged and converted.

bases = Bases(tmp_path)
adapted = adapt(Case("LoHaConfig", {"r": 4}), bases["llama"], tmp_path / "loha")
merged_outcome(adapted)     Outcome(kind="exact", error=2e-6)
adapter_outcome(adapted)    Outcome(kind="approximate", error=0.008, stated=0.0098), or a reason to refuse it
"""

from __future__ import annotations

import copy
import re
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
PLACE = re.compile(r"([\w.]+\.(weight|bias)|init_lora_weights is '\w+'): ")  # which a refusal begins with


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
        residual: the share of each tensor's energy that the conversion reported to have left out.
    """

    kind: str
    error: float = 0.0
    stated: float = 0.0
    reason: str = ""
    residual: Mapping[str, float] = field(default_factory=dict)

    @property
    def why(self) -> str:
        """The first reason of a refusal, without the tensor's name or the setting's."""
        first = self.reason.partition("\n  - ")[2].partition("\n")[0] or self.reason
        return first.partition(": ")[2] if PLACE.match(first) else first


def logits_of(network: Any, ids: Sequence[int], **arguments: Any) -> Floats:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = network(torch.tensor([list(ids)]), **arguments).logits[0].float().numpy()
    return found


def adapt(case: Case, base: Base, folder: Path, **arguments: Any) -> Adapted:
    """Put an adapter with random weights on a copy of the base, and save it as PEFT does.

    Args:
        arguments: of PEFT's forward pass.
    """
    import peft

    torch.manual_seed(1)
    settings = {"task_type": "CAUSAL_LM", "target_modules": list(LINEARS), **case.settings}
    network = peft.get_peft_model(copy.deepcopy(base.network), getattr(peft, case.config)(**settings)).eval()
    effect = randomized(network, case, base, **arguments)
    network.save_pretrained(folder)
    return Adapted(base, folder, network, effect)


def randomized(network: Any, case: Case, base: Base, **arguments: Any) -> Floats:
    """Give the adapter random weights, nearer to its initialisation or farther until its effect is of `SIZE`.

    Nearer to zero, where the initialisation itself changes much; as they are, where that does not help.

    Returns:
        The effect: float32 (tokens, vocabulary).
    """

    def effect() -> Floats:
        return logits_of(network, base.ids, **arguments) - base.logits

    def size(of: Floats) -> float:
        return float(np.linalg.norm(of) / np.linalg.norm(base.logits))

    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    shrink = 0.0 if size(effect()) > SIZE[1] else 1.0
    start = {name: parameter.detach() * shrink for name, parameter in trained.items()}
    for name, parameter in trained.items():
        case.randomize(name, parameter)
    end = {name: parameter.detach().clone() for name, parameter in trained.items()}
    reach = 1.0
    for _ in range(MAX_STEPS):
        found = effect()
        if SIZE[0] <= size(found) <= SIZE[1]:
            return found
        reach *= 2.0 if size(found) < SIZE[0] else 0.5
        _set(trained, {name: start[name] + reach * (end[name] - start[name]) for name in trained})
    _set(trained, end)
    assert size(effect()) > SIZE[0], "an adapter that does nothing would prove nothing"
    return effect()


def _set(parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = values[name].clone()


def merged_outcome(adapted: Adapted) -> Outcome:
    """Merged into the F32 base."""
    try:
        report = merge(adapted.base.gguf, [Merged(adapted.folder)], adapted.beside("merged"), force=True)
    except REFUSALS as error:
        return Outcome(REFUSED, reason=f"{error.message}\n{error.hint}")
    return Outcome(EXACT, adapted.error(merged=report.path))


def adapter_outcome(adapted: Adapted, options: AdapterOptions | None = None) -> Outcome:
    """Converted against the F32 base."""
    out = adapted.beside("adapter")
    try:
        report = convert_adapter(adapted.folder, adapted.base.gguf, out, options, force=True)
    except REFUSALS as error:
        return Outcome(REFUSED, reason=f"{error.message}\n{error.hint}")
    error_of_logits = adapted.error(adapter=report.path)
    return Outcome(report.kind, error_of_logits, report.max_residual, residual=report.residual_energy)
