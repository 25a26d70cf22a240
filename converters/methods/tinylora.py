"""TinyLoRA (arXiv:2602.04118): W + B @ R @ A, where R is the sum of v[i] * P[i]; layers may share v.

    base_model.tinylora_v.<group>  (u,)
    <module>.tinylora_A            (rank, columns): of the base's singular value decomposition, as B
    <module>.tinylora_B            (rows, rank)
    <module>.tinylora_P            (u, rank, rank): drawn from `projection_seed` + the layer's number

Which v is a layer's depends on its number, in the order in which the model's class makes its layers. Nothing tells
that, so it is found by its P: the one that its number's seed draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import sqrt

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, LowRank, ModuleProblem
from converters.methods.factored import quiet
from converters.methods.method import Method, Module
from converters.peft_settings import Setting, rank, seed
from converters.torch_random import TorchGenerator

LOOKUPS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
NEAR = 0.02  # of the largest number: P may have been rounded to bfloat16 twice
MOST_DRAWN = 2**26  # numbers of P, of all layers
NOT_SAVED = "has no P: set save_projection to true in adapter_config.json, load the adapter with PEFT and save it again"


def read(module: Module) -> Iterator[Change]:
    module.check("a", None, None)
    rank, columns = module.shape("a")
    module.check("b", None, rank)
    rows = module.shape("b")[0]
    if "p" not in module:
        raise ModuleProblem(NOT_SAVED)
    module.check("p", module.setting("u"), rank, rank)
    group = _group(module)
    if group not in module:
        raise ModuleProblem(f"the adapter has no tinylora_{group}")
    module.check(group, module.setting("u"))

    @quiet
    def load() -> tuple[Floats, Floats]:
        return module.load("b") @ np.tensordot(module.load(group), module.load("p"), axes=1), module.load("a")

    is_embedding = module.name.rpartition(".")[2] in LOOKUPS
    yield LowRank(module.weight, (rows, columns), rank, 1.0, load, is_embedding)


def _group(module: Module) -> str:
    """The role of the layer's v; as `_create_and_replace` (peft/tuners/tinylora/model.py) shares them out."""
    layers = len(module.siblings)
    groups = max(1, round(layers * (1.0 - module.setting("weight_tying"))))
    number = _number(module) if groups > 1 else 0
    return f"v.{min(number // max(1, layers // groups), groups - 1)}"


def _number(module: Module) -> int:
    """Which of the layers this one is."""
    p, layers = module.load("p"), len(module.siblings)
    if p.size * layers > MOST_DRAWN:
        raise ModuleProblem(f"P {p.shape} is too large to find out which layer it is of")
    drawn = _drawn(module.setting("projection_seed"), layers, p.shape[0], p.shape[1])
    near = np.flatnonzero(np.abs(drawn - p).max(axis=(1, 2, 3)) <= NEAR * np.abs(p).max())
    if len(near) != 1:
        raise ModuleProblem(f"P is that of {len(near)} layers, by projection_seed: which v it takes is not known")
    return int(near[0])


@lru_cache(maxsize=4)
def _drawn(first_seed: int, layers: int, u: int, rank: int) -> Floats:
    """P of every layer, (layers, u, rank, rank): normal, with a variance of 1 / rank."""
    generators = (TorchGenerator((first_seed + layer) % 2**32) for layer in range(layers))  # torch's lowest 32 bits
    return np.stack([generator.normal((u, rank, rank), std=1.0 / sqrt(rank)) for generator in generators])


def _share(value: object) -> str:
    is_share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    return "" if is_share else "expected a number from 0 to 1"


METHOD = Method(
    "TinyLoRA",
    "arXiv:2602.04118",
    parts={".tinylora_A": "a", ".tinylora_B": "b", ".tinylora_P": "p"},
    shared={"tinylora_v.": "v."},
    needed=("a", "b"),
    read=read,
    settings={"u": rank(64), "weight_tying": Setting(0.0, _share), "projection_seed": seed(42)},
    free=("fan_in_fan_out", "init_v_bound", "init_weights", "r", "save_projection", "tinylora_dropout"),
)
