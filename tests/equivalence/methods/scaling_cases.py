"""Methods that scale weights, or put other parts in the place of some: IA3, HiRA, DeLoRA, GLoRA, OSF, DEFT."""

from __future__ import annotations

from collections.abc import Mapping

from tests.equivalence.peft_methods import Case, near, nudged

FACTORS = near(1.0)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NO_C = {"config_C": "none"}

CASES: Mapping[str, Case] = {
    "ia3": Case("IA3Config", {"feedforward_modules": ["down_proj"]}, randomize=FACTORS),
    "ia3 on biases": Case("IA3Config", {"feedforward_modules": ["down_proj"]}, "llama-biases", FACTORS),
    "ia3 without feedforward modules": Case("IA3Config", {"feedforward_modules": []}, "llama-biases", FACTORS),
    "ia3 by the end of a name": Case(
        "IA3Config", {"target_modules": ".*_proj", "feedforward_modules": ["n_proj", "v_proj"]}, "llama", FACTORS
    ),
    "ia3 by an expression": Case(
        "IA3Config",
        {"target_modules": ".*_proj", "feedforward_modules": r".*(mlp\.down|[12].*q)_proj"},
        "llama",
        FACTORS,
    ),
    "ia3 on Conv1D": Case(
        "IA3Config",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        "gpt2",
        FACTORS,
    ),
    "hira": Case("HiraConfig", {"r": 4}),
    "hira with a rank pattern": Case("HiraConfig", {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 7}}),
    "hira on Conv1D": Case(
        "HiraConfig", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, model="gpt2"
    ),
    "delora": Case("DeloraConfig", {"r": 4}, randomize=nudged(0.3)),
    "delora with patterns": Case(
        "DeloraConfig",
        {"r": 4, "rank_pattern": {"k_proj": 6}, "lambda_pattern": {"v_proj": 3}, "target_modules": ATTENTION},
        model="llama-biases",
        randomize=nudged(0.3),
    ),
    "delora of a rank above the rows": Case(
        "DeloraConfig", {"r": 40, "target_modules": ["k_proj"]}, randomize=nudged(0.3)
    ),
    "glora without biases": Case("GloraConfig", {"r": 4}),
    "glora of vectors without biases": Case("GloraConfig", {"config_A_B": "vector"}),
    "glora whose biases follow weights": Case("GloraConfig", {"r": 4}, "llama-biases"),
    "glora whose biases follow weights by vectors": Case("GloraConfig", {"config_C": "vector"}, "llama-biases"),
    "glora on biases": Case("GloraConfig", NO_C, "llama-biases"),
    "glora of vectors on biases": Case(
        "GloraConfig", {**NO_C, "config_A_B": "vector", "config_D_E": "vector"}, "llama-biases"
    ),
    "glora of constants": Case("GloraConfig", {**NO_C, "config_A_B": "constant", "config_D_E": "none"}, "llama-biases"),
    "osf": Case("OSFConfig", randomize=nudged(0.05)),
    "osf of a rank": Case(
        "OSFConfig", {"effective_rank": 5, "rank_pattern": {"q_proj": 0.9, "v_proj": 31}}, "llama-biases", nudged(0.05)
    ),
    "deft": Case("DeftConfig", {"r": 4}),
    "deft with an alpha": Case("DeftConfig", {"r": 4, "alpha": 16}, "llama-biases"),
    "deft by qr": Case("DeftConfig", {"r": 4, "alpha": 7, "decomposition_method": "qr"}),
    "deft that only takes away": Case("DeftConfig", {"r": 4, "decomposition_method": "qr", "para": True}),
    "deft of a rank above the rows": Case(
        "DeftConfig", {"r": 100, "alpha": 20, "decomposition_method": "qr", "target_modules": ATTENTION}
    ),
    "deft on Conv1D": Case(
        "DeftConfig", {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, model="gpt2"
    ),
}
