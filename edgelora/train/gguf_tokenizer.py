"""The tokenizer of a GGUF base for training: the ids of serving, or a refusal that shows a text where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.base_file import read_base_header
from converters.errors import ConversionError
from converters.pretokenizer_hashes import PROBE
from converters.tokenizer_differences import SAMPLES
from converters.vocabulary_json import vocabulary_json
from edgelora.errors import ModelFileError
from edgelora.train.sentencepiece import named_tokens

OWN_TOKENIZER = "Give a folder with the model's config.json and tokenizer files with --base-config."
MAX_CONTROLS = 64  # special tokens that are compared with text around them


def load_tokenizer(path: Path) -> Any:
    """A fast `transformers` tokenizer that gives the ids of serving.

    Args:
        path: a GGUF base.

    Raises:
        ModelFileError: none can be made of its vocabulary, or it gives other ids than llama.cpp.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    metadata = read_base_header(path).metadata
    try:
        made = Tokenizer.from_str(vocabulary_json(metadata))
    except ConversionError as error:
        raise ModelFileError(f"{path}: {error.message}", hint=OWN_TOKENIZER) from error
    except Exception as error:  # the package raises bare Exception
        raise ModelFileError(f"{path}: its vocabulary makes no tokenizer: {error}", hint=OWN_TOKENIZER) from error
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **_named(metadata))
    template = metadata.get("tokenizer.chat_template")
    tokenizer.chat_template = template if isinstance(template, str) else None
    check_ids(tokenizer, path)
    return tokenizer


def _named(metadata: Mapping[str, Any]) -> dict[str, str]:
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    return named_tokens(metadata, metadata["tokenizer.ggml.tokens"], usual=is_sentencepiece)


def check_ids(tokenizer: Any, path: Path) -> None:
    """Raises ModelFileError where a tokenizer cuts some text otherwise than serving does on this base.

    The texts are those in which tokenizers are known to differ (spaces, digits, marks, scripts), and special tokens
    with words and spaces around them.
    """
    from edgelora.engine.model import Model

    model = Model(path, vocab_only=True)
    try:
        controls = [*model.tokenizer.control_tokens][:MAX_CONTROLS]
        around = [text for token in controls for text in (f"a{token}b", f"a {token} b", f"{token}\n{token}")]
        for text in (*SAMPLES, PROBE, *around):
            ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            theirs = model.tokenizer.encode(text, special=True)
            if list(ours) != list(theirs):
                raise ModelFileError(
                    f"{path}: the tokenizer to train with cuts {text[:40]!r} into {ours[:12]}, serving into "
                    f"{theirs[:12]}",
                    hint=OWN_TOKENIZER,
                )
    finally:
        model.close()
