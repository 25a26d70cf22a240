"""Methods whose layers share projections, or put few numbers into many places.

The tiny Llama's layers are (64, 64), (32, 64), (96, 64) and (64, 96): square, wide and tall.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.equivalence.peft_methods import Case, near, nudged

CONV1D = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
VECTORS = {"num_vectors": 20, "vector_length": 16}


def spread(name: str, parameter: torch.nn.Parameter) -> None:
    """Logits far enough apart for the softmax to differ from a mean."""
    torch.nn.init.normal_(parameter, std=1.0)


CASES: Mapping[str, Case] = {
    "vera": Case("VeraConfig"),
    "vera of another rank": Case("VeraConfig", {"r": 12}),
    "vera on Conv1D": Case("VeraConfig", {"r": 12, **CONV1D}, model="gpt2"),
    "vera drawn again": Case("VeraConfig", {"r": 12, "save_projection": False, "projection_prng_key": 5}),
    "vera with biases": Case("VeraConfig", {"r": 12, "bias": "vera_only"}, model="llama-biases"),
    "pvera": Case("PveraConfig", {"r": 12}),
    "pvera drawn again": Case("PveraConfig", {"r": 12, "save_projection": False, "projection_prng_key": 7}),
    "pvera on Conv1D": Case("PveraConfig", {"r": 12, **CONV1D}, model="gpt2"),
    "randlora": Case("RandLoraConfig", {"r": 8}),
    "randlora with a rank that divides nothing": Case("RandLoraConfig", {"r": 7, "randlora_alpha": 20}),
    "randlora of sparse bases": Case("RandLoraConfig", {"r": 8, "sparse": True}),
    "randlora of very sparse bases": Case("RandLoraConfig", {"r": 8, "very_sparse": True}),
    "randlora drawn again": Case("RandLoraConfig", {"r": 7, "save_projection": False, "projection_prng_key": 3}),
    "randlora of sparse bases drawn again": Case("RandLoraConfig", {"r": 7, "save_projection": False, "sparse": True}),
    "randlora of very sparse bases drawn again": Case(
        "RandLoraConfig", {"r": 8, "save_projection": False, "very_sparse": True, "projection_prng_key": 4}
    ),
    "randlora on Conv1D": Case("RandLoraConfig", {"r": 8, **CONV1D}, model="gpt2"),
    "fourierft": Case("FourierFTConfig"),
    "fourierft of a pattern": Case(
        "FourierFTConfig",
        {"n_frequency": 50, "n_frequency_pattern": {"q_proj": 300}, "scaling": 40.0, "random_loc_seed": 3},
    ),
    "fourierft on Conv1D": Case("FourierFTConfig", {"n_frequency": 100, **CONV1D}, model="gpt2"),
    "waveft": Case("WaveFTConfig", {"n_frequency": 500}),
    "waveft of db4": Case("WaveFTConfig", {"n_frequency": 500, "wavelet_family": "db4", "random_loc_seed": 3}),
    "waveft of sym5": Case("WaveFTConfig", {"n_frequency": 100, "wavelet_family": "sym5", "scaling": 3.0}),
    "waveft of coif3": Case("WaveFTConfig", {"n_frequency": 100, "wavelet_family": "coif3"}),
    "waveft without its transform": Case("WaveFTConfig", {"n_frequency": 100, "use_idwt": False}),
    "waveft in proportion": Case(
        "WaveFTConfig", {"n_frequency": 100, "proportional_parameters": True, "n_frequency_pattern": {"q_proj": 9}}
    ),
    "waveft on Conv1D": Case("WaveFTConfig", {"n_frequency": 100, **CONV1D}, model="gpt2"),
    "vblora": Case("VBLoRAConfig", VECTORS, randomize=spread),
    "vblora of one vector": Case("VBLoRAConfig", {**VECTORS, "topk": 1, "r": 3}, randomize=spread),
    "vblora saved in short": Case(
        "VBLoRAConfig", {**VECTORS, "topk": 3, "save_only_topk_weights": True}, randomize=spread
    ),
    "vblora of one vector saved in short": Case(
        "VBLoRAConfig", {**VECTORS, "topk": 1, "save_only_topk_weights": True}, randomize=spread
    ),
    "vblora of many vectors saved in short": Case(
        "VBLoRAConfig", {"num_vectors": 300, "vector_length": 32, "save_only_topk_weights": True}, randomize=spread
    ),
    "vblora on Conv1D": Case("VBLoRAConfig", {**VECTORS, **CONV1D}, model="gpt2", randomize=spread),
    "unilora": Case("UniLoraConfig", {"save_indices": True}, randomize=spread),
    "unilora of another rank": Case(
        "UniLoraConfig", {"save_indices": True, "r": 6, "theta_d_length": 100}, randomize=spread
    ),
    "unilora on Conv1D": Case("UniLoraConfig", {"save_indices": True, **CONV1D}, model="gpt2", randomize=spread),
    "tinylora": Case("TinyLoraConfig"),
    "tinylora with partly tied layers": Case("TinyLoraConfig", {"r": 3, "u": 13, "weight_tying": 0.7}),
    "tinylora with tied layers": Case("TinyLoraConfig", {"weight_tying": 1.0, "projection_seed": 3}),
    "tinylora on Conv1D": Case("TinyLoraConfig", CONV1D, model="gpt2"),
    # U is rounded to float32 before it is multiplied by V, whose condition multiplies that error.
    "frod": Case("FrodConfig", {"progressbar": False}, randomize=nudged(), tolerance=1e-3),
    "frod, denser": Case(
        "FrodConfig", {"progressbar": False, "sparse_rate": 0.2}, randomize=nudged(), tolerance=1e-3
    ),
    "frod without a sparse part": Case(
        "FrodConfig", {"progressbar": False, "sparse_rate": 0.0}, randomize=nudged(), tolerance=1e-3
    ),
    # Not mlp.c_proj: in three layers it has fewer rows than columns, so that part of U is what rounding leaves.
    "frod on Conv1D": Case(
        "FrodConfig",
        {"progressbar": False, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
        model="gpt2",
        randomize=nudged(),
        tolerance=1e-3,
    ),
    "shira": Case("ShiraConfig", {"r": 4, "random_seed": 3}),
    "shira without a seed": Case("ShiraConfig", {"r": 9}, randomize=near(1.0)),
    "c3a": Case("C3AConfig", {"block_size": 32}, randomize=spread),
    "c3a of a pattern": Case(
        "C3AConfig", {"block_size": 16, "block_size_pattern": {"q_proj": 64, "mlp.up_proj": 8}}, randomize=spread
    ),
}  # fmt: skip
