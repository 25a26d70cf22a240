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

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer

from converters.checkpoint import read_json
from converters.errors import FormatError, MissingFileError, UnsupportedError
from converters.pretokenizers import ADDS_BOS
from converters.sentencepiece_json import merges as all_merges
from converters.sentencepiece_json import sentencepiece_json
from converters.sentencepiece_model import SentencePieceModel, read_sentencepiece
from converters.special_tokens import ADD_KEYS, KINDS, read_special, template_of_files
from converters.tokenizer_differences import (
    added_differences,
    byte_level_differences,
    byte_level_example,
    gemma4_differences,
    gemma4_example,
    pretokenizer_name,
    sentencepiece_example,
)
from converters.tokenizer_ends import end_tokens, lost_templates
from converters.tokenizer_file import TokenizerFile, merges_of_text, open_tokenizer_file
from converters.tokenizer_rules import AS_CONFIGURED, LLAMA_RULES, Layout, TokenizerRules
from converters.writer import Value

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NO_SPACE_AFTER_SPECIAL = "it puts no space after a special token, as llama.cpp does"
OTHER_PREFIX = "llama.cpp would put a space before a text, or none, otherwise than it does"
OTHER_ORDER = "its tokenizer.json merges in another order than the scores of its tokenizer.model"
NO_SCORES = "it is SentencePiece-like and has no tokenizer.model with scores"
NATIVE, HUGGINGFACE = "llama.cpp", "huggingface"
SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
USER_DEFINED_PIECE = 4


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


@dataclass
class _Entries:
    """Tokens, scores and types by id, from a first guess of all unused."""

    size: int
    score: float
    tokens: list[str] = field(init=False)
    scores: list[float] = field(init=False)
    types: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [f"[PAD{number}]" for number in range(self.size)]
        self.scores = [self.score] * self.size
        self.types = [int(TokenType.UNUSED)] * self.size

    def set(self, number: int, token: str, kind: int, score: float = ADDED_SCORE) -> None:
        self.tokens[number], self.types[number], self.scores[number] = token, int(kind), score


@dataclass(frozen=True)
class _Source:
    """A folder's tokenizer files, and what is asked of them."""

    folder: Path
    size: int
    rules: TokenizerRules
    config: Mapping[str, Any]
    file: TokenizerFile | None

    @property
    def space_prefix(self) -> bool | None:
        """The value of `add_space_prefix`, or None for a file without it."""
        if self.rules.space_prefix == AS_CONFIGURED:
            given = self.config.get("add_prefix_space")
            return None if given is None else bool(given)
        return bool(self.rules.space_prefix) if self.rules.space_prefix is not None else None

    @property
    def json(self) -> TokenizerFile:
        if self.file is None:
            raise MissingFileError(f"{self.folder}: no tokenizer.json")
        if self.file.model.get("type") != "BPE":
            kind = self.file.model.get("type")
            raise UnsupportedError(f"{self.file.path}: a {kind} tokenizer; BPE can be converted")
        return self.file

    def entries(self, score: float) -> _Entries:
        highest = max(self.file.vocab.values(), default=-1) if self.file else -1
        if self.file and highest >= self.size:
            raise FormatError(
                f"{self.file.path}: token ids go up to {highest}, config.json says vocab_size {self.size}"
            )
        return _Entries(self.size, score)


@dataclass(frozen=True)
class _Draft:
    """A vocabulary before its special tokens.

    Attributes:
        model: `tokenizer.ggml.model`; `pre` and `merges` are left out of the file where they are None.
        reasons: what llama.cpp's tokenizer does otherwise, and `example` a sentence with a text.
        carried: the tokenizer.json for the file, if there are reasons.
        n_vocab: special ids from here on are left out, as llama.cpp's converter does for some layouts.
    """

    entries: _Entries
    model: str
    pre: str | None
    merges: list[str] | None
    reasons: Sequence[str]
    example: str
    carried: str
    with_scores: bool = True
    n_vocab: int | None = None
    space_prefix: bool | None = None


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
    source = _Source(folder, vocab_size, rules, tokenizer_config, file)
    return _finish(source, _DRAFTS[_layout(source)](source))


def _layout(source: _Source) -> Layout:
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


def _byte_level(source: _Source) -> _Draft:
    """As `get_vocab_base` (conversion/base.py)."""
    file = source.json
    entries = source.entries(0.0)
    for token, number in file.vocab.items():
        if number in file.added:
            _set_added(entries, number, file.spelled(number), special=file.added[number].special)
        else:
            entries.set(number, token, TokenType.NORMAL)
    name = pretokenizer_name(file)
    reasons = byte_level_differences(file, name)
    # A name unknown to llama.cpp means that it refuses to load: a file with its own tokenizer takes the plainest one.
    pre = name or "gpt-2"
    example = byte_level_example(file, pre) if reasons else ""
    return _Draft(entries, "gpt2", pre, _merges(source), reasons, example, file.text, with_scores=False)


def _llama_hf(source: _Source) -> _Draft:
    """As `LlamaHfVocab` (gguf/vocab.py), which knows no scores: llama.cpp merges in another order than training did."""
    file, entries = source.json, _hf_entries(source)
    prefix = True if source.space_prefix is None else source.space_prefix
    example = sentencepiece_example(file, entries.tokens, entries.scores, entries.types, prefix=prefix)
    return _Draft(entries, "llama", "default", None, [NO_SCORES], example, file.text, n_vocab=source.size)


