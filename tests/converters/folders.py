"""Model and adapter folders made of numpy arrays alone: small, exact, and free to be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

Arrays = Mapping[str, np.ndarray[Any, Any]]
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SPECIAL = ("<|endoftext|>", "<|im_end|>")
TEXT = ("It's 2024, she'll pay 1234.50 for 3 books!", "  spaces\n\nand\ttabs ", "Größe naïve 東京 emoji 😀 don't") * 3


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def safetensors_bytes(arrays: Arrays, dtypes: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file; `dtypes` renames a tensor's dtype ("BF16" for uint16 bits)."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "uint8": "F8_E4M3"}
    header, data = {}, b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(name, names[array.dtype.name])
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random float32 weights of a Llama model under transformers' names."""
    rng = np.random.default_rng(seed)
    d, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * 0.1).astype(np.float32)

    arrays = {"model.embed_tokens.weight": matrix(vocab, d), "model.norm.weight": 1 + matrix(d)}
    if not config["tie_word_embeddings"]:
        arrays["lm_head.weight"] = matrix(vocab, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        arrays |= {f"{prefix}self_attn.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        shapes = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
        arrays |= {f"{prefix}mlp.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()}
        arrays |= {f"{prefix}{norm}_layernorm.weight": 1 + matrix(d) for norm in ("input", "post_attention")}
    return arrays


def byte_level_tokenizer(
    *steps: Any, vocab_size: int = 300, ignore_merges: bool = False, texts: Sequence[str] = TEXT
) -> Tokenizer:
    """A byte-level BPE; `steps` replaces GPT-2's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = list(steps) or [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def split(regex: str) -> list[Any]:
    """The pre-tokenizer steps of tokenizers in the manner of Llama 3: one expression, then bytes."""
    return [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def make_model(folder: Path, seed: int = 0, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
    """A Llama folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {**CONFIG, **config}
    write_json(folder / "config.json", full)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights(full, seed)))
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    return folder


def lora_weights(
    modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """PEFT's tensors for modules of (rows, columns)."""
    rng, arrays = np.random.default_rng(seed), {}
    for module, (rows, columns) in modules.items():
        for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            array = rng.standard_normal(shape).astype(np.float32)
            arrays[f"base_model.model.{module}.lora_{name}.weight"] = array
    return arrays


MODULES: Mapping[str, tuple[int, int]] = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.1.self_attn.k_proj": (16, 32),
    "model.layers.1.mlp.down_proj": (32, 48),
}


def make_adapter(folder: Path, arrays: Arrays | None = None, **config: Any) -> Path:
    """A PEFT folder for the model of `make_model`."""
    folder.mkdir(parents=True, exist_ok=True)
    full = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base", **config}
    write_json(folder / "adapter_config.json", full)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(arrays or lora_weights(MODULES)))
    return folder
