"""A `tokenizer.json` for a folder that has only a SentencePiece `tokenizer.model`.

transformers makes the same one in memory when it opens such a folder (`LlamaTokenizer`): a space is put before the
text, and not again after each special token as llama.cpp's SentencePiece does. Training saw these ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken

from converters.sentencepiece_model import SentencePieceModel

SPACE = "▁"
SPECIAL_TYPES = (TokenType.UNKNOWN, TokenType.CONTROL)


def sentencepiece_json(
    model: SentencePieceModel, added: Mapping[int, AddedToken], config: Mapping[str, Any], ends: tuple[str, str]
) -> str:
    """The text of a tokenizer.json.

    Args:
        model: a BPE model with byte tokens that does not normalize.
        added: tokens that are not pieces of it, or other than it says, by id.
        config: `tokenizer_config.json`.
        ends: tokens put before and after a text where special tokens are asked for; "" for none.
    """
    tokens = {number: AddedToken(piece.text, normalized=False, special=piece.type in SPECIAL_TYPES)
              for number, piece in enumerate(model.pieces)
              if piece.type in (*SPECIAL_TYPES, TokenType.USER_DEFINED)}  # fmt: skip
    tokens |= added
    ids = {token.content: number for number, token in tokens.items()}
    prefix = config.get("add_prefix_space", model.adds_prefix)
    scheme = "never" if prefix is False else "always" if config.get("legacy") else "first"
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(number, token) for number, token in sorted(tokens.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "post_processor": _ends(ends, ids),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece.text: number for number, piece in enumerate(model.pieces)}, "merges": merges(model),
        },
    }  # fmt: skip
    return json.dumps(whole, ensure_ascii=False)


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to put two pieces together to a third, by the third's id: a piece's score falls as its id grows.

    The order is that of `generate_merges` in transformers (tokenization_utils_base.py).
    """
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    found: list[tuple[str, str]] = []
    for piece in model.pieces:
        halves = ((piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text)))
        found += [(left, right) for left, right in halves if left in ids and right in ids]  # the shortest left first
    return found


def _added(number: int, token: AddedToken) -> dict[str, Any]:
    return {
        "id": number, "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
        "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special,
    }  # fmt: skip


def _ends(ends: tuple[str, str], ids: Mapping[str, int]) -> dict[str, Any] | None:
    first, last = ([end] if end in ids else [] for end in ends)
    if not first and not last:
        return None

    def items(names: Iterable[str], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": type_id}} for name in names]

    single, pair = (
        [*items(first, number), {"Sequence": {"id": name, "type_id": number}}, *items(last, number)]
        for number, name in enumerate("AB")
    )
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*first, *last)}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *pair], "special_tokens": special}