def _gemma4(source: _Source) -> _Draft:
    """As `Gemma4Model.set_vocab` (conversion/gemma.py)."""
    file, entries = source.json, _hf_entries(source)
    for number, token in enumerate(entries.tokens):
        if token in source.rules.visible:
            entries.types[number] = int(TokenType.USER_DEFINED)
    reasons = gemma4_differences(file)
    example = gemma4_example(file) if reasons else ""
    return _Draft(entries, "gemma4", None, _merges(source), reasons, example, file.text)


def _hf_entries(source: _Source) -> _Entries:
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


def _sentencepiece(source: _Source) -> _Draft:
    """As `_create_vocab_sentencepiece` (conversion/base.py), and `Phi3MiniModel.set_vocab` (conversion/phi.py)."""
    path = source.folder / "tokenizer.model"
    model = read_sentencepiece(path)
    if len(model.pieces) > source.size:
        raise FormatError(f"{path}: holds {len(model.pieces)} pieces, config.json says vocab_size {source.size}")
    entries = _Entries(source.size, UNUSED_SCORE)
    for number, piece in enumerate(model.pieces):
        kind = TokenType.NORMAL if piece.type == USER_DEFINED_PIECE else piece.type
        entries.set(number, piece.text, kind, piece.score)
    for token, number in _added_tokens(source).items():
        entries.set(number, token, TokenType.USER_DEFINED)
    set_added = _set_as_spelled if source.rules.json_tokens else _set_added
    for number, added in _decoder_tokens(source).items():
        set_added(entries, number, added.content, special=added.special)
    own_prefix = bool(source.config.get("add_prefix_space", model.adds_prefix))
    prefix = True if source.space_prefix is None else source.space_prefix  # llama.cpp's default
    refused = _sentencepiece_differences(model)
    reasons = [*refused, *_pieces_differ(model, entries), *([] if own_prefix == prefix else [OTHER_PREFIX])]
    if source.file:
        if source.rules.json_tokens:
            source.entries(UNUSED_SCORE)  # its ids fit
            for number, added in source.file.added.items():
                _set_as_spelled(entries, number, added.content, special=added.special)
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
    return _Draft(entries, "llama", "default", None, reasons, example, carried, n_vocab=source.size)


_DRAFTS = {
    Layout.SENTENCEPIECE: _sentencepiece,
    Layout.LLAMA_HF: _llama_hf,
    Layout.BYTE_LEVEL: _byte_level,
    Layout.GEMMA4: _gemma4,
}


def _merges(source: _Source) -> list[str]:
    """Pairs as llama.cpp splits them, at the first space; a space inside a part is spelled Ġ."""
    pairs: Any = source.json.model.get("merges") or []
    if not pairs and (path := source.folder / "merges.txt").is_file():
        pairs = list(merges_of_text(path))
    if not pairs:
        raise UnsupportedError(f"{source.json.path}: has no merges")
    if isinstance(pairs[0], str):
        return list(pairs)
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]


def _made_json(source: _Source, model: SentencePieceModel) -> str:
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


def _set_others(entries: _Entries, model: SentencePieceModel, source: _Source, file: TokenizerFile) -> list[str]:
    """Take the tokens that only tokenizer.json has; returns what it has under other ids than tokenizer.model."""
    source.entries(UNUSED_SCORE)  # its ids fit
    others = []
    for token, number in file.vocab.items():
        if number < len(model.pieces):
            known = number in file.added or token == model.pieces[number].text
            others += [] if known else [f"{token!r} is {number}"]
        elif entries.types[number] == TokenType.UNUSED:
            _set_added(entries, number, token, special=number in file.added and file.added[number].special)
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


def _pieces_differ(model: SentencePieceModel, entries: _Entries) -> list[str]:
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


def _set_added(entries: _Entries, number: int, token: str, *, special: bool) -> None:
    if special or _looks_special(token):
        entries.set(number, token, TokenType.CONTROL)
    else:
        entries.set(number, token.replace("▁", " "), TokenType.USER_DEFINED)


def _set_as_spelled(entries: _Entries, number: int, token: str, *, special: bool) -> None:
    entries.set(number, token, TokenType.CONTROL if special else TokenType.USER_DEFINED)


def _looks_special(token: str) -> bool:
    """Some models forget to mark control tokens (`does_token_look_special`, conversion/base.py)."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return any(token.startswith(a) and token.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))


def _added_tokens(source: _Source) -> dict[str, int]:
    path, size = source.folder / "added_tokens.json", source.size
    tokens = read_json(path) if path.is_file() else {}
    if bad := [token for token, number in tokens.items() if type(number) is not int or not 0 <= number < size]:
        raise FormatError(f"{path}: token {bad[0]!r} has id {tokens[bad[0]]!r}, the vocabulary has {size}")
    return tokens


def _decoder_tokens(source: _Source) -> dict[int, AddedToken]:
    found, given = {}, source.config.get("added_tokens_decoder") or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"{source.folder / 'tokenizer_config.json'}: added_tokens_decoder is not an object")
    for key, entry in given.items():
        number = int(key) if str(key).isdecimal() else -1
        if not 0 <= number < source.size or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            problem = f"added_tokens_decoder has {key!r}, the vocabulary has {source.size}"
            raise FormatError(f"tokenizer_config.json: {problem}")
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[number] = AddedToken(entry["content"], **flags)
    return found


def _finish(source: _Source, draft: _Draft) -> Vocabulary:
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


def _check_unique(folder: Path, entries: _Entries) -> None:
    seen: dict[str, int] = {}
    for number, token in enumerate(entries.tokens):
        if (first := seen.setdefault(token, number)) != number:
            raise UnsupportedError(f"{folder}: tokens {first} and {number} are both {token!r}; llama.cpp would abort")


def _special_metadata(source: _Source, draft: _Draft) -> dict[str, Value]:
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
