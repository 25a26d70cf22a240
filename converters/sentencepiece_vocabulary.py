"""The vocabulary of a SentencePiece `tokenizer.model`, laid out for a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer

from converters.checkpoint import read_json
from converters.errors import FormatError, UnsupportedError
from converters.sentencepiece_json import merges as all_merges
from converters.sentencepiece_json import sentencepiece_json
from converters.sentencepiece_model import SentencePieceModel, read_sentencepiece
from converters.tokenizer_differences import added_differences, sentencepiece_example
from converters.tokenizer_draft import UNUSED_SCORE, Draft, Entries, Source
from converters.tokenizer_file import ID, TokenizerFile

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NO_SPACE_AFTER_SPECIAL = "it puts no space after a special token, as llama.cpp does"
OTHER_PREFIX = "llama.cpp would put a space before a text, or none, otherwise than it does"
OTHER_ORDER = "its tokenizer.json merges in another order than the scores of its tokenizer.model"
USER_DEFINED_PIECE = 4


def sentencepiece(source: Source) -> Draft:
    """As `_create_vocab_sentencepiece` (conversion/base.py), and `Phi3MiniModel.set_vocab` (conversion/phi.py)."""
    path = source.folder / "tokenizer.model"
    model = read_sentencepiece(path)
    if len(model.pieces) > source.size:
        raise FormatError(f"{path}: holds {len(model.pieces)} pieces, config.json says vocab_size {source.size}")
    entries = Entries(source.size, UNUSED_SCORE)
    for number, piece in enumerate(model.pieces):
        kind = TokenType.NORMAL if piece.type == USER_DEFINED_PIECE else piece.type
        entries.set(number, piece.text, kind, piece.score)
    for token, number in _added_tokens(source).items():
        entries.set(number, token, TokenType.USER_DEFINED)
    set_added = entries.set_as_spelled if source.rules.json_tokens else entries.set_added
    for number, added in _decoder_tokens(source).items():
        set_added(number, added.content, special=added.special)
    own_prefix = bool(source.config.get("add_prefix_space", model.adds_prefix))
    prefix = True if source.space_prefix is None else source.space_prefix  # llama.cpp's default
    refused = _sentencepiece_differences(model)
    reasons = [*refused, *_pieces_differ(model, entries), *([] if own_prefix == prefix else [OTHER_PREFIX])]
    if source.file:
        if source.rules.json_tokens:
            source.entries(UNUSED_SCORE)  # its ids fit
            for number, added in source.file.added.items():
                entries.set_as_spelled(number, added.content, special=added.special)
        reasons += _set_others(entries, model, source, source.file) + _spaces_differ(source.file, prefix)
        reasons += [] if _merges_follow_scores(model, source.file) else [OTHER_ORDER]
        carried = source.file.text
    elif refused:
        raise UnsupportedError(
            f"{path}: llama.cpp cannot tokenize as it does: {'; '.join(refused)}",
            hint="Save a tokenizer.json beside it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    else:
        carried, reasons = _made_json(source, model), [*reasons, NO_SPACE_AFTER_SPECIAL]
    file = source.file or TokenizerFile(path, carried, json.loads(carried))
    example = ""
    if reasons:
        example = sentencepiece_example(file, entries.tokens, entries.scores, entries.types, prefix=prefix)
    return Draft(entries, "llama", "default", None, reasons, example, carried, n_vocab=source.size)


def _made_json(source: Source, model: SentencePieceModel) -> str:
    config = source.config
    added = {number: AddedToken(token, normalized=False) for token, number in _added_tokens(source).items()}
    added |= _decoder_tokens(source)
    first = _content(config.get("bos_token", "<s>")) if config.get("add_bos_token", True) else ""
    last = _content(config.get("eos_token", "</s>")) if config.get("add_eos_token") else ""
    text = sentencepiece_json(model, added, config, (first, last))
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise UnsupportedError(
            f"{source.folder}: its tokenizer cannot be made from tokenizer.model ({error})"
        ) from None
    return text


def _content(value: Any) -> str:
    return str(value.get("content") if isinstance(value, Mapping) else value or "")


def _set_others(entries: Entries, model: SentencePieceModel, source: Source, file: TokenizerFile) -> list[str]:
    """Take the tokens that only tokenizer.json has; returns what it has under other ids than tokenizer.model."""
    source.entries(UNUSED_SCORE)  # its ids fit
    others = []
    for token, number in file.vocab.items():
        if number < len(model.pieces):
            known = number in file.added or token == model.pieces[number].text
            others += [] if known else [f"{token!r} is {number}"]
        elif entries.types[number] == TokenType.UNUSED:
            entries.set_added(number, token, special=number in file.added and file.added[number].special)
    return [f"its tokenizer.json has other tokens than its tokenizer.model ({others[0]})"] if others else []


def _spaces_differ(file: TokenizerFile, prefix: bool) -> list[str]:
    """What llama.cpp's SentencePiece does otherwise: it puts a space before the text and after each special token."""
    normalizer, cut = file.as_read.get("normalizer") or {}, file.as_read.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    kinds = [part.get("type") for part in parts if part]
    scheme = cut.get("prepend_scheme") if cut.get("type") == "Metaspace" else cut.get("type")
    equal = [(["Prepend", "Replace"], None)] if prefix else [(["Replace"], None), ([], "never")]
    if cut.get("split") or (kinds, scheme) not in equal:
        return [NO_SPACE_AFTER_SPECIAL]
    late = next((token.content for token in file.added.values() if token.normalized), None)
    looked_for = [] if late is None else [f"the added token {late!r} is looked for after spaces are put"]
    return looked_for + added_differences(file)


