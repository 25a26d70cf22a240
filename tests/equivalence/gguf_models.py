"""Small GGUF files of any architecture, written without a Hugging Face model: enough for llama-quantize to read.

llama-quantize asks a file for its hyperparameters and its list of tensors, and never whether they are a model. So one
set of tensors can stand for every architecture, a few rows each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.block_types import TYPES
from converters.model_shape import ModelShape
from converters.quant_types import tensor_order
from converters.quantize import quantize_rows
from converters.reader import read_header
from converters.writer import TensorSpec, create, header_bytes

Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp")
SHARED_EXPERT = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp", "ffn_gate_inp_shexp")

# Keys that some architecture's hyperparameters must have; the others do not look at them.
_ONES = (
    "expert_gating_func", "expert_shared_count", "interleave_moe_layer_step", "leading_dense_block_count",
    "moe_every_n_layers", "attention.indexer.head_count", "attention.group_norm_groups", "features_length",
)  # fmt: skip
_FOURS = (
    "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count",
    "attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
    "attention.indexer.top_k", "attention.indexer.key_length", "wkv.head_size", "time_mix_extra_dim",
    "time_decay_extra_dim", "shortconv.l_cache", "embedding_length_per_layer_input", "attention.decay_lora_rank",
    "attention.iclr_lora_rank", "attention.value_residual_mix_lora_rank", "attention.relative_buckets_count",
    "kda.head_dim", "attention.sliding_window", "attention.key_length_swa", "attention.value_length_swa",
)  # fmt: skip
_FLOATS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "logit_scale", "rope.freq_base_swa")


@dataclass(frozen=True)
class GGUFModel:
    """A model as llama-quantize sees it.

    Attributes:
        parts: tensor names of every layer, without `blk.N.` and `.weight`.
        columns: values in a row of a part, where it is not `width`.
        others: more tensors, by full name.
        keys: more metadata, without the architecture's prefix.
    """

    architecture: str = "llama"
    n_layer: int = 9
    n_head: int | tuple[int, ...] = 4
    n_head_kv: int | tuple[int, ...] = 4
    n_expert: int = 0
    width: int = 256
    tied: bool = False
    parts: Sequence[str] = (*ATTENTION, *FEED_FORWARD)
    columns: Mapping[str, int] = field(default_factory=dict, hash=False)
    others: Shapes = field(default_factory=dict, hash=False)
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def shape(self) -> ModelShape:
        return ModelShape(self.architecture, self.n_layer, self.n_head, self.n_head_kv, self.n_expert)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, in llama.cpp's order; matrices have two rows."""
        found: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (3, self.width),
            "output_norm.weight": (self.width,),
            **self.others,
        }
        if not self.tied:
            found["output.weight"] = (3, self.width)
        for layer in range(self.n_layer):
            found[f"blk.{layer}.attn_norm.weight"] = (self.width,)
            for part in self.parts:
                columns = self.columns.get(part, self.width)
                experts = (self.n_expert,) if part.endswith("_exps") else ()
                found[f"blk.{layer}.{part}.weight"] = (*experts, 2, columns)
        return {name: found[name] for name in sorted(found, key=tensor_order)}

    @property
    def metadata(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            **dict.fromkeys(_ONES, 1),
            **dict.fromkeys(_FOURS, 4),
            **dict.fromkeys(_FLOATS, 1.0),
            "context_length": 128,
            "embedding_length": self.width,
            "feed_forward_length": self.width,
            "block_count": self.n_layer,
            "attention.head_count": _value(self.n_head),
            "attention.head_count_kv": _value(self.n_head_kv),
            "rope.dimension_sections": [1, 1, 1, 1],
            "use_parallel_residual": True,
        }
        if self.n_expert:
            sizes |= {"expert_count": self.n_expert, "expert_used_count": 2, "expert_feed_forward_length": self.width}
        prefixed = {f"{self.architecture}.{key}": value for key, value in {**sizes, **self.keys}.items()}
        return {"general.architecture": self.architecture, **prefixed}


def _value(heads: int | tuple[int, ...]) -> int | list[int]:
    return heads if isinstance(heads, int) else list(heads)


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Floats]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def random_imatrix(shapes: Shapes, seed: int = 1) -> dict[str, Floats]:
    """Of every matrix, as an imatrix file holds it: a row for each expert."""
    random = np.random.default_rng(seed)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    return {
        name: random.random(shape[-1] * (shape[0] if len(shape) == 3 else 1), np.float32)
        for name, shape in matrices.items()
    }


def write_gguf(
    path: Path, metadata: Mapping[str, Any], weights: Mapping[str, Floats], types: Mapping[str, str] | None = None
) -> Path:
    """A file of `weights`, as F32 or the types given by name."""
    kinds = {name: TYPES[(types or {}).get(name, "F32")] for name in weights}
    specs = [TensorSpec(name, values.shape, kinds[name]) for name, values in weights.items()]
    with create(path, header_bytes(metadata, specs)) as file:
        for spec in specs:
            values = weights[spec.name]
            file.write(quantize_rows(values.reshape(-1, values.shape[-1]), spec.block_type).tobytes())
            file.end_tensor(spec)
    return path


def stored(path: Path, names: Iterable[str] | None = None) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of each tensor, in the file's order."""
    header, data = read_header(path), path.read_bytes()
    wanted = header.tensors if names is None else {name: header.tensors[name] for name in names}
    return {
        name: (tensor.type_name, data[tensor.offset : tensor.offset + tensor.size_bytes])
        for name, tensor in wanted.items()
    }
