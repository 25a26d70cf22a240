"""LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from tests.equivalence.peft_methods import Case

CASES: Mapping[str, Case] = {
    "lora": Case("LoraConfig", {"r": 8, "lora_alpha": 16}),
    "rslora": Case("LoraConfig", {"r": 16, "lora_alpha": 16, "use_rslora": True}),
    "lora with a bias on B": Case("LoraConfig", {"r": 4, "lora_bias": True}, model="llama-biases"),
    "lora on Conv1D": Case("LoraConfig", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]}, model="gpt2"),
}
