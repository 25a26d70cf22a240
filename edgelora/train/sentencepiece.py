"""The tokenizer of a base that has a bare `tokenizer.model`: the one that `converters` writes into its GGUF file.

There are two readings of such a file: llama.cpp puts a space after every special token, transformers only where a text
begins. The converter settles it and serving follows what it wrote; so does training, instead of asking transformers
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.errors import FormatError, UnsupportedError
from converters.tokenizer import load_vocabulary

# GGUF's name of each named token, and its id where no file names one (llama.cpp, src/llama-vocab.cpp, SPM).
NAMED = {"bos_token": ("bos", 1), "eos_token": ("eos", 2), "unk_token": ("unknown", 0), "pad_token": ("padding", -1)}


def load_sentencepiece(folder: Path) -> Any:
    """A fast `transformers` tokenizer that gives the ids of serving.

    Args:
        folder: holds tokenizer.model, config.json and perhaps tokenizer_config.json.

    Raises:
        ConversionError: files that cannot be read, or a model that cannot be converted (not BPE, for example).
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    vocabulary = load_vocabulary(folder, _vocabulary_size(folder / "config.json"))
    carried = vocabulary.metadata.get("tokenizer.huggingface.json")
    if not isinstance(carried, str):
        raise UnsupportedError(
            f"{folder / 'tokenizer.model'}: training cannot cut text as llama.cpp would",
            hint="Save a tokenizer.json beside it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    names = named_tokens(vocabulary.metadata, vocabulary.tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(carried), **names)
    tokenizer.chat_template = vocabulary.metadata.get("tokenizer.chat_template")
    return tokenizer


def _vocabulary_size(config: Path) -> int:
    try:
        return int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{config}: has no vocab_size ({error!r})") from None


def named_tokens(metadata: Mapping[str, Any], tokens: Sequence[str], *, usual: bool = True) -> dict[str, str]:
    """bos_token, eos_token ... to the text of each that there is.

    Args:
        usual: whether ids that the metadata leaves out are SentencePiece's usual ones.
    """
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id", default if usual else -1)
        for name, (key, default) in NAMED.items()
    }
    return {name: tokens[number] for name, number in ids.items() if 0 <= number < len(tokens)}
