"""What a tensor is for, by its GGUF name: which part of the model, and whether it is quantized at all. Stdlib only.

Source: `tensor_get_category` and `tensor_allows_quantization` in llama.cpp's src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Substrings that name a tensor's part in the model, first match wins (`tensor_get_category`). Values are sensitive:
# whatever holds them counts as `attn_v`.
_CATEGORIES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
FEED_FORWARD = ("ffn_up", "ffn_gate", "ffn_down")
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
EMBEDDINGS = (EMBEDDING, "per_layer_token_embd.weight")

# Matrices that keep the type they have in the source, by name or part of it (`tensor_allows_quantization`).
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_KEPT_PARTS = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_",
    ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_PARTS_OF: Mapping[str, tuple[str, ...]] = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    ),
}  # fmt: skip


def tensor_order(name: str) -> tuple[int, str]:
    """Sort key: tensors outside the layers, then layer by layer (`weight_name_comparer`, src/llama-model-loader.h)."""
    found = re.match(r"blk\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)


def category_of(name: str) -> str:
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "other")


def is_quantizable(name: str, shape: Sequence[int], architecture: str) -> bool:
    """Matrices of weights, experts too; what is small, or delicate, or not multiplied keeps its type."""
    outer = [size for size in shape[:-1] if size != 1]
    if not outer or not name.endswith("weight") or name in _KEPT_NAMES:
        return False
    return not any(part in name for part in (*_KEPT_PARTS, *_KEPT_PARTS_OF.get(architecture, ())))
