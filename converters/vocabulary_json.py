"""A `tokenizer.json` for the vocabulary of a GGUF file that has none in it: llama.cpp's tokenizer in other words.

    tokenizer.ggml.model = "gpt2"     BPE on bytes, cut by the expressions of its `tokenizer.ggml.pre`
                           "llama"    SentencePiece: neighbours join by score, a space goes before each piece of text
                           "gemma4"   BPE on characters, with byte tokens

Whether the two give the same ids is for the reader to check, as `edgelora.train.gguf_tokenizer` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gguf.constants import TokenType

from converters.errors import FormatError, UnsupportedError
from converters.pretokenizers import CUTS

SPACE = "▁"
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
Json = dict[str, Any]


def vocabulary_json(metadata: Mapping[str, Any]) -> str:
    """The text of a tokenizer.json; the one in the file, where there is one.

    Args:
        metadata: of a GGUF base.

    Raises:
        UnsupportedError: a tokenizer that no tokenizer.json can stand for, or whose expressions nobody here knows.
        FormatError: no vocabulary, or one whose parts do not fit each other.
    """
    if isinstance(carried := metadata.get("tokenizer.huggingface.json"), str):
        return carried
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in _KINDS:
        raise UnsupportedError(f"its tokenizer is {kind!r}, and {', '.join(_KINDS)} can be made into a tokenizer.json")
    types = metadata.get("tokenizer.ggml.token_type") or [int(TokenType.NORMAL)] * len(tokens or ())
    if not isinstance(tokens, list) or len(types) != len(tokens):
        raise FormatError("tokenizer.ggml.tokens and tokenizer.ggml.token_type do not fit each other")
    added = [_added(number, tokens[number], kind) for number, kind in enumerate(types) if kind in ADDED]
    parts = _KINDS[str(kind)](metadata, tokens)
    return json.dumps(
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None, **parts},
        ensure_ascii=False,
    )


def _added(number: int, text: str, kind: int) -> Json:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": kind == TokenType.CONTROL}


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **settings: Any) -> Json:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    vocab = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", **usual, **settings, "vocab": vocab, "merges": merges}


def _stored_merges(metadata: Mapping[str, Any]) -> list[list[str]]:
    pairs = [str(merge).split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise FormatError("tokenizer.ggml.merges is missing, or has merges that are no pairs")
    return pairs


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    if name not in CUTS:
        raise UnsupportedError(f"tokenizer.ggml.pre is {name!r}, whose expressions are not known here")
    cut = CUTS[name]
    plain = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False} for step in cut.steps
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, {"type": "ByteLevel", **plain}]},
        "decoder": {"type": "ByteLevel", **plain},
        "model": _bpe(tokens, _stored_merges(metadata), ignore_merges=cut.ignore_merges),
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise FormatError("tokenizer.ggml.scores does not fit tokenizer.ggml.tokens")
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    first = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    decoders: list[Json] = [*_SPACED_DECODERS, *([_STRIP] if prefixed else [])]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaced]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, _by_score(tokens, scores), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True),
    }


def _by_score(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put two tokens together to a third, in the order of the third's score, which is llama.cpp's."""
    there, found = set(tokens), list[tuple[str, str]]()
    for number in sorted(range(len(tokens)), key=lambda number: (-scores[number], number)):
        text = tokens[number]
        halves = ((text[:at], text[at:]) for at in range(1, len(text)))
        found += [(left, right) for left, right in halves if left in there and right in there]
    return found


def _gemma4(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    return {
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "decoder": {"type": "Sequence", "decoders": [*_SPACED_DECODERS]},
        "model": _bpe(tokens, _stored_merges(metadata), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True),
    }  # fmt: skip


_SPACED_DECODERS: tuple[Json, ...] = (
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
)  # fmt: skip
_STRIP: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_KINDS: Mapping[str, Callable[[Mapping[str, Any], Sequence[str]], Json]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _gemma4,
}
