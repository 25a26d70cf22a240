"""What else an adapter may be, beside its method: each row's adapter is made by PEFT, converted and merged.

OTHERS["activated LoRA"](bases, folder)   (outcome as an adapter, outcome merged)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from converters.adapter import AdapterOptions
from converters.blend import Part, prepare_blend
from converters.merge import Merged, merge
from tests.equivalence.initialisations import initialised, loftq
from tests.equivalence.outcomes import (
    EXACT,
    Adapted,
    Bases,
    Outcome,
    adapt,
    adapter_outcome,
    logits_of,
    merged_outcome,
)
from tests.equivalence.peft_methods import LINEARS, Case
from tests.equivalence.table_cases import BESIDE, LORA

Outcomes = tuple[Outcome, Outcome]
Row = Callable[[Bases, Path], Outcomes]
WEIGHTS = (0.7, 0.3)


def both(adapted: Adapted, options: AdapterOptions | None = None) -> Outcomes:
    return adapter_outcome(adapted, options), merged_outcome(adapted)


def both_of_case(case: Case, bases: Bases, folder: Path) -> Outcomes:
    return both(adapt(case, bases[case.model], folder))


def _activated(bases: Bases, folder: Path) -> Outcomes:
    """The invocation stands first, so that all of the text is after it."""
    base = bases["llama"]
    case = Case("LoraConfig", {**LORA, "alora_invocation_tokens": list(base.ids[:2])})
    return both(adapt(case, base, folder, alora_offsets=[len(base.ids)]))


def blend(bases: Bases, folder: Path) -> Outcomes:
    """The sum of two adapters, PEFT's `cat`."""
    import peft

    base = bases["llama"]
    torch.manual_seed(1)
    configs = [peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(LINEARS), r=r) for r in (4, 8)]
    network = peft.get_peft_model(copy.deepcopy(base.network), configs[0], adapter_name="a").eval()
    network.add_adapter("b", configs[1])
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(folder)
    network.add_weighted_adapter(["a", "b"], list(WEIGHTS), "both", combination_type="cat")
    network.set_adapter("both")
    adapted = Adapted(base, folder, network, logits_of(network, base.ids) - base.logits)
    assert np.linalg.norm(adapted.effect) > 0.01 * np.linalg.norm(base.logits)
    parts = [(folder / name, weight) for name, weight in zip("ab", WEIGHTS, strict=True)]
    with prepare_blend([Part(*part) for part in parts], base.gguf) as prepared:
        blended = prepared.write(adapted.beside("blend"), force=True).path
    merged = merge(base.gguf, [Merged(*part) for part in parts], adapted.beside("merged"), force=True).path
    return Outcome(EXACT, adapted.error(adapter=blended)), Outcome(EXACT, adapted.error(merged=merged))


def _initialised(init: str, bases: Bases, folder: Path) -> Outcomes:
    return both(initialised(init, bases["llama"], folder))


def _with_initial(init: str, bases: Bases, folder: Path) -> Outcomes:
    adapted = initialised(init, bases["llama"], folder)
    (folder / "initial").rename(adapted.folder / "initial")
    return both(adapted)


def _converted(init: str, bases: Bases, folder: Path) -> Outcomes:
    return both(replace(initialised(init, bases["llama"], folder), folder=folder / "converted"))


OTHERS: Mapping[str, Row] = {
    **{name: partial(both_of_case, case) for name, case in BESIDE.items()},
    "several adapters blended (`--blend`)": blend,
    "activated LoRA (`alora_invocation_tokens`)": _activated,
    "initialised as PiSSA: recomputed from the base (its folder, or F32)": partial(_initialised, "pissa"),
    "initialised as OLoRA: recomputed from the base (its folder, or F32)": partial(_initialised, "olora"),
    "initialised as EVA, MiCA, orthogonal or gaussian: the base stayed as it was": partial(_initialised, "eva"),
    "initialised as fast PiSSA (`pissa_niter_4`), with `--initial`": partial(_with_initial, "pissa_niter_4"),
    "initialised as CorDA, with `--initial`": partial(_with_initial, "corda"),
    "initialised as LoRA-GA, with `--initial`": partial(_with_initial, "lora_ga"),
    "initialised as CorDA, LoRA-GA or fast PiSSA, without": partial(_initialised, "corda"),
    "initialised as LoftQ": lambda bases, folder: both(loftq(bases["llama"], folder)),
    "any of these, undone by PEFT (`path_initial_model_for_weight_conversion`)": partial(_converted, "corda"),
}
