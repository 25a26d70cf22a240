"""The model families that convert, found by the name in `config.json` or in a GGUF file.

To add a family: one file beside this one that ends in `FAMILY = Family(...)`, and its row in `_ROWS`. A model that is
another family under its own name needs only the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from converters.architectures import (
    cohere2,
    command_r,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    gpt2,
    gpt_oss,
    gptneox,
    granite,
    granite_moe,
    llama,
    mistral3,
    olmo2,
    olmoe,
    phi2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    qwen_vl,
    smollm3,
    stablelm,
    starcoder2,
)
from converters.architectures.family import Config, Family, Indices, Place, Row
from converters.architectures.sizes import Sizes
from converters.errors import FormatError, UnsupportedArchitectureError

__all__ = [
    "FAMILIES",
    "MODELS",
    "Config",
    "Family",
    "Indices",
    "Place",
    "Row",
    "Sizes",
    "find_family",
    "find_gguf_family",
]

# transformers class, the model_type that goes with it, the family, and what people call these models.
_ROWS: tuple[tuple[str, str, Family, str], ...] = (
    ("LlamaForCausalLM", "llama", llama.FAMILY, "Llama 1 to 3.3, SmolLM, SmolLM2, Yi, TinyLlama"),
    ("MistralForCausalLM", "mistral", llama.MISTRAL, "Mistral, Mistral Nemo, Zephyr"),
    ("MixtralForCausalLM", "mixtral", llama.MIXTRAL, "Mixtral 8x7B, 8x22B"),
    ("Mistral3ForConditionalGeneration", "mistral3", mistral3.SMALL, "Mistral Small 3.1, 3.2 (its text model)"),
    ("Ministral3ForCausalLM", "ministral3", mistral3.MINISTRAL, "Ministral 3"),
    ("LlavaForConditionalGeneration", "llava", llama.FAMILY, "LLaVA on Llama (its text model)"),
    ("Qwen2ForCausalLM", "qwen2", qwen2.FAMILY, "Qwen 1.5, 2, 2.5"),
    ("Qwen2MoeForCausalLM", "qwen2_moe", qwen2_moe.FAMILY, "Qwen 1.5 MoE, Qwen2 57B-A14B"),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", qwen_vl.QWEN2, "Qwen2-VL (its text model)"),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", qwen_vl.QWEN2, "Qwen2.5-VL (its text model)"),
    ("Qwen3ForCausalLM", "qwen3", qwen3.FAMILY, "Qwen3"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", qwen3_moe.FAMILY, "Qwen3 30B-A3B, 235B-A22B, Qwen3 Coder"),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", qwen_vl.QWEN3, "Qwen3-VL (its text model)"),
    ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", qwen_vl.QWEN3_MOE, "Qwen3-VL MoE (its text model)"),
    ("Qwen3NextForCausalLM", "qwen3_next", qwen3_next.FAMILY, "Qwen3-Next"),
    ("Qwen3_5ForCausalLM", "qwen3_5_text", qwen3_5.DENSE, "Qwen3.5"),
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", qwen3_5.DENSE, "Qwen3.5 with vision (its text model)"),
    ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", qwen3_5.MIXTURE, "Qwen3.5 MoE"),
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", qwen3_5.MIXTURE, "Qwen3.5 MoE with vision (its text model)"),
    ("GemmaForCausalLM", "gemma", gemma.FAMILY, "Gemma 1, CodeGemma"),
    ("Gemma2ForCausalLM", "gemma2", gemma2.FAMILY, "Gemma 2"),
    ("Gemma3ForCausalLM", "gemma3_text", gemma3.FAMILY, "Gemma 3 270M, 1B"),
    ("Gemma3ForConditionalGeneration", "gemma3", gemma3.FAMILY, "Gemma 3 4B to 27B (its text model)"),
    ("Gemma4ForCausalLM", "gemma4_text", gemma4.FAMILY, "Gemma 4"),
    ("Gemma4ForConditionalGeneration", "gemma4", gemma4.FAMILY, "Gemma 4 with vision and audio (its text model)"),
    ("PhiForCausalLM", "phi", phi2.FAMILY, "Phi-1.5, Phi-2"),
    ("Phi3ForCausalLM", "phi3", phi3.FAMILY, "Phi-3, Phi-3.5, Phi-4, Phi-4-mini"),
    ("SmolLM3ForCausalLM", "smollm3", smollm3.FAMILY, "SmolLM3"),
    ("GraniteForCausalLM", "granite", granite.FAMILY, "Granite 3"),
    ("GraniteMoeForCausalLM", "granitemoe", granite_moe.FAMILY, "Granite 3 1B-A400M, 3B-A800M"),
    ("Olmo2ForCausalLM", "olmo2", olmo2.FAMILY, "OLMo 2"),
    ("Olmo3ForCausalLM", "olmo3", olmo2.OLMO3, "OLMo 3"),
    ("OlmoeForCausalLM", "olmoe", olmoe.FAMILY, "OLMoE"),
    ("StableLmForCausalLM", "stablelm", stablelm.FAMILY, "StableLM, StableLM 2, Zephyr 3B"),
    ("GPT2LMHeadModel", "gpt2", gpt2.FAMILY, "GPT-2, DistilGPT2"),
    ("GPTNeoXForCausalLM", "gpt_neox", gptneox.FAMILY, "GPT-NeoX, Pythia"),
    ("FalconForCausalLM", "falcon", falcon.FAMILY, "Falcon 7B, 40B, 180B"),
    ("Starcoder2ForCausalLM", "starcoder2", starcoder2.FAMILY, "StarCoder2"),
    ("CohereForCausalLM", "cohere", command_r.FAMILY, "Command-R, Command-R+, Aya 23, Aya Expanse"),
    ("Cohere2ForCausalLM", "cohere2", cohere2.FAMILY, "Command-R7B, Command A"),
    ("Glm4ForCausalLM", "glm4", glm4.FAMILY, "GLM-4 0414"),
    ("Exaone4ForCausalLM", "exaone4", exaone4.FAMILY, "EXAONE 4.0"),
    ("Ernie4_5ForCausalLM", "ernie4_5", ernie4_5.FAMILY, "ERNIE 4.5"),
    ("Ernie4_5_ForCausalLM", "ernie4_5", ernie4_5.FAMILY, "ERNIE 4.5, as first published"),
    ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", ernie4_5_moe.FAMILY, "ERNIE 4.5 21B-A3B, 300B-A47B"),
    ("GptOssForCausalLM", "gpt_oss", gpt_oss.FAMILY, "gpt-oss 20B, 120B"),
)
FAMILIES: Mapping[str, Family] = {name: family for name, _, family, _ in _ROWS}
MODEL_TYPES: Mapping[str, str] = {name: model_type for name, model_type, _, _ in _ROWS}
MODELS: Mapping[str, str] = {name: models for name, _, _, models in _ROWS}
# The same class, under other names in older files
_OLDER = {"StableLMEpochForCausalLM": "StableLmForCausalLM", "RWForCausalLM": "FalconForCausalLM"}
# model_type of files whose code was published beside them, before transformers had it
_OLDER_TYPES = {"RefinedWebModel": "falcon", "RefinedWeb": "falcon", "stablelm_epoch": "stablelm", "phi-msft": "phi"}


def find_family(config: Config, folder: Path) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        FormatError: `architectures` is missing, or `model_type` contradicts it.
        UnsupportedArchitectureError: a family that is not in the table; the hint names the nearest one.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise FormatError(f"{folder / 'config.json'}: architectures is {names!r}, expected a list with one name")
    name = _OLDER.get(names[0], names[0])
    if name not in FAMILIES:
        raise _unknown(names[0], str(folder), list(FAMILIES), config)
    wanted, given = MODEL_TYPES[name], config.get("model_type", MODEL_TYPES[name])
    if _OLDER_TYPES.get(str(given), given) != wanted:
        raise FormatError(
            f"{folder / 'config.json'}: architectures says {names[0]} (model_type {wanted!r}), model_type is {given!r}",
            hint="transformers builds the model of model_type: correct the one that is wrong.",
        )
    return FAMILIES[name]


def find_gguf_family(architecture: str, source: Path) -> Family:
    """The family of a GGUF file.

    Raises:
        UnsupportedArchitectureError: a family that is not in the table.
    """
    by_name = {family.architecture: family for family in reversed([*FAMILIES.values()])}
    if architecture not in by_name:
        raise _unknown(architecture, str(source), list(by_name), {})
    return by_name[architecture]


def _unknown(name: str, source: str, known: list[str], config: Config) -> UnsupportedArchitectureError:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    remote = config.get("auto_map")
    code = f"; it is code of its own ({', '.join(map(str, remote.values()))}), which is not run" if isinstance(
        remote, dict
    ) else ""  # fmt: skip
    return UnsupportedArchitectureError(
        f"{source}: unknown architecture {name!r}; the nearest known one is {nearest}{code}",
        hint="To add it, write a file in converters/architectures/, or an alias row in its __init__.py. "
        f"Known: {', '.join(known)}.",
    )
