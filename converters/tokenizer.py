"""The vocabulary of a Hugging Face model folder as GGUF metadata.

Which of four layouts a vocabulary gets follows from its family's rules (`tokenizer_rules.py`) and the files there are:

    tokenizer.model                                     SentencePiece         tokenizer.ggml.model = "llama"
    tokenizer.json, BPE with <0x00> byte tokens         SentencePiece-like    "llama", or "gemma4" with its merges
    tokenizer.json, BPE on bytes                        GPT-2-like            "gpt2", and a pre-tokenizer's name
    vocab.json and merges.txt                           the same

Every key and value is what llama.cpp's converter writes (`set_vocab`, conversion/*.py), but for these: ids that have a
token in tokenizer.json alone, where it writes `[PADn]`; `chat_template.jinja`, which wins over tokenizer_config.json as
in transformers; an eos where it finds none; `add_bos_token` false where llama.cpp would take the lack of it for true.

Where llama.cpp's own tokenizer would not give the ids of training, or would abort on a character it does not know, the
whole `tokenizer.json` goes in as `tokenizer.huggingface.json` with `edgelora.tokenizer = "huggingface"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json
from converters.errors import MissingFileError, UnsupportedError
from converters.pretokenizers import ADDS_BOS
from converters.sentencepiece_vocabulary import sentencepiece
from converters.special_tokens import ADD_KEYS, KINDS, read_special, template_of_files
from converters.tokenizer_draft import Draft, Entries, Source
from converters.tokenizer_ends import end_tokens, lost_templates
from converters.tokenizer_file import open_tokenizer_file
from converters.tokenizer_json_vocabulary import byte_level, gemma4, llama_hf
from converters.tokenizer_rules import LLAMA_RULES, Layout, TokenizerRules
from converters.writer import Value

NATIVE, HUGGINGFACE = "llama.cpp", "huggingface"
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
DRAFTS: Mapping[Layout, Callable[[Source], Draft]] = {
    Layout.SENTENCEPIECE: sentencepiece,
    Layout.LLAMA_HF: llama_hf,
    Layout.BYTE_LEVEL: byte_level,
    Layout.GEMMA4: gemma4,
}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        tokens: by id, as llama.cpp expects their text.
        metadata: every `tokenizer.*` key, and those of `edgelora.*` about it.
        notices: what a user should know: mostly, where llama.cpp's own ids would differ.
    """

    tokens: tuple[str, ...]
    metadata: Mapping[str, Value]
    notices: tuple[str, ...] = ()


def load_vocabulary(
    folder: Path, vocab_size: int, rules: TokenizerRules = LLAMA_RULES, config: Mapping[str, Any] | None = None
) -> Vocabulary:
    """Read the tokenizer of a model folder.

    Args:
        folder: with tokenizer.model, tokenizer.json, or vocab.json and merges.txt; and tokenizer_config.json.
        vocab_size: rows of the embedding; ids without a token become `[PADn]`.
        rules: those of the model's family.
        config: config.json, which says whose tokenizer it is where no tokenizer file does; read from the folder if
            not given.

    Raises:
        MissingFileError: no tokenizer in the folder.
        FormatError: a file that cannot be parsed.
        UnsupportedError: a tokenizer that neither llama.cpp nor the `tokenizers` package can stand for.
    """
    tokenizer_config, given = (
        read_json(path) if (path := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json")
    )
    file = open_tokenizer_file(folder, vocab_size, tokenizer_config, given if config is None else config)
    source = Source(folder, vocab_size, rules, tokenizer_config, file)
    return _finish(source, DRAFTS[_layout(source)](source))


def _layout(source: Source) -> Layout:
    """The first layout of the family whose files are there."""
    rules, file = source.rules, source.file
    if str(source.config.get("tokenizer_class")) in rules.byte_level_classes and file:
        return Layout.BYTE_LEVEL
    like_sentencepiece = file is not None and file.is_sentencepiece_like()
    there = {
        Layout.SENTENCEPIECE: (source.folder / "tokenizer.model").is_file(),
        Layout.LLAMA_HF: like_sentencepiece,
        Layout.GEMMA4: like_sentencepiece,
        Layout.BYTE_LEVEL: file is not None,
    }
    layout = next((layout for layout in rules.layouts if there[layout]), None)
    if layout is None:
        raise MissingFileError(
            f"{source.folder}: no tokenizer.json and no tokenizer.model that a model of this family can have",
            hint="Save the tokenizer beside the model: tokenizer.save_pretrained(folder).",
        )
    return Layout.LLAMA_HF if layout is Layout.BYTE_LEVEL and like_sentencepiece else layout


def _finish(source: Source, draft: Draft) -> Vocabulary:
    entries = draft.entries
    _check_unique(source.folder, entries)
    metadata: dict[str, Value] = {"tokenizer.ggml.model": draft.model}
    if draft.pre is not None:
        metadata["tokenizer.ggml.pre"] = draft.pre
    metadata["tokenizer.ggml.tokens"] = entries.tokens
    if draft.with_scores:
        metadata["tokenizer.ggml.scores"] = entries.scores
    metadata["tokenizer.ggml.token_type"] = entries.types
    if draft.merges is not None:
        metadata["tokenizer.ggml.merges"] = draft.merges
    metadata |= _special_metadata(source, draft)
    metadata |= end_tokens(source.folder, metadata, len(entries.tokens))
    notices = lost_templates(source.folder, metadata)
    metadata["edgelora.tokenizer"] = HUGGINGFACE if draft.reasons else NATIVE
    if draft.reasons:
        metadata["tokenizer.huggingface.json"] = draft.carried
        said = ". ".join(part for part in ("; ".join(draft.reasons), draft.example) if part)
        notices.append(
            f"tokenizer: {said}. A tokenizer.json is kept in the file and edgelora uses it; "
            "other llama.cpp programs would cut some text otherwise"
        )
    return Vocabulary(tuple(entries.tokens), metadata, tuple(notices))


def _check_unique(folder: Path, entries: Entries) -> None:
    seen: dict[str, int] = {}
    for number, token in enumerate(entries.tokens):
        if (first := seen.setdefault(token, number)) != number:
            raise UnsupportedError(f"{folder}: tokens {first} and {number} are both {token!r}; llama.cpp would abort")


def _special_metadata(source: Source, draft: Draft) -> dict[str, Value]:
    """Ids of bos, eos ..., whether they are added, chat templates, and what the family pins."""
    folder, rules, file = source.folder, source.rules, source.file
    tokenizer = file.as_read if file and file.path.name == "tokenizer.json" else {}
    found = read_special(folder, tokenizer, n_vocab=draft.n_vocab)
    for kind, text in rules.named.items():
        if kind not in found.ids:
            if file is None or text not in file.vocab:
                raise UnsupportedError(
                    f"{folder}: its tokenizer has no token {text!r}, which its family ends turns with"
                )
            found.ids[kind] = file.vocab[text]
    for kind, number in rules.ids_for(source.size).items():
        again = read_special(folder, tokenizer, kinds=(*KINDS, kind)).ids
        found.ids[kind] = again.get(kind, number)
    if (folder / "chat_template.jinja").is_file():
        found.template = template_of_files(folder)  # as transformers does: the file wins
    metadata = found.metadata()
    pinned = rules.add_bos_for(source.size)
    if pinned is None and draft.pre in ADDS_BOS:
        pinned = found.adds.get("bos", False)
    if pinned is not None:
        metadata[ADD_KEYS["bos"]] = pinned
    if source.space_prefix is not None:
        metadata[SPACE_PREFIX] = source.space_prefix
    return metadata
