"""A tiny random model of every family, as transformers saves it, with a tokenizer that its converter asks for.

Each row of `TINY` is a configuration that takes the branches of its family: grouped query attention, heads whose size
is not hidden / heads, layers of different kinds. Norms are not all one and biases not zero, so that a tensor in the
wrong place changes the logits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from converters.sentencepiece_json import merges
from converters.sentencepiece_model import read_sentencepiece
from tests.converters.folders import SPECIAL, TEXT, byte_level_tokenizer

VOCAB = 320
# Gemma multiplies its embeddings, so that its activations are large, and where one of them lies between two float16
# values the two programs may look up different rows of the GELU's table: measured up to 4e-3 over six layers.
GELU_TOLERANCE = 1e-2
SENTENCEPIECE_TEXT = (*TEXT, "The quick brown fox jumps over the lazy dog.", "def f(x):\n    return x + 1")


@dataclass(frozen=True)
class Tiny:
    """One model to build.

    Attributes:
        config: name of the configuration class in transformers.
        model: name of the model class.
        settings: what the configuration is made with, beside `COMMON`.
        tokenizer: a key of `TOKENIZERS`.
        tolerance: largest difference of a logit between transformers (with llama.cpp's GELU) and llama.cpp.
        context: of llama.cpp; Phi-3.5 takes other rotary factors where it is beyond the original one.
        tokens: how many the logits are compared over.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "byte-level"
    tolerance: float = 1e-3
    context: int = 512
    tokens: int = 200


COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MOE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
LINEAR: Mapping[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}

TINY: Mapping[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM"),
    "llama-2": Tiny("LlamaConfig", "LlamaForCausalLM", {"vocab_size": 400}, tokenizer="sentencepiece"),
    "llama-3": Tiny(
        "LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3, "head_dim": 32, "tie_word_embeddings": True}
    ),
    "llama-biases": Tiny("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "ministral-3": Tiny(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "mixtral": Tiny("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2-tied": Tiny("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-moe": Tiny(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 48, "norm_topk_prob": False}
    ),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": Tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3-next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**MOE, **LINEAR, "shared_expert_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3.5": Tiny("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", LINEAR),
    "qwen3.5-moe": Tiny(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**MOE, **LINEAR, "shared_expert_intermediate_size": 32},
    ),
    "gemma": Tiny(
        "GemmaConfig",
        "GemmaForCausalLM",
        {"head_dim": 32, "vocab_size": 400},
        tokenizer="sentencepiece",
        tolerance=GELU_TOLERANCE,
    ),
    "gemma-2": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 32, "vocab_size": 400, "sliding_window": 64, "query_pre_attn_scalar": 32},
        tokenizer="sentencepiece",
        tolerance=GELU_TOLERANCE,
    ),
    "gemma-3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 32, "vocab_size": 400, "sliding_window": 64, "num_hidden_layers": 6, "query_pre_attn_scalar": 32},
        tokenizer="sentencepiece",
        tolerance=GELU_TOLERANCE,
    ),
    "gemma-4": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "vocab_size": 400,
            "final_logit_softcapping": 30.0,
            "head_dim": 32,
            "global_head_dim": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 400,
            "sliding_window": 64,
        },
        tokenizer="gemma4",
        tolerance=GELU_TOLERANCE,
    ),
    "gemma-4-dense": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "vocab_size": 400,
            "final_logit_softcapping": 30.0,
            "head_dim": 32,
            "global_head_dim": 64,
            "layer_types": SLIDING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "sliding_window": 64,
        },
        tokenizer="gemma4",
        tolerance=GELU_TOLERANCE,
    ),
    "gemma-4-moe": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "vocab_size": 400,
            "final_logit_softcapping": 30.0,
            "head_dim": 32,
            "global_head_dim": 64,
            "layer_types": SLIDING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 64,
        },
        tokenizer="gemma4",
        tolerance=GELU_TOLERANCE,
    ),
    "phi-2": Tiny("PhiConfig", "PhiForCausalLM", {"num_key_value_heads": 4, "intermediate_size": 256}),
    "phi-3": Tiny("Phi3Config", "Phi3ForCausalLM", {"vocab_size": 400, "sliding_window": 256}, "sentencepiece"),
    "phi-3.5": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "vocab_size": 400,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * n for n in range(8)],
                "long_factor": [1.0 + 0.5 * n for n in range(8)],
            },
        },
        "sentencepiece",
        context=256,
    ),
    "phi-4-mini": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * n for n in range(6)],
                "long_factor": [1.0 + 0.5 * n for n in range(6)],
            },
        },
        tokens=300,
    ),
    "smollm3": Tiny("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "granite": Tiny(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "granite-moe": Tiny(
        "GraniteMoeConfig", "GraniteMoeForCausalLM", {"num_local_experts": 4, "attention_multiplier": 0.2}
    ),
    "olmo2": Tiny("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo3": Tiny("Olmo3Config", "Olmo3ForCausalLM", {"sliding_window": 64, "num_hidden_layers": 4}),
    "olmoe": Tiny(
        "OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    ),
    "stablelm": Tiny("StableLmConfig", "StableLmForCausalLM", {"use_qkv_bias": True}),
    "stablelm-12b": Tiny(
        "StableLmConfig", "StableLmForCausalLM", {"qk_layernorm": True, "use_parallel_residual": True}
    ),
    "gpt2": Tiny("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512}),
    "gpt-neox": Tiny("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.25, "intermediate_size": 256}),
    "falcon": Tiny("FalconConfig", "FalconForCausalLM", {"ffn_hidden_size": 256, "multi_query": True}),
    "falcon-40b": Tiny(
        "FalconConfig",
        "FalconForCausalLM",
        {"ffn_hidden_size": 256, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "starcoder2": Tiny("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": None, "use_bias": True}),
    "command-r": Tiny("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25}),
    "command-r-plus": Tiny(
        "CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25, "use_qk_norm": True, "num_hidden_layers": 64}
    ),
    "command-r7b": Tiny("Cohere2Config", "Cohere2ForCausalLM", {"sliding_window": 64, "num_hidden_layers": 4}),
    "glm-4": Tiny("Glm4Config", "Glm4ForCausalLM", {"head_dim": 32, "attention_bias": True}, "glm"),
    "exaone-4": Tiny("Exaone4Config", "Exaone4ForCausalLM", {"sliding_window": 64, "num_hidden_layers": 64}),
    "exaone-4-1.2b": Tiny(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "rope_parameters": LLAMA3},
    ),
    "ernie-4.5": Tiny("Ernie4_5Config", "Ernie4_5ForCausalLM", {"vocab_size": 400, "head_dim": 32}, "sentencepiece"),
    "ernie-4.5-moe": Tiny(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            "vocab_size": 400,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_intermediate_size": 32,
        },
        "sentencepiece",
    ),
    "gpt-oss": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": 64,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
}


def build(name: str, folder: Path, *, dtype: str = "float32", seed: int = 0, **settings: Any) -> Path:
    """Make the model of a row of `TINY`, with other settings where given."""
    import torch
    import transformers

    tiny = TINY[name]
    torch.manual_seed(seed)
    config = getattr(transformers, tiny.config)(**{**COMMON, **tiny.settings, **settings})
    model = getattr(transformers, tiny.model)(config)
    for parameter_name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and "norm" in parameter_name and "bias" not in parameter_name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2 if is_norm else 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    TOKENIZERS[tiny.tokenizer](folder)
    return folder


def _byte_level(folder: Path) -> None:
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _sentencepiece(folder: Path, vocab_size: int = 400) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCEPIECE_TEXT), model_writer=model, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _glm(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens(["<|user|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _gemma4(folder: Path) -> None:
    """BPE on characters with byte tokens, as Gemma 4's tokenizer.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    _sentencepiece(folder, 398)
    pieces = read_sentencepiece(folder / "tokenizer.model")
    (folder / "tokenizer.model").unlink()
    vocab = {piece.text: number for number, piece in enumerate(pieces.pieces)}
    model = models.BPE(vocab=vocab, merges=merges(pieces), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
              "mask_token": "<mask>", "tokenizer_class": "GemmaTokenizer"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


TOKENIZERS: Mapping[str, Callable[[Path], None]] = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece,
    "gemma4": _gemma4,
    "glm": _glm,
}


def some_ids(folder: Path, count: int = 200) -> list[int]:
    """Random token ids of a model's vocabulary, always the same."""
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(3, vocab, count).tolist()
