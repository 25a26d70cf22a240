"""What an adapter changes: in PEFT with torch, and in llama.cpp with what became of it.

adapted = adapt(Case("LoraConfig", {"r": 4}, model="qwen3"), tmp_path)
adapted.error(plain, adapter=path)   relative error of the change in logits, |theirs - ours| / |theirs|
adapted.error(plain, merged=path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from converters.adapter import AdapterOptions, convert_adapter
from converters.base import convert_base
from converters.fingerprint import fingerprint
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case
from tests.equivalence.tiny_models import TINY, Tiny, some_ids

Floats = npt.NDArray[np.float32]
TOLERANCE = 0.005  # relative error of the change in logits; measured 1e-6 to 2e-4, the larger where GELU's table is
TOKENS = 40
STRONG = 0.1  # an adapter that does nothing would prove nothing


def mostly_slow(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Parameters of a test: all of them, `make test` takes the quick ones."""
    chosen = {*quick}
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class Adapted:
    """A base, an adapter on it as PEFT saved it, and how it changes the logits of some tokens.

    Attributes:
        model: a row of `tiny_models.TINY`.
        effect: float32 (tokens, vocabulary).
    """

    model: str
    base: Path
    folder: Path
    ids: Sequence[int]
    effect: Floats

    @cached_property
    def plain(self) -> Path:
        """The base in F32."""
        return convert_base(self.base, self.base.with_suffix(".gguf"), quant="f32").path

    @cached_property
    def untied(self) -> Path:
        """The base in F32, its output a tensor of its own."""
        return convert_base(self.base, self.base.with_name("untied.gguf"), quant="f32", untie=True).path

    def error(self, plain: Path, *, adapter: Path | None = None, merged: Path | None = None) -> float:
        context = TINY[self.model].context
        before = llamacpp.logits(plain, self.ids, context=context)
        after = llamacpp.logits(merged or plain, self.ids, adapter, context=context)
        return float(np.linalg.norm(after - before - self.effect) / np.linalg.norm(self.effect))

    def adapter_error(self, plain: Path | None = None, **options: Any) -> float:
        """As an adapter in F32."""
        plain = plain or self.plain
        options = {"dtype": "f32", **options}
        out = self.base.with_name("adapter.gguf")
        return self.error(
            plain, adapter=convert_adapter(self.folder, plain, out, AdapterOptions(**options), force=True).path
        )

    def merged_error(self, base: Path | None = None) -> float:
        """Merged into a GGUF base of the same types, or into the folder."""
        base = base or self.plain
        out, options = self.base.with_name("merged.gguf"), QuantizeOptions("f32") if base.is_dir() else None
        merged = merge(base, [Merged(self.folder)], out, options, force=True)
        assert merged.fingerprint == fingerprint(out), "an adapter for what was merged would not know it"
        return self.error(self.plain if base.is_dir() else base, merged=merged.path)


def tokens_of(model: str, base: Path) -> list[int]:
    """Few, or as many as the factors of a long rotary embedding ask for."""
    count = TINY[model].tokens
    return some_ids(base, TOKENS if count == Tiny.tokens else count)


def logits_of(model: Any, ids: Sequence[int]) -> Floats:
    with torch.no_grad():
        found: Floats = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return found


def adapt(case: Case, folder: Path, *, save: Callable[[Any, Path], None] | None = None, **settings: Any) -> Adapted:
    """Put an adapter with random weights on a model, and save it as PEFT does.

    Args:
        folder: gets `base` and `adapter`.
        save: instead of `save_pretrained`.
        settings: of the base's configuration.
    """
    import peft

    base, adapter = tiny_models.build(case.model, folder / "base", **settings), folder / "adapter"
    ids, model = tokens_of(case.model, base), load_model(base)
    plain = logits_of(model, ids)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, getattr(peft, case.config)(**{"task_type": "CAUSAL_LM", **case.settings})).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            case.randomize(name, parameter)
    model.save_pretrained(adapter)
    return Adapted(case.model, base, adapter, ids, strong(logits_of(model, ids) - plain))


def strong(effect: Floats) -> Floats:
    assert np.abs(effect).max() > STRONG, "an adapter that does nothing would prove nothing"
    return effect
