"""The vocabulary of a `tokenizer.json`, or of vocab.json and merges.txt, laid out for a GGUF file."""

from __future__ import annotations

import re
from typing import Any

from gguf.constants import TokenType

from converters.errors import UnsupportedError
from converters.tokenizer_differences import (
    byte_level_differences,
    byte_level_example,
    gemma4_differences,
    gemma4_example,
    pretokenizer_name,
    sentencepiece_example,
)
from converters.tokenizer_draft import UNUSED_SCORE, Draft, Entries, Source
from converters.tokenizer_file import merges_of_text

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NO_SCORES = "it is SentencePiece-like and has no tokenizer.model with scores"


def byte_level(source: Source) -> Draft:
    """As `get_vocab_base` (conversion/base.py)."""
    file = source.json
    entries = source.entries(0.0)
    for token, number in file.vocab.items():
        if number in file.added:
            entries.set_added(number, file.spelled(number), special=file.added[number].special)
        else:
            entries.set(number, token, TokenType.NORMAL)
    name = pretokenizer_name(file)
    reasons = byte_level_differences(file, name)
    # A name unknown to llama.cpp means that it refuses to load: a file with its own tokenizer takes the plainest one.
    pre = name or "gpt-2"
    example = byte_level_example(file, pre) if reasons else ""
    return Draft(entries, "gpt2", pre, _merges(source), reasons, example, file.text, with_scores=False)


def llama_hf(source: Source) -> Draft:
    """As `LlamaHfVocab` (gguf/vocab.py), which knows no scores: llama.cpp merges in another order than training did."""
    file, entries = source.json, _hf_entries(source)
    prefix = True if source.space_prefix is None else source.space_prefix
    example = sentencepiece_example(file, entries.tokens, entries.scores, entries.types, prefix=prefix)
    return Draft(entries, "llama", "default", None, [NO_SCORES], example, file.text, n_vocab=source.size)


def gemma4(source: Source) -> Draft:
    """As `Gemma4Model.set_vocab` (conversion/gemma.py)."""
    file, entries = source.json, _hf_entries(source)
    for number, token in enumerate(entries.tokens):
        if token in source.rules.visible:
            entries.types[number] = int(TokenType.USER_DEFINED)
    reasons = gemma4_differences(file)
    example = gemma4_example(file) if reasons else ""
    return Draft(entries, "gemma4", None, _merges(source), reasons, example, file.text)


def _hf_entries(source: Source) -> Entries:
    file, entries = source.json, source.entries(UNUSED_SCORE)
    base_size = file.tokenizer.get_vocab_size(with_added_tokens=False)
    for token, number in file.vocab.items():
        kind = TokenType.CONTROL if token in file.special else TokenType.NORMAL
        if number >= base_size:
            kind = TokenType.CONTROL if token in file.special else TokenType.USER_DEFINED
        elif BYTE_TOKEN.fullmatch(token):
            kind = TokenType.BYTE
        entries.set(number, token, kind)
    return entries


def _merges(source: Source) -> list[str]:
    """Pairs as llama.cpp splits them, at the first space; a space inside a part is spelled Ġ."""
    pairs: Any = source.json.model.get("merges") or []
    if not pairs and (path := source.folder / "merges.txt").is_file():
        pairs = list(merges_of_text(path))
    if not pairs:
        raise UnsupportedError(f"{source.json.path}: has no merges")
    if isinstance(pairs[0], str):
        return list(pairs)
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
