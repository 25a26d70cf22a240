"""What the config.json of released models says, by hub id: the settings that matter, as they were published.

Left out are names of tokens, initialization, dropout, dtypes and what is equal everywhere. Lists of factors of
long rotary embeddings have the right length and made-up values. Models that are published under a license to click on
are given from public copies of their configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]


def one(cls: str, model_type: str, **settings: Any) -> dict[str, Any]:
    return {"architectures": [cls], "model_type": model_type, **settings}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv: int | None, vocab: int, context: int,
          **settings: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "max_position_embeddings": context, **settings,
    }  # fmt: skip


def every(step: int, layers: int, other: str = "sliding_attention") -> list[str]:
    """Full attention in every `step`th layer."""
    return ["full_attention" if (n + 1) % step == 0 else other for n in range(layers)]


def llama3(factor: float) -> dict[str, Any]:
    return {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip


def long(count: int, name: str = "longrope") -> dict[str, Any]:
    return {"type": name, "long_factor": [1.0 + n for n in range(count)],
            "short_factor": [1.0 + n / 64 for n in range(count)]}  # fmt: skip


# fmt: off
SILU: Facts = {"hidden_act": "silu"}
LLAMA = {**one("LlamaForCausalLM", "llama"), **SILU, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
         "rope_scaling": None}
LLAMA_2 = {**LLAMA, "attention_bias": False, "pretraining_tp": 1}
LLAMA_3 = {**LLAMA, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0}
MISTRAL = {**one("MistralForCausalLM", "mistral"), **SILU, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MIXTRAL = {**one("MixtralForCausalLM", "mixtral"), **SILU, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
           "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False, "rope_theta": 1e6,
           "sliding_window": None, "router_aux_loss_coef": 0.02}
QWEN2 = {**one("Qwen2ForCausalLM", "qwen2"), **SILU, "rms_norm_eps": 1e-6, "use_sliding_window": False,
         "rope_theta": 1e6, "tie_word_embeddings": False}
QWEN2_MOE = {**QWEN2, **one("Qwen2MoeForCausalLM", "qwen2_moe"), "decoder_sparse_step": 1, "norm_topk_prob": False,
             "output_router_logits": False, "router_aux_loss_coef": 0.001}
QWEN3 = {**one("Qwen3ForCausalLM", "qwen3"), **SILU, "attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-6,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
         "tie_word_embeddings": False}
QWEN3_MOE = {**QWEN3, **one("Qwen3MoeForCausalLM", "qwen3_moe"), "decoder_sparse_step": 1, "mlp_only_layers": [],
             "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False,
             "router_aux_loss_coef": 0.001}
QWEN35_TEXT = {
    **SILU, "attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4, "head_dim": 256,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
    "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6,
    "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                        "rope_theta": 10000000, "rope_type": "default"},
}


def qwen35(tied: bool, **text: Any) -> dict[str, Any]:
    mixture = "num_experts" in text
    kind = "qwen3_5_moe" if mixture else "qwen3_5"
    inner = {**QWEN35_TEXT, **text, "model_type": f"{kind}_text", "tie_word_embeddings": tied,
             "layer_types": every(4, text["num_hidden_layers"], "linear_attention")}
    cls = "Qwen3_5MoeForConditionalGeneration" if mixture else "Qwen3_5ForConditionalGeneration"
    return {**one(cls, kind), "text_config": inner, "tie_word_embeddings": tied, "vision_config": {"depth": 27}}


GEMMA = {**one("GemmaForCausalLM", "gemma"), "attention_bias": False, "head_dim": 256, "rms_norm_eps": 1e-6,
         "rope_scaling": None, "rope_theta": 10000.0}
GEMMA_2 = {**one("Gemma2ForCausalLM", "gemma2"), "attention_bias": False, "attn_logit_softcapping": 50.0,
           "final_logit_softcapping": 30.0, "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh",
           "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
           "sliding_window": 4096}
GEMMA_3 = {**one("Gemma3ForCausalLM", "gemma3_text"), "attention_bias": False, "attn_logit_softcapping": None,
           "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
           "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
           "rope_theta": 1000000, "sliding_window": 512}
LINEAR_8 = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}


def gemma3(**text: Any) -> dict[str, Any]:
    return {**one("Gemma3ForConditionalGeneration", "gemma3"), "mm_tokens_per_image": 256,
            "text_config": {"model_type": "gemma3_text", **LINEAR_8, **text},
            "vision_config": {"num_hidden_layers": 27}}


GEMMA_4_TEXT = {
    "model_type": "gemma4_text", "attention_bias": False, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
SMALL_4 = {"attention_k_eq_v": False, "enable_moe_block": False, "hidden_size_per_layer_input": 256,
           "moe_intermediate_size": None, "num_experts": None, "num_global_key_value_heads": None,
           "sliding_window": 512, "top_k_experts": None, "use_bidirectional_attention": None}
LARGE_4 = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
           "sliding_window": 1024, "use_bidirectional_attention": "vision", "use_double_wide_mlp": False}


def gemma4(**text: Any) -> dict[str, Any]:
    return {**one("Gemma4ForConditionalGeneration", "gemma4"), "text_config": {**GEMMA_4_TEXT, **text},
            "tie_word_embeddings": True, "vision_config": {"num_hidden_layers": 27}, "audio_config": None}


PHI = {**one("PhiForCausalLM", "phi"), "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "qk_layernorm": False,
       "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
PHI_3 = {**one("Phi3ForCausalLM", "phi3"), **SILU, "attention_bias": False, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "tie_word_embeddings": False, "original_max_position_embeddings": 4096,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                      "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
GRANITE = {**one("GraniteForCausalLM", "granite"), **SILU, "attention_bias": False, "mlp_bias": False,
           "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None,
           "tie_word_embeddings": True}
GRANITE_2B = {**GRANITE, "attention_multiplier": 0.015625, "logits_scaling": 8.0}
GRANITE_8B = {**GRANITE, "attention_multiplier": 0.0078125, "logits_scaling": 16.0}
OLMO_2 = {**one("Olmo2ForCausalLM", "olmo2"), **SILU, "attention_bias": False, "rms_norm_eps": 1e-6,
          "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False}
STABLELM = {**one("StableLmForCausalLM", "stablelm"), **SILU, "partial_rotary_factor": 0.25, "rope_theta": 10000,
            "tie_word_embeddings": False, "layer_norm_eps": 1e-5}
GPT2 = {**one("GPT2LMHeadModel", "gpt2"), "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024, "n_positions": 1024, "vocab_size": 50257}
NEOX = {**one("GPTNeoXForCausalLM", "gpt_neox"), "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True,
        "tie_word_embeddings": False}
FALCON = {**one("FalconForCausalLM", "falcon"), "alibi": False, "bias": False, "layer_norm_epsilon": 1e-5,
          "multi_query": True, "parallel_attn": True, "vocab_size": 65024}
STARCODER = {**one("Starcoder2ForCausalLM", "starcoder2"), "hidden_act": "gelu_pytorch_tanh", "mlp_type": "default",
             "norm_epsilon": 1e-5, "norm_type": "layer_norm", "sliding_window": 4096, "use_bias": True}
COHERE = {**one("CohereForCausalLM", "cohere"), **SILU, "attention_bias": False, "layer_norm_eps": 1e-5}
GLM_4 = {**one("Glm4ForCausalLM", "glm4"), **SILU, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0, "tie_word_embeddings": False}
EXAONE = {**one("Exaone4ForCausalLM", "exaone4"), **SILU, "rms_norm_eps": 1e-5, "rope_scaling": llama3(16.0),
          "rope_theta": 1000000}
GPT_OSS = {**one("GptOssForCausalLM", "gpt_oss"), **SILU, "attention_bias": True, "experts_per_token": 4,
           "head_dim": 64, "initial_context_length": 4096, "num_experts_per_tok": 4, "output_router_logits": False,
           "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-5,
           "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
           "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False}

RELEASED: Mapping[str, Facts] = {
    # Llama and its aliases
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {**LLAMA_2, **sizes(2048, 5632, 22, 32, 4, 32000, 2048),
                                           "rope_theta": 10000.0},
    "meta-llama/Llama-2-7b-hf": {**LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000, 4096), "pretraining_tp": 1},
    "codellama/CodeLlama-7b-hf": {**LLAMA, **sizes(4096, 11008, 32, 32, 32, 32016, 16384), "rope_theta": 1000000},
    "meta-llama/Meta-Llama-3-8B": {**LLAMA_2, **sizes(4096, 14336, 32, 32, 8, 128256, 8192), "rope_theta": 500000.0},
    "meta-llama/Llama-3.1-8B": {**LLAMA_3, **sizes(4096, 14336, 32, 32, 8, 128256, 131072),
                                "rope_scaling": llama3(8.0)},
    "meta-llama/Llama-3.2-1B": {**LLAMA_3, **sizes(2048, 8192, 16, 32, 8, 128256, 131072), "head_dim": 64,
                                "rope_scaling": llama3(32.0), "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": {**LLAMA_3, **sizes(3072, 8192, 28, 24, 8, 128256, 131072), "head_dim": 128,
                                "rope_scaling": llama3(32.0), "tie_word_embeddings": True},
    "meta-llama/Llama-3.3-70B-Instruct": {**LLAMA_3, **sizes(8192, 28672, 80, 64, 8, 128256, 131072), "head_dim": 128,
                                          "rope_scaling": llama3(8.0)},
    "HuggingFaceTB/SmolLM2-135M": {**LLAMA_3, **sizes(576, 1536, 30, 9, 3, 49152, 8192), "rope_theta": 100000,
                                   "rope_interleaved": False, "is_llama_config": True, "tie_word_embeddings": True},
    "HuggingFaceTB/SmolLM2-1.7B": {**LLAMA_3, **sizes(2048, 8192, 24, 32, 32, 49152, 8192), "rope_theta": 130000,
                                   "tie_word_embeddings": True},
    "01-ai/Yi-6B": {**LLAMA, **sizes(4096, 11008, 32, 32, 4, 64000, 4096), "rope_theta": 5000000.0},
    "01-ai/Yi-1.5-6B": {**LLAMA_2, **sizes(4096, 11008, 32, 32, 4, 64000, 4096), "rope_theta": 5000000.0,
                        "rms_norm_eps": 1e-6},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {**LLAMA_3, **sizes(4096, 14336, 32, 32, 8, 128256, 131072),
                                                 "rope_scaling": llama3(8.0)},
    "mistralai/Mistral-7B-v0.1": {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "rope_theta": 10000.0,
                                  "sliding_window": 4096},
    "mistralai/Mistral-7B-Instruct-v0.2": {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, 32768),
                                           "rope_theta": 1000000.0, "sliding_window": None},
    "mistralai/Mistral-7B-v0.3": {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32768, 32768), "rope_theta": 1000000.0,
                                  "sliding_window": None},
    "mistralai/Mistral-Nemo-Instruct-2407": {**MISTRAL, **sizes(5120, 14336, 40, 32, 8, 131072, 131072),
                                             "head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None},
    "mistralai/Mistral-Small-24B-Instruct-2501": {**MISTRAL, **sizes(5120, 32768, 40, 32, 8, 131072, 32768),
                                                  "head_dim": 128, "rope_theta": 100000000.0, "sliding_window": None},
    "HuggingFaceH4/zephyr-7b-beta": {**MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "rope_theta": 10000.0,
                                     "sliding_window": 4096, "pad_token_id": 2},
    "mistralai/Mixtral-8x7B-v0.1": {**MIXTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, 32768)},
    "mistralai/Mixtral-8x22B-v0.1": {**MIXTRAL, **sizes(6144, 16384, 56, 48, 8, 32000, 65536)},
    # Qwen
    "Qwen/Qwen1.5-0.5B": {**QWEN2, **sizes(1024, 2816, 24, 16, 16, 151936, 32768), "max_window_layers": 21,
                          "sliding_window": 32768, "tie_word_embeddings": True},
    "Qwen/Qwen2-7B": {**QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064, 131072), "max_window_layers": 28,
                      "sliding_window": 131072},
    "Qwen/Qwen2.5-0.5B": {**QWEN2, **sizes(896, 4864, 24, 14, 2, 151936, 32768), "max_window_layers": 24,
                          "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False},
    "Qwen/Qwen2.5-7B": {**QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064, 131072), "max_window_layers": 28,
                        "sliding_window": 131072, "use_mrope": False},
    "Qwen/Qwen2.5-72B-Instruct": {**QWEN2, **sizes(8192, 29568, 80, 64, 8, 152064, 32768), "max_window_layers": 70,
                                  "sliding_window": 131072},
    "Qwen/Qwen2.5-Coder-7B": {**QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064, 32768), "max_window_layers": 28,
                              "sliding_window": 131072},
    # as its model card says to set it for contexts beyond 32768
    "Qwen/Qwen2.5-7B-Instruct (YaRN)": {
        **QWEN2, **sizes(3584, 18944, 28, 28, 4, 152064, 32768), "sliding_window": 131072,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **QWEN2, **sizes(1536, 8960, 28, 12, 2, 151936, 131072), "rope_theta": 10000, "max_window_layers": 21,
        "sliding_window": 4096, "use_mrope": False},
    "Qwen/Qwen1.5-MoE-A2.7B": {
        **QWEN2_MOE, **sizes(2048, 5632, 24, 16, 16, 151936, 8192), "moe_intermediate_size": 1408, "num_experts": 60,
        "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632, "max_window_layers": 21,
        "sliding_window": 32768},
    "Qwen/Qwen2-57B-A14B": {
        **QWEN2_MOE, **sizes(3584, 18944, 28, 28, 4, 151936, 131072), "moe_intermediate_size": 2560, "num_experts": 64,
        "num_experts_per_tok": 8, "shared_expert_intermediate_size": 20480},
    "Qwen/Qwen3-0.6B": {**QWEN3, **sizes(1024, 3072, 28, 16, 8, 151936, 40960), "max_window_layers": 28,
                        "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {**QWEN3, **sizes(4096, 12288, 36, 32, 8, 151936, 40960), "max_window_layers": 36},
    "Qwen/Qwen3-32B": {**QWEN3, **sizes(5120, 25600, 64, 64, 8, 151936, 40960), "max_window_layers": 64},
    "Qwen/Qwen3-30B-A3B": {**QWEN3_MOE, **sizes(2048, 6144, 48, 32, 4, 151936, 40960), "max_window_layers": 48,
                           "moe_intermediate_size": 768},
    "Qwen/Qwen3-235B-A22B": {**QWEN3_MOE, **sizes(4096, 12288, 94, 64, 4, 151936, 40960), "max_window_layers": 94,
                             "moe_intermediate_size": 1536},
    "Qwen/Qwen3-Next-80B-A3B-Instruct": {
        **one("Qwen3NextForCausalLM", "qwen3_next"), **SILU, **sizes(2048, 5120, 48, 16, 2, 151936, 262144),
        "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True,
        "num_experts": 512, "num_experts_per_tok": 10, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 10000000, "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False, "use_sliding_window": False},
    "Qwen/Qwen3.5-0.8B": qwen35(True, **sizes(1024, 3584, 24, 8, 2, 248320, 262144), linear_num_value_heads=16),
    "Qwen/Qwen3.5-27B": qwen35(False, **sizes(5120, 17408, 64, 24, 4, 248320, 262144), linear_num_value_heads=48),
    "Qwen/Qwen3.5-35B-A3B": qwen35(
        False, **{key: value for key, value in sizes(2048, 0, 40, 16, 2, 248320, 262144).items()
                  if key != "intermediate_size"},
        linear_num_value_heads=32, moe_intermediate_size=512, num_experts=256, num_experts_per_tok=8,
        shared_expert_intermediate_size=512),
    # Gemma
    "google/gemma-2b": {**GEMMA, **sizes(2048, 16384, 18, 8, 1, 256000, 8192), "hidden_act": "gelu"},
    "google/gemma-7b": {**GEMMA, **sizes(3072, 24576, 28, 16, 16, 256000, 8192), "hidden_act": "gelu",
                        "hidden_activation": None},
    "google/codegemma-7b": {**GEMMA, **sizes(3072, 24576, 28, 16, 16, 256000, 8192),
                            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    "google/gemma-2-2b": {**GEMMA_2, **sizes(2304, 9216, 26, 8, 4, 256000, 8192), "head_dim": 256,
                          "query_pre_attn_scalar": 256},
    "google/gemma-2-9b": {**GEMMA_2, **sizes(3584, 14336, 42, 16, 8, 256000, 8192), "head_dim": 256,
                          "query_pre_attn_scalar": 256, "sliding_window_size": 4096},
    "google/gemma-2-27b": {**GEMMA_2, **sizes(4608, 36864, 46, 32, 16, 256000, 8192), "head_dim": 128,
                           "query_pre_attn_scalar": 144},
    "google/gemma-3-270m": {**GEMMA_3, **sizes(640, 2048, 18, 4, 1, 262144, 32768), "_sliding_window_pattern": 6,
                            "layer_types": every(6, 18), "use_bidirectional_attention": False},
    "google/gemma-3-1b-pt": {**GEMMA_3, **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "sliding_window_pattern": 6,
                             "cache_implementation": "hybrid"},
    "google/gemma-3-4b-pt": gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
    "google/gemma-3-12b-pt": gemma3(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
                                    num_attention_heads=16, num_key_value_heads=8),
    "google/gemma-3-27b-pt": gemma3(hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
                                    num_attention_heads=32, num_key_value_heads=16, head_dim=128,
                                    query_pre_attn_scalar=168),
    "google/gemma-4-E2B": gemma4(**sizes(1536, 6144, 35, 8, 1, 262144, 131072), **SMALL_4, layer_types=every(5, 35),
                                 num_kv_shared_layers=20, use_double_wide_mlp=True),
    "google/gemma-4-E4B": gemma4(**sizes(2560, 10240, 42, 8, 2, 262144, 131072), **SMALL_4, layer_types=every(6, 42),
                                 num_kv_shared_layers=18, use_double_wide_mlp=False),
    "google/gemma-4-26B-A4B": gemma4(
        **sizes(2816, 2112, 30, 16, 8, 262144, 262144), **LARGE_4, layer_types=every(6, 30), enable_moe_block=True,
        moe_intermediate_size=704, num_experts=128, num_global_key_value_heads=2, top_k_experts=8),
    "google/gemma-4-31B": gemma4(
        **sizes(5376, 21504, 60, 32, 16, 262144, 262144), **LARGE_4, layer_types=every(6, 60), enable_moe_block=False,
        moe_intermediate_size=None, num_experts=None, num_global_key_value_heads=4, top_k_experts=None),
    # Phi
    "microsoft/phi-1_5": {**PHI, **sizes(2048, 8192, 24, 32, None, 51200, 2048), "partial_rotary_factor": 0.5},
    "microsoft/phi-2": {**PHI, **sizes(2560, 10240, 32, 32, 32, 51200, 2048), "partial_rotary_factor": 0.4},
    "microsoft/Phi-3-mini-4k-instruct": {**PHI_3, **sizes(3072, 8192, 32, 32, 32, 32064, 4096),
                                         "rope_scaling": None, "sliding_window": 2047},
    "microsoft/Phi-3-mini-128k-instruct": {**PHI_3, **sizes(3072, 8192, 32, 32, 32, 32064, 131072),
                                           "rope_scaling": long(48), "sliding_window": 262144},
    "microsoft/Phi-3-mini-128k-instruct (first)": {**PHI_3, **sizes(3072, 8192, 32, 32, 32, 32064, 131072),
                                                   "rope_scaling": long(48, "su"), "sliding_window": 262144},
    "microsoft/Phi-3-medium-4k-instruct": {**PHI_3, **sizes(5120, 17920, 40, 40, 10, 32064, 4096),
                                           "rope_scaling": None, "sliding_window": 2047},
    "microsoft/Phi-3.5-mini-instruct": {**PHI_3, **sizes(3072, 8192, 32, 32, 32, 32064, 131072),
                                        "rope_scaling": long(48), "sliding_window": 262144},
    "microsoft/phi-4": {**{key: value for key, value in PHI_3.items() if key != "auto_map"},
                        **sizes(5120, 17920, 40, 40, 10, 100352, 16384), "original_max_position_embeddings": 16384,
                        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None},
    "microsoft/Phi-4-mini-instruct": {
        **PHI_3, **sizes(3072, 8192, 32, 24, 8, 200064, 131072), "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False, "partial_rotary_factor": 0.75, "rope_scaling": long(48),
        "sliding_window": 262144, "tie_word_embeddings": True},
    # others of Llama's shape
    "HuggingFaceTB/SmolLM3-3B": {
        **one("SmolLM3ForCausalLM", "smollm3"), **SILU, **sizes(2048, 11008, 36, 16, 4, 128256, 65536),
        "attention_bias": False, "layer_types": ["full_attention"] * 36, "max_window_layers": 28, "mlp_bias": False,
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False},
    "ibm-granite/granite-3.0-2b-base": {**GRANITE_2B, **sizes(2048, 8192, 40, 32, 8, 49152, 4096),
                                        "rope_theta": 10000},
    "ibm-granite/granite-3.0-8b-base": {**GRANITE_8B, **sizes(4096, 12800, 40, 32, 8, 49152, 4096),
                                        "rope_theta": 10000},
    "ibm-granite/granite-3.1-2b-base": {**GRANITE_2B, **sizes(2048, 8192, 40, 32, 8, 49152, 131072),
                                        "rope_theta": 5000000.0},
    "ibm-granite/granite-3.1-8b-base": {**GRANITE_8B, **sizes(4096, 12800, 40, 32, 8, 49152, 131072),
                                        "rope_theta": 10000000.0},
    "ibm-granite/granite-3.3-2b-instruct": {**GRANITE_2B, **sizes(2048, 8192, 40, 32, 8, 49159, 131072),
                                            "rope_theta": 10000000.0},
    "ibm-granite/granite-3.3-8b-instruct": {**GRANITE_8B, **sizes(4096, 12800, 40, 32, 8, 49159, 131072),
                                            "rope_theta": 10000000.0},
    "allenai/OLMo-2-0425-1B": {**OLMO_2, **sizes(2048, 8192, 16, 16, 16, 100352, 4096)},
    "allenai/OLMo-2-1124-7B": {**OLMO_2, **sizes(4096, 11008, 32, 32, 32, 100352, 4096)},
    "allenai/OLMo-2-0325-32B": {**OLMO_2, **sizes(5120, 27648, 64, 40, 8, 100352, 4096)},
    "allenai/Olmo-3-1025-7B": {
        **OLMO_2, **one("Olmo3ForCausalLM", "olmo3"), **sizes(4096, 11008, 32, 32, 32, 100278, 65536),
        "layer_types": every(4, 32), "sliding_window": 4096,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"}},
    "stabilityai/stablelm-3b-4e1t": {**STABLELM, **sizes(2560, 6912, 32, 32, 32, 50304, 4096), "use_qkv_bias": False},
    "stabilityai/stablelm-3b-4e1t (first)": {
        **one("StableLMEpochForCausalLM", "stablelm_epoch"), **SILU, **sizes(2560, 6912, 32, 32, 32, 50304, 4096),
        "norm_eps": 1e-5, "rope_pct": 0.25, "rope_theta": 10000, "rotary_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_stablelm_epoch.StableLMEpochForCausalLM"}},
    "stabilityai/stablelm-2-1_6b": {**STABLELM, **sizes(2048, 5632, 24, 32, 32, 100352, 4096), "use_qkv_bias": True},
    "stabilityai/stablelm-2-12b": {**STABLELM, **sizes(5120, 13824, 40, 32, 8, 100352, 4096), "qk_layernorm": True,
                                   "use_parallel_residual": True, "use_qkv_bias": False},
    # older shapes
    "openai-community/gpt2": {**GPT2, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "openai-community/gpt2-xl": {**GPT2, "n_embd": 1600, "n_head": 25, "n_layer": 48},
    "distilbert/distilgpt2": {**GPT2, "n_embd": 768, "n_head": 12, "n_layer": 6},
    "microsoft/DialoGPT-medium": {**GPT2, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "EleutherAI/pythia-70m": {**NEOX, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
                              "num_attention_heads": 8, "vocab_size": 50304},
    "EleutherAI/pythia-1.4b": {**NEOX, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                               "num_attention_heads": 16, "vocab_size": 50304},
    "EleutherAI/pythia-12b": {**NEOX, "hidden_size": 5120, "intermediate_size": 20480, "num_hidden_layers": 36,
                              "num_attention_heads": 40, "vocab_size": 50688},
    "EleutherAI/gpt-neox-20b": {**NEOX, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
                                "num_attention_heads": 64, "vocab_size": 50432, "hidden_act": "gelu_fast"},
    "tiiuae/falcon-7b": {**FALCON, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
                         "num_kv_heads": 71, "new_decoder_architecture": False},
    "tiiuae/falcon-40b": {**FALCON, "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
                          "num_kv_heads": 8, "new_decoder_architecture": True},
    "bigcode/starcoder2-3b": {**STARCODER, **sizes(3072, 12288, 30, 24, 2, 49152, 16384),
                              "rope_theta": 999999.4420358813},
    "bigcode/starcoder2-7b": {**STARCODER, **sizes(4608, 18432, 32, 36, 4, 49152, 16384), "rope_theta": 1000000},
    "bigcode/starcoder2-15b": {**STARCODER, **sizes(6144, 24576, 40, 48, 4, 49152, 16384), "rope_theta": 100000,
                               "tie_word_embeddings": False},
    # kin of the families above
    "allenai/OLMoE-1B-7B-0924": {
        **OLMO_2, **one("OlmoeForCausalLM", "olmoe"), **sizes(2048, 1024, 16, 16, 16, 50304, 4096), "clip_qkv": None,
        "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0},
    "ibm-granite/granite-3.0-1b-a400m-base": {
        **GRANITE_2B, **one("GraniteMoeForCausalLM", "granitemoe"), **sizes(1024, 512, 24, 16, 8, 49152, 4096),
        "logits_scaling": 6.0, "num_experts_per_tok": 8, "num_local_experts": 32, "rope_theta": 10000},
    "baidu/ERNIE-4.5-21B-A3B-PT": {
        **one("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"), **SILU, **sizes(2560, 12288, 28, 20, 4, 103424, 131072),
        "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": 27, "moe_layer_interval": 1,
        "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_bias": False},
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": {
        **one("Mistral3ForConditionalGeneration", "mistral3"), "vision_config": {"model_type": "pixtral"},
        "text_config": {"model_type": "mistral", **SILU, **sizes(5120, 32768, 40, 32, 8, 131072, 131072),
                        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None}},
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        **QWEN2, **one("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        **sizes(3584, 18944, 28, 28, 4, 152064, 128000), "max_window_layers": 28, "sliding_window": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vision_config": {"depth": 32}},
    "Qwen/Qwen3-VL-8B-Instruct": {
        **one("Qwen3VLForConditionalGeneration", "qwen3_vl"), "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen3_vl_text", **SILU, **sizes(4096, 12288, 36, 32, 8, 151936, 262144),
                        "attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
                        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                                         "rope_type": "default"}},
        "vision_config": {"deepstack_visual_indexes": [8, 16, 24], "depth": 27}},
    # Cohere, GLM, EXAONE, ERNIE, gpt-oss
    "CohereLabs/c4ai-command-r-v01": {**COHERE, **sizes(8192, 22528, 40, 64, 64, 256000, 8192), "logit_scale": 0.0625,
                                      "model_max_length": 131072, "rope_theta": 8000000.0, "use_qk_norm": False},
    "CohereLabs/c4ai-command-r-plus": {**COHERE, **sizes(12288, 33792, 64, 96, 8, 256000, 8192), "use_qk_norm": True,
                                       "logit_scale": 0.8333333333333334, "model_max_length": 131072,
                                       "rope_theta": 75000000.0},
    "CohereLabs/aya-23-8B": {**COHERE, **sizes(4096, 14336, 32, 32, 8, 256000, 8192), "logit_scale": 0.0625,
                             "rope_theta": 10000, "use_qk_norm": False},
    "CohereLabs/aya-expanse-8b": {**COHERE, **sizes(4096, 14336, 32, 32, 8, 256000, 8192), "logit_scale": 0.125,
                                  "model_max_length": 8192, "rope_theta": 10000, "use_qk_norm": False},
    "CohereLabs/c4ai-command-r7b-12-2024": {
        **one("Cohere2ForCausalLM", "cohere2"), **SILU, **sizes(4096, 14336, 32, 32, 8, 256000, 132096),
        "attention_bias": False, "cache_implementation": "hybrid", "head_dim": 128, "layer_norm_eps": 1e-5,
        "layer_switch": 4, "logit_scale": 0.25, "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "rope_scaling": None, "rope_theta": 50000, "rotary_pct": 1.0,
        "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True,
        "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": False},
    "zai-org/GLM-4-9B-0414": {**GLM_4, **sizes(4096, 13696, 40, 32, 2, 151552, 32768), "attention_bias": True},
    "zai-org/GLM-4-32B-0414": {**GLM_4, **sizes(6144, 23040, 61, 48, 2, 151552, 32768), "attention_bias": False},
    "LGAI-EXAONE/EXAONE-4.0-1.2B": {
        **EXAONE, **sizes(2048, 4096, 30, 32, 8, 102400, 65536), "head_dim": 64, "layer_types": ["full_attention"] * 30,
        "sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True},
    "LGAI-EXAONE/EXAONE-4.0-32B": {
        **EXAONE, **sizes(5120, 27392, 64, 40, 8, 102400, 131072), "head_dim": 128, "layer_types": every(4, 64),
        "sliding_window": 4096, "sliding_window_pattern": "LLLG", "tie_word_embeddings": False},
    "baidu/ERNIE-4.5-0.3B-PT": {
        **one("Ernie4_5ForCausalLM", "ernie4_5"), **SILU, **sizes(1024, 3072, 18, 16, 2, 103424, 131072),
        "head_dim": 128, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 500000.0,
        "tie_word_embeddings": True, "use_bias": False},
    "openai/gpt-oss-20b": {**GPT_OSS, **sizes(2880, 2880, 24, 64, 8, 201088, 131072), "num_local_experts": 32,
                           "layer_types": every(2, 24)},
    "openai/gpt-oss-120b": {**GPT_OSS, **sizes(2880, 2880, 36, 64, 8, 201088, 131072), "num_local_experts": 128,
                            "layer_types": every(2, 36)},
}

# Models of these families' names that llama.cpp computes otherwise, or not at all, and what is said of them.
REFUSED: Mapping[str, tuple[Facts, tuple[str, ...]]] = {
    "tiiuae/falcon-rw-1b": (
        {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "hidden_size": 2048,
         "num_hidden_layers": 24, "num_attention_heads": 32, "new_decoder_architecture": False, "num_kv_heads": 32,
         "vocab_size": 50304},
        ("alibi is True", "bias is True", "parallel_attn is False", "multi_query is False"),
    ),
}

# Parameters, as their publishers and the hub count them; that the settings give them says that they are the model's.
PARAMETERS: Mapping[str, int] = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "01-ai/Yi-6B": 6_061_035_520,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen/Qwen1.5-0.5B": 463_987_712,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen2.5-Coder-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/codegemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
    "stabilityai/stablelm-3b-4e1t (first)": 2_795_443_200,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-xl": 1_557_611_200,
    "distilbert/distilgpt2": 81_912_576,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "tiiuae/falcon-7b": 6_921_720_704,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "bigcode/starcoder2-15b": 15_957_889_024,
    "CohereLabs/c4ai-command-r-v01": 34_980_831_232,
    "CohereLabs/aya-23-8B": 8_028_033_024,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "baidu/ERNIE-4.5-0.3B-PT": 360_748_032,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
}
# fmt: on
