"""transformers' logits, and the same with the one function that llama.cpp computes otherwise on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class TableGelu(torch.nn.Module):
    """llama.cpp's GELU: the tanh form, from float16 to float16 (`GGML_GELU_FP16`, ggml/src/ggml-cpu/vec.h)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, values))


def load_model(folder: Path, *, table_gelu: bool = True) -> Any:
    """transformers' model in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in list(model.modules()) if table_gelu else []:
        for name, child in module.named_children():
            if "GELU" in type(child).__name__:
                setattr(module, name, TableGelu())
    return model


def hf_logits(folder: Path, ids: Sequence[int], *, table_gelu: bool = True) -> npt.NDArray[np.float32]:
    """Logits of every position, shape (len(ids), vocabulary), in float32."""
    model = load_model(folder, table_gelu=table_gelu)
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].numpy()
    return logits
