"""LoRA (arXiv:2106.09685) and rank-stabilized LoRA (arXiv:2312.03732): W + scale * B @ A, tensor by tensor.

PEFT's names, after its prefix "base_model.model.":

    <module>.lora_A.weight  (rank, columns)        <module>.lora_embedding_A  (rank, vocabulary)
    <module>.lora_B.weight  (rows, rank)           <module>.lora_embedding_B  (embedding, rank)
    <module>.lora_B.bias    (rows,), with `lora_bias`
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from math import sqrt

import numpy as np

from converters.checkpoint import Floats
from converters.methods import parameters
from converters.methods.changes import Change, LowRank, ModuleProblem, Shifted
from converters.methods.method import About, Method, Module, scaled
from converters.peft_config import PeftConfig
from converters.peft_settings import flag, names, number, number_pattern, rank, rank_pattern, token_ids
from converters.reader import ARRAY, RawValue

INVOCATION = "adapter.alora.invocation_tokens"  # LLM_KV_ADAPTER_ALORA_INVOCATION_TOKENS, an array of uint32
UINT32 = 4
PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_B.bias": "bias",
}


def read(module: Module) -> Iterator[Change]:
    if parameters.is_parameter(module):
        yield from parameters.read(module)
        return
    is_embedding = "embedding_a" in module or "embedding_b" in module
    a, b = ("embedding_a", "embedding_b") if is_embedding else ("a", "b")
    check_pair(module, a, b)
    yield _embedding(module) if is_embedding else low_rank(module)
    if "bias" in module:
        scale = scale_of(module)
        yield Shifted(module.bias, module.shape("bias"), lambda: scaled(module.load("bias"), scale))


def check_pair(module: Module, a: str = "a", b: str = "b") -> None:
    """Raises ModuleProblem where A and B are not two factors of the configured rank."""
    if a not in module or b not in module:
        raise ModuleProblem(f"has only its {'A' if a in module else 'B'}")
    first, second = module.shape(a), module.shape(b)
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or 0 in first + second:
        raise ModuleProblem(f"A {first} and B {second} do not fit together")
    expected = module.setting("r", "rank_pattern")
    if module.config.is_valid and first[0] != expected:
        raise ModuleProblem(f"has rank {first[0]}, {module.config.path.name} says {expected}{_of_rivals(module)}")


def _of_rivals(module: Module) -> str:
    """Why a rank may be another than the configuration says."""
    rivals = module.config.rivals("rank_pattern", module.name)
    return f": rank_pattern has {rivals}, which PEFT saved in another order than it was trained with" if rivals else ""


def scale_of(module: Module) -> float:
    """What PEFT multiplies B @ A by."""
    alpha, rank = module.setting("lora_alpha", "alpha_pattern"), module.setting("r", "rank_pattern")
    return float(alpha / (sqrt(rank) if module.config["use_rslora"] else rank))


def low_rank(module: Module) -> LowRank:
    """A linear layer's change."""
    (rank, columns), (rows, _) = module.shape("a"), module.shape("b")
    scale = scale_of(module)
    return LowRank(
        module.weight, (rows, columns), rank, scale, lambda: (scaled(module.load("b"), scale), module.load("a"))
    )


def _embedding(module: Module) -> LowRank:
    """The weight is (vocabulary, embedding), the transpose of what its factors multiply."""
    (rank, vocabulary), (embedding, _) = module.shape("embedding_a"), module.shape("embedding_b")
    scale = scale_of(module)

    def load() -> tuple[Floats, Floats]:
        return scaled(module.load("embedding_a").T, scale), np.ascontiguousarray(module.load("embedding_b").T)

    return LowRank(module.weight, (vocabulary, embedding), rank, scale, load, is_embedding=True)


def about(config: PeftConfig) -> About:
    """An activated LoRA (arXiv:2504.12397) changes only what follows its invocation."""
    tokens = config["alora_invocation_tokens"]
    if not tokens:
        return About()
    raw = RawValue(ARRAY, UINT32, len(tokens), struct.pack(f"<{len(tokens)}I", *tokens))
    why = "an activated LoRA (alora_invocation_tokens) leaves everything before its invocation to the base"
    return About({INVOCATION: raw}, (why,))


SETTINGS = {
    "r": rank(8),
    "lora_alpha": number(8),
    "use_rslora": flag(False),
    "rank_pattern": rank_pattern(),
    "alpha_pattern": number_pattern(),
    "lora_bias": flag(False),
    "target_parameters": names(),
    "alora_invocation_tokens": token_ids(),
}
METHOD = Method(
    "LoRA, rsLoRA",
    "arXiv:2106.09685",
    parts=PARTS,
    read=read,
    settings=SETTINGS,
    free=(
        "qalora_group_size",
        "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "init_lora_weights", "loftq_config",
        "lora_dropout", "lora_ga_config", "megatron_core", "runtime_config", "trainable_token_indices",
    ),
    refused={
        "layer_replication": "layers are repeated, which the base does not do",
        "megatron_config": "Megatron's parallel layers have weights of their own",
    },
    about=about,
)  # fmt: skip
