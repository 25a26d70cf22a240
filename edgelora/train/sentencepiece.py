"""The tokenizer of a base that has a bare `tokenizer.model`: the ids are those that llama.cpp gives in serving.

transformers 5 puts the space that begins a text there only once (Metaspace, "first"); llama.cpp puts one after every
special token as well (llama.cpp, src/llama-vocab.cpp, `llama_vocab::impl::tokenize`, SPM). An adapter that was trained
on the one and served with the other sees other words after each special token. So the tokenizer is built here, out of
the vocabulary that `converters` writes into the GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import FormatError
from converters.tokenizer import load_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL_TYPES, USER_DEFINED = (2, 3), 4  # gguf.TokenType: unknown and control; user defined
SPACE = "\u2581"
# The ids that llama.cpp takes where tokenizer_config.json names none (SPM, `llama_vocab::impl::load`).
NAMED = {"bos_token": ("bos", 1), "eos_token": ("eos", 2), "unk_token": ("unknown", 0), "pad_token": ("padding", -1)}


def load_sentencepiece(folder: Path) -> Any:
    """A fast `transformers` tokenizer that cuts text as llama.cpp does.

    Args:
        folder: holds tokenizer.model, config.json and perhaps tokenizer_config.json.

    Raises:
        ConversionError: files that cannot be read, or a model that llama.cpp cannot stand for (not BPE, for example).
    """
    from transformers import PreTrainedTokenizerFast

    vocabulary = load_vocabulary(folder, _vocabulary_size(folder / "config.json"))
    metadata = vocabulary.metadata
    tokens = vocabulary.tokens
    names = {name: _named(metadata, tokens, *where) for name, where in NAMED.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(metadata, tokens), **{name: text for name, text in names.items() if text}
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _vocabulary_size(config: Path) -> int:
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{config}: has no vocab_size ({error!r})") from None


def _named(metadata: Mapping[str, Any], tokens: Sequence[str], key: str, default: int) -> str:
    number = metadata.get(f"tokenizer.ggml.{key}_token_id", default)
    return tokens[number] if 0 <= number < len(tokens) else ""


def _tokenizer(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    ids = {token: number for number, token in enumerate(tokens)}
    merges = _merges(tokens, metadata["tokenizer.ggml.scores"], ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True))
    spaced = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prefix = [normalizers.Prepend(SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if spaced else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = dict(zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens if kinds[t] in CONTROL_TYPES])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in tokens if kinds[t] == USER_DEFINED])
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order in which SentencePiece joins them: the best score first."""

    def pairs(token: str) -> Iterator[tuple[str, str]]:
        for cut in range(len(token) - 1, 0, -1):
            if token[:cut] in ids and token[cut:] in ids:
                yield token[:cut], token[cut:]

    ranked = sorted(range(len(tokens)), key=lambda number: -scores[number])
    return [pair for number in ranked for pair in pairs(tokens[number])]
