"""LoRA (arXiv:2106.09685) and rank-stabilized LoRA (arXiv:2312.03732): W + scale * B @ A, tensor by tensor.

PEFT's names, after its prefix "base_model.model.":

    <module>.lora_A.weight  (rank, columns)        <module>.lora_embedding_A  (rank, vocabulary)
    <module>.lora_B.weight  (rows, rank)           <module>.lora_embedding_B  (embedding, rank)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import Floats, Tensors
from converters.methods.factors import Factors
from converters.peft_config import PeftConfig

PREFIX = "base_model.model."
# Ending of a tensor's name to (factor, is it an embedding's)
FACTOR_NAMES: Mapping[str, tuple[str, bool]] = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
# PEFT saves a frozen embedding or output beside its LoRA; it is the base's own.
FROZEN_COPY, SAVED_BY_PEFT = ".base_layer.weight", ("embed_tokens", "lm_head")
REASONS: Mapping[str, str] = {
    ".lora_magnitude_vector": "DoRA's magnitudes, which no low-rank adapter can hold",
    ".lora_B.bias": "a bias on B, which has no place in a GGUF adapter",
    ".bias": "a trained bias, which has no place in a GGUF adapter",
    "norm.weight": "a trained norm, which has no place in a GGUF adapter",
    ".token_adapter.trainable_tokens_delta": "trained tokens, which replace rows of the embedding",
    ".weight": "a fully trained module, which is not low-rank",
}


@dataclass
class _Pair:
    is_embedding: bool
    a: str = ""
    b: str = ""


def read(config: PeftConfig, tensors: Tensors) -> tuple[list[Factors], list[str]]:
    """The factors of every module, and what is wrong with the others."""
    pairs, problems = _pairs(tensors)
    factors = []
    for module, pair in pairs.items():
        if problem := _mismatch(config, tensors, module, pair):
            problems.append(problem)
        else:
            factors.append(_factors(config, tensors, module, pair))
    return factors, problems


def _pairs(tensors: Tensors) -> tuple[dict[str, _Pair], list[str]]:
    pairs: dict[str, _Pair] = {}
    others = []
    for name in tensors.tensors:
        ending = next((ending for ending in FACTOR_NAMES if name.endswith(ending)), None)
        if ending is None or not name.startswith(PREFIX):
            others.append(name)
            continue
        factor, is_embedding = FACTOR_NAMES[ending]
        pair = pairs.setdefault(_module(name, ending), _Pair(is_embedding))
        if factor == "A":
            pair.a = name
        else:
            pair.b = name
    left = [name for name in others if not _is_frozen_copy(name, pairs)]
    return pairs, [f"{name}: {_reason(name)}" for name in left]


def _is_frozen_copy(name: str, pairs: Mapping[str, _Pair]) -> bool:
    module = _module(name, FROZEN_COPY)
    return name.endswith(FROZEN_COPY) and module in pairs and module.rpartition(".")[2] in SAVED_BY_PEFT


def _module(name: str, ending: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(ending)


def _reason(name: str) -> str:
    return next((reason for ending, reason in REASONS.items() if name.endswith(ending)), "no tensor of a LoRA adapter")


def _mismatch(config: PeftConfig, tensors: Tensors, module: str, pair: _Pair) -> str:
    if not pair.a or not pair.b:
        return f"{module}: has only its {'A' if pair.a else 'B'}"
    a, b = tensors.tensors[pair.a].shape, tensors.tensors[pair.b].shape
    rank = config.rank_of(module)
    if len(a) != 2 or len(b) != 2 or not 1 <= a[0] == b[1] or 0 in a + b:
        return f"{module}: A {a} and B {b} do not fit together"
    if config.is_valid and a[0] != rank:
        return f"{module}: has rank {a[0]}, {config.path.name} says {rank}"
    return ""


def _factors(config: PeftConfig, tensors: Tensors, module: str, pair: _Pair) -> Factors:
    a, b = tensors.tensors[pair.a].shape, tensors.tensors[pair.b].shape
    rank = a[0]
    scale = config.scale_of(module, rank)

    def load_b() -> Floats:
        with np.errstate(over="ignore"):  # infinite values are refused by name
            return tensors.rows(pair.b) * np.float32(scale)

    # An embedding's weight is (vocabulary, embedding): the transpose of what its factors multiply.
    shape = (a[1], b[0]) if pair.is_embedding else (b[0], a[1])
    return Factors(module, shape, rank, scale, pair.is_embedding, lambda: tensors.rows(pair.a), load_b)
