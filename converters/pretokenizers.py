"""Which of llama.cpp's pre-tokenizers cuts text as a `tokenizer.json` does.

llama.cpp compiles its regular expressions in and picks them by a name in the file (`llm_tokenizer_bpe`,
src/llama-vocab.cpp). Here a tokenizer's steps are compared with the expressions behind each name. A tokenizer that fits
none keeps its own `tokenizer.json` inside the GGUF file, and edgelora tokenizes with that: same ids as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]

_LAST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _LAST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _LAST

# (steps, ignore_merges) to the name in llama.cpp; ignore_merges: a whole word in the vocabulary is one token at once.
NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
}


def pretokenizer_name(tokenizer: Json) -> str | None:
    """The name for a byte-level BPE `tokenizer.json`, or None where llama.cpp has nothing equal."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return NAMES.get((steps, bool(tokenizer["model"].get("ignore_merges")))) if steps else None


def _steps(pre_tokenizer: Json | None) -> tuple[str, ...] | None:
    """The regular expressions in order, or None for a step that is not one, or bytes that are not made last."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if [number for number, part in enumerate(parts) if part.get("type") == "ByteLevel"] != [len(parts) - 1]:
        return None  # without it, or before other steps, text does not reach the merges as llama.cpp's bytes do
    steps: tuple[str, ...] = ()
    for part in parts:
        step = _step(part)
        if step is None:
            return None
        steps += step
    return steps


def _step(part: Json) -> tuple[str, ...] | None:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return (GPT2,) if part.get("use_regex", True) else ()
    if kind == "Digits" and part.get("individual_digits"):
        return (DIGITS,)
    if kind == "Split" and "Regex" in part.get("pattern", {}):
        keeps_all = (part.get("behavior"), bool(part.get("invert"))) in {("Isolated", False), ("Removed", True)}
        return (part["pattern"]["Regex"],) if keeps_all else None
    return None
