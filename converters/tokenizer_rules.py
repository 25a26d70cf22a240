"""How a family's vocabulary is written: `set_vocab` of each model class in llama.cpp's conversion/*.py, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Layout(Enum):
    """A way to lay a vocabulary out in a GGUF file, and the files it is made from."""

    SENTENCEPIECE = "sentencepiece"  # tokenizer.model: tokens with scores and types
    LLAMA_HF = "llama-hf"  # tokenizer.json, BPE with <0x00> byte tokens: no scores are known
    BYTE_LEVEL = "byte-level"  # tokenizer.json, or vocab.json and merges.txt: GPT-2's bytes, merges
    GEMMA4 = "gemma4"  # tokenizer.json, BPE with <0x00> byte tokens, and its merges


@dataclass(frozen=True)
class TokenizerRules:
    """What a family does with its tokenizer files.

    Attributes:
        layouts: tried in order; the first whose files are there is taken.
        byte_level_classes: values of `tokenizer_class` that mean BYTE_LEVEL, whatever the files.
        json_tokens: tokenizer.model takes the added tokens of tokenizer.json too, as they are spelled (Phi-3).
        space_prefix: `add_space_prefix` in the file: False, or what tokenizer_config.json says where it says so.
        add_bos: `add_bos_token` in the file, whatever the tokenizer says.
        named: kind to the text of an added token, for kinds that no file gives an id (GLM-4: eot is <|user|>).
        ids: kind to id, for kinds that no file gives one (Gemma 1).
        ids_at: the same for one vocabulary size (CodeLlama).
        add_bos_at: `add_bos_token` for one vocabulary size (Granite's code models).
        visible: control tokens that stay part of a reply's text, for the parser of tool calls.
    """

    layouts: tuple[Layout, ...] = (Layout.BYTE_LEVEL,)
    byte_level_classes: frozenset[str] = frozenset()
    json_tokens: bool = False
    space_prefix: bool | str | None = None
    add_bos: bool | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    ids_at: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    add_bos_at: Mapping[int, bool] = field(default_factory=dict)
    visible: frozenset[str] = frozenset()

    def ids_for(self, vocab_size: int) -> Mapping[str, int]:
        return {**self.ids, **self.ids_at.get(vocab_size, {})}

    def add_bos_for(self, vocab_size: int) -> bool | None:
        return self.add_bos_at.get(vocab_size, self.add_bos)


AS_CONFIGURED = "as tokenizer_config.json says"

# LlamaModel (conversion/llama.py): Llama, Mistral, Mixtral, SmolLM2, SmolLM3, Yi, TinyLlama, Granite
LLAMA_RULES = TokenizerRules(
    layouts=(Layout.SENTENCEPIECE, Layout.LLAMA_HF, Layout.BYTE_LEVEL),
    space_prefix=AS_CONFIGURED,
    ids_at={32016: {"eot": 32010}},
    add_bos_at={49152: False},
)
# TextModel (conversion/base.py): whoever has no set_vocab of its own
BYTE_LEVEL_RULES = TokenizerRules()
# Qwen2Model, Qwen3Model (conversion/qwen.py)
QWEN_RULES = TokenizerRules(layouts=(Layout.SENTENCEPIECE, Layout.BYTE_LEVEL))
# Gemma2Model, Gemma3Model, Gemma3NModel (conversion/gemma.py); LLAMA_HF for the folders that those refuse
GEMMA_RULES = TokenizerRules(layouts=(Layout.SENTENCEPIECE, Layout.LLAMA_HF), space_prefix=False)
# GemmaModel: it writes CodeGemma's ids for all of Gemma 1; those for infilling have no key in a GGUF file
GEMMA_1_RULES = TokenizerRules(layouts=GEMMA_RULES.layouts, space_prefix=False, ids={"eot": 107})
# Gemma4Model
GEMMA_4_RULES = TokenizerRules(
    layouts=(Layout.GEMMA4,),
    space_prefix=False,
    add_bos=True,
    visible=frozenset(
        {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
    ),
)
# Phi3MiniModel (conversion/phi.py)
PHI_3_RULES = TokenizerRules(
    layouts=(Layout.SENTENCEPIECE, Layout.BYTE_LEVEL),
    byte_level_classes=frozenset({"GPT2Tokenizer"}),
    json_tokens=True,
)
# Glm4Model (conversion/glm.py)
GLM_4_RULES = TokenizerRules(
    named={"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"}
)
# Ernie4_5Model (conversion/ernie.py); LLAMA_HF for the folders that it refuses
ERNIE_RULES = TokenizerRules(layouts=(Layout.SENTENCEPIECE, Layout.LLAMA_HF), space_prefix=AS_CONFIGURED)