def _merges_follow_scores(model: SentencePieceModel, file: TokenizerFile) -> bool:
    """Whether merges by rank are merges by score, and every two pieces that make a third have one.

    llama.cpp joins neighbours by score. The `▁▁` of Llama 2 has the lowest score and the lowest id, so that a
    tokenizer.json made of ids alone, as transformers 5 makes it, cuts two spaces otherwise.
    """
    score_of = {piece.text: piece.score for piece in model.pieces}
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in file.model.get("merges") or []]
    scores = [score_of.get("".join(pair), float("nan")) for pair in pairs]
    falls = all(one >= other for one, other in pairwise(scores))
    return falls and len(pairs) == len(all_merges(model))


def _pieces_differ(model: SentencePieceModel, entries: Entries) -> list[str]:
    user = (number for number, piece in enumerate(model.pieces) if piece.type == USER_DEFINED_PIECE)
    plain = next((entries.tokens[number] for number in user if entries.types[number] == TokenType.NORMAL), None)
    return [] if plain is None else [f"its token {plain!r} is always whole, and an ordinary one for llama.cpp"]


def _sentencepiece_differences(model: SentencePieceModel) -> list[str]:
    bytes_known = len({piece.text for piece in model.pieces if BYTE_TOKEN.fullmatch(piece.text)})
    checks = (
        (model.model_type == "bpe", f"its model type is {model.model_type}, not bpe"),
        (not model.normalizes, "it normalizes text with a character map"),
        (not model.space_is_suffix, "it puts the space after a word"),
        (bytes_known == 256, f"{256 - bytes_known} of 256 byte tokens are missing"),
    )
    return [reason for ok, reason in checks if not ok]


def _added_tokens(source: Source) -> dict[str, int]:
    path, size = source.folder / "added_tokens.json", source.size
    tokens = read_json(path) if path.is_file() else {}
    if bad := [token for token, number in tokens.items() if type(number) is not int or not 0 <= number < size]:
        raise FormatError(f"{path}: token {bad[0]!r} has id {tokens[bad[0]]!r}, the vocabulary has {size}")
    return tokens


def _decoder_tokens(source: Source) -> dict[int, AddedToken]:
    found, given = {}, source.config.get("added_tokens_decoder") or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"{source.folder / 'tokenizer_config.json'}: added_tokens_decoder is not an object")
    for key, entry in given.items():
        number = int(key) if ID.fullmatch(key) else -1
        if not 0 <= number < source.size or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            problem = f"added_tokens_decoder has {key!r}, the vocabulary has {source.size}"
            raise FormatError(f"tokenizer_config.json: {problem}")
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[number] = AddedToken(entry["content"], **flags)
    return found
