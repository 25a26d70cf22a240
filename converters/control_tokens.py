"""Special tokens of a tokenizer.json, found in a text as they are written.

A file may say of a special token that it is looked for in normalized text (`"normalized": true`: those of Llama 1 and
its children do). Where the normalizer changes the token's own text as well (`▁` before every text), the `tokenizers`
package finds it at the beginning of a text only, and cuts `Yes.</s>` into pieces of words: a model that is trained on
them learns no end. transformers' own LlamaTokenizer and llama.cpp find it anywhere.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer


def open_written(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that finds every special token of the file wherever it stands.

    Args:
        tokenizer_json: the content of a tokenizer.json.

    Raises:
        Exception: it is none; the package raises nothing more precise.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if not overlooks_controls(tokenizer):
        return tokenizer
    file = json.loads(tokenizer_json)
    for token in file["added_tokens"]:
        token["normalized"] &= not token["special"]
    return Tokenizer.from_str(json.dumps(file, ensure_ascii=False))


def overlooks_controls(tokenizer: Tokenizer) -> bool:
    """Whether a special token is changed by the normalizer that runs before it is looked for."""
    normalizer = tokenizer.normalizer
    if normalizer is None:
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    return any(
        token.special and token.normalized and normalizer.normalize_str(token.content) != token.content
        for token in added
    )
