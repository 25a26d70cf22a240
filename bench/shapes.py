"""Models with the shapes of real ones, for benchmarks: random weights, or none at all (a sparse file).

A shape is llama's: what matters to a converter is how many values there are, and how long the rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizers" / "llama2" / "tokenizer.model"
CHUNK = 1 << 22  # values


@dataclass(frozen=True)
class Shape:
    """Sizes as config.json names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    shards: int = 1

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, ff = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_attention_heads * self.num_key_value_heads
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, rows, columns in (
                ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden), ("mlp.gate_proj", ff, hidden), ("mlp.up_proj", ff, hidden),
                ("mlp.down_proj", hidden, ff),
            ):  # fmt: skip
                yield f"{prefix}{name}.weight", (rows, columns)
            yield f"{prefix}input_layernorm.weight", (hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(256, 512, 2, 4, 2),
    "1.1b": Shape(2048, 5632, 22, 32, 4, shards=3),
    "7b": Shape(4096, 11008, 32, 32, 32, shards=3),
    "70b": Shape(8192, 28672, 80, 64, 8, shards=30),
}


def make_model(folder: Path, shape: Shape, *, sparse: bool = False, seed: int = 0) -> Path:
    """A model folder in bfloat16, as transformers writes it.

    Args:
        sparse: all zeros that take no disk: for memory, not for speed.

    Raises:
        FileNotFoundError: the tokenizer is not in ../shared.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "config.json").write_text(json.dumps(_config(shape)))
    names = dict(shape.tensors())
    parts = np.array_split(np.array(list(names), dtype=object), shape.shards)
    weight_map, rng = {}, np.random.default_rng(seed)
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shape.shards:05}.safetensors" if shape.shards > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(part, file)
        _write(folder / file, {name: names[name] for name in part}, rng, sparse=sparse)
    if shape.shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _config(shape: Shape) -> dict[str, object]:
    sizes = {key: value for key, value in shape.__dict__.items() if key != "shards"}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip


def _write(path: Path, tensors: Mapping[str, tuple[int, ...]], rng: np.random.Generator, *, sparse: bool) -> None:
    header, offset = {}, 0
    for name, size in tensors.items():
        count = int(np.prod(size)) * 2
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return
        for size in tensors.values():
            mean, deviation = (1.0, 0.1) if len(size) == 1 else (0.0, 0.02)
            for values in _random(rng, int(np.prod(size)), mean, deviation):
                file.write((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes())


def _random(rng: np.random.Generator, count: int, mean: float, deviation: float) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, count, CHUNK):
        values = rng.standard_normal(min(CHUNK, count - start), np.float32)
        yield values * np.float32(deviation) + np.float32(mean)
