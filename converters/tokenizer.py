"""The vocabulary of a Hugging Face model folder as GGUF metadata.

Three kinds, tried in the order of llama.cpp's converter (`LlamaModel.set_vocab`, conversion/llama.py):

    tokenizer.model                                     SentencePiece         tokenizer.ggml.model = "llama"
    tokenizer.json, BPE with <0x00> byte tokens         SentencePiece-like    "llama"
    tokenizer.json, BPE on bytes                        GPT-2-like            "gpt2", and a pre-tokenizer's name

Where llama.cpp's own tokenizer would not give the ids of training, or would abort on a character it does not know, the
whole `tokenizer.json` goes in as `tokenizer.huggingface.json` with `edgelora.tokenizer = "huggingface"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer

from converters.checkpoint import read_json
from converters.errors import FormatError, MissingFileError, UnsupportedError
from converters.pretokenizers import pretokenizer_name
from converters.sentencepiece_json import sentencepiece_json
from converters.sentencepiece_model import SentencePieceModel, read_sentencepiece
from converters.tokenizer_ends import end_tokens, lost_templates
from converters.writer import Value

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_SPACE_AFTER_SPECIAL = "it puts no space after a special token, as llama.cpp does"
NATIVE, HUGGINGFACE = "llama.cpp", "huggingface"


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file.

    Attributes:
        tokens: by id, as llama.cpp expects their text.
        metadata: every `tokenizer.*` key, and `edgelora.tokenizer`.
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


def load_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Read the tokenizer of a model folder.

    Args:
        folder: with tokenizer.model or tokenizer.json, and tokenizer_config.json.
        vocab_size: rows of the embedding; ids without a token become `[PADn]`.

    Raises:
        MissingFileError: no tokenizer in the folder.
        FormatError: a file that cannot be parsed.
        UnsupportedError: a tokenizer that neither llama.cpp nor the `tokenizers` package can stand for.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    has_json = (folder / "tokenizer.json").is_file()
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder, config, vocab_size)
    if not has_json:
        raise MissingFileError(
            f"{folder}: no tokenizer.json and no tokenizer.model",
            hint="Save the tokenizer beside the model: tokenizer.save_pretrained(folder).",
        )
    tokenizer = _HuggingFace(folder / "tokenizer.json")
    if tokenizer.model.get("type") != "BPE":
        raise UnsupportedError(f"{tokenizer.path}: a {tokenizer.model.get('type')} tokenizer; BPE can be converted")
    if tokenizer.model.get("byte_fallback"):
        return _from_byte_fallback(folder, tokenizer, config, vocab_size)
    return _from_byte_level(folder, tokenizer, vocab_size)


class _HuggingFace:
    """A `tokenizer.json`: as JSON, and as the `tokenizers` package reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.json = read_json(path)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise FormatError(f"{path}: the tokenizers package cannot read it ({error})") from None
        self.model: Mapping[str, Any] = self.json["model"]
        self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.added: dict[int, AddedToken] = self.tokenizer.get_added_tokens_decoder()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def entries(self, vocab_size: int, score: float) -> _Entries:
        highest = max(self.vocab.values(), default=-1)
        if highest >= vocab_size:
            raise FormatError(f"{self.path}: token ids go up to {highest}, config.json says vocab_size {vocab_size}")
        return _Entries(vocab_size, score)

    def differences(self) -> list[str]:
        """What about it llama.cpp's BPE does not do."""
        model, processor = self.model, self.json.get("post_processor")
        flags = [token.content for token in self.added.values() if token.lstrip or token.rstrip or token.single_word]
        missing = 256 - len(set(_BYTE_SYMBOLS) & set(self.vocab))
        affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
        checks = (
            (self.json.get("normalizer") is None, "it normalizes text"),
            (pretokenizer_name(self.json) is not None, "llama.cpp has no pre-tokenizer that cuts text as it does"),
            (missing == 0, f"{missing} of 256 bytes are not in its vocabulary"),
            (not any(affixes) and not model.get("dropout"), "its BPE has affixes or dropout"),
            (not flags, f"the added token {flags[0]!r} takes the spaces around it" if flags else ""),
            (_adds_only_ends(processor), "its post-processor does more than add a first and a last token"),
        )
        return [reason for ok, reason in checks if not ok]


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode`, github.com/openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


_BYTE_SYMBOLS = _byte_symbols()


def _adds_only_ends(processor: Mapping[str, Any] | None) -> bool:
    parts = [processor] if processor else []
    if processor and processor.get("type") == "Sequence":
        parts = processor.get("processors", [])
    for part in parts:
        if part.get("type") == "TemplateProcessing":
            kinds = ["A" if "Sequence" in item else "special" for item in part.get("single", [])]
            if kinds not in (["A"], ["special", "A"], ["A", "special"], ["special", "A", "special"]):
                return False
        elif part.get("type") != "ByteLevel":
            return False
    return True


def _from_byte_level(folder: Path, tokenizer: _HuggingFace, vocab_size: int) -> Vocabulary:
    entries = tokenizer.entries(vocab_size, 0.0)
    for token, number in tokenizer.vocab.items():
        if number in tokenizer.added:
            _set_added(entries, number, token, special=tokenizer.added[number].special)
        else:
            entries.set(number, token, TokenType.NORMAL)
    # Unknown to llama.cpp means that it refuses to load: a file with its own tokenizer takes the plainest name.
    pre = pretokenizer_name(tokenizer.json) or "gpt-2"
    return _finish(folder, entries, "gpt2", pre, tokenizer.text, tokenizer.differences(), with_scores=False)


def _from_byte_fallback(
    folder: Path, tokenizer: _HuggingFace, config: Mapping[str, Any], vocab_size: int
) -> Vocabulary:
    """As `LlamaHfVocab` (gguf/vocab.py), which knows no scores: llama.cpp merges in another order than training did."""
    entries = tokenizer.entries(vocab_size, UNUSED_SCORE)
    special = _special_tokens(config) | {token.content for token in tokenizer.added.values() if token.special}
    base_size = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False)
    for token, number in tokenizer.vocab.items():
        kind = TokenType.CONTROL if token in special else TokenType.NORMAL
        if BYTE_TOKEN.fullmatch(token):
            kind = TokenType.BYTE
        elif number >= base_size and token not in special:
            kind = TokenType.USER_DEFINED
        entries.set(number, token, kind)
    reason = "it is SentencePiece-like and has no tokenizer.model with scores"
    return _finish(folder, entries, "llama", "default", tokenizer.text, [reason], with_scores=True)


def _from_sentencepiece(folder: Path, config: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    path = folder / "tokenizer.model"
    model = read_sentencepiece(path)
    if len(model.pieces) > vocab_size:
        raise FormatError(f"{path}: holds {len(model.pieces)} pieces, config.json says vocab_size {vocab_size}")
    entries = _Entries(vocab_size, UNUSED_SCORE)
    for number, piece in enumerate(model.pieces):
        entries.set(number, piece.text, piece.type, piece.score)
    for token, number in _added_tokens(folder, config, vocab_size).items():
        entries.set(number, token, TokenType.USER_DEFINED)
    for number, added in _decoder_tokens(config, vocab_size).items():
        _set_added(entries, number, added.content, special=added.special)
    prefix = bool(config.get("add_prefix_space", model.adds_prefix))
    reasons = _sentencepiece_differences(model)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _HuggingFace(folder / "tokenizer.json")
        reasons += _set_others(entries, model, tokenizer, vocab_size) + _spaces_differ(tokenizer, prefix)
        carried = tokenizer.text
    elif reasons:
        raise UnsupportedError(
            f"{path}: llama.cpp cannot tokenize as it does: {'; '.join(reasons)}",
            hint="Save a tokenizer.json beside it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder).",
        )
    else:
        carried, reasons = _made_json(folder, model, config, vocab_size), [NO_SPACE_AFTER_SPECIAL]
    vocabulary = _finish(folder, entries, "llama", "default", carried, reasons, with_scores=True)
    if prefix:
        return vocabulary  # llama.cpp's default
    metadata = {**vocabulary.metadata, "tokenizer.ggml.add_space_prefix": False}
    return replace(vocabulary, metadata=metadata)


def _made_json(folder: Path, model: SentencePieceModel, config: Mapping[str, Any], vocab_size: int) -> str:
    extra = _added_tokens(folder, config, vocab_size).items()
    added = {number: AddedToken(token, normalized=False) for token, number in extra}
    added |= _decoder_tokens(config, vocab_size)
    first = _content(config.get("bos_token", "<s>")) if config.get("add_bos_token", True) else ""
    last = _content(config.get("eos_token", "</s>")) if config.get("add_eos_token") else ""
    text = sentencepiece_json(model, added, config, (first, last))
    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise UnsupportedError(f"{folder}: its tokenizer cannot be made from tokenizer.model ({error})") from None
    return text


def _content(value: Any) -> str:
    return str(value.get("content") if isinstance(value, Mapping) else value or "")


def _set_others(entries: _Entries, model: SentencePieceModel, tokenizer: _HuggingFace, vocab_size: int) -> list[str]:
    """Take the tokens that only tokenizer.json has; returns what it has under other ids than tokenizer.model."""
    tokenizer.entries(vocab_size, UNUSED_SCORE)  # its ids fit
    others = []
    for token, number in tokenizer.vocab.items():
        if number < len(model.pieces):
            known = number in tokenizer.added or token == model.pieces[number].text
            others += [] if known else [f"{token!r} is {number}"]
        elif entries.types[number] == TokenType.UNUSED:
            _set_added(entries, number, token, special=number in tokenizer.added and tokenizer.added[number].special)
    return [f"its tokenizer.json has other tokens than its tokenizer.model ({others[0]})"] if others else []


def _spaces_differ(tokenizer: _HuggingFace, prefix: bool) -> list[str]:
    """What llama.cpp's SentencePiece does otherwise: it puts a space before the text and after each special token."""
    normalizer, cut = tokenizer.json.get("normalizer") or {}, tokenizer.json.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    kinds = [part.get("type") for part in parts if part]
    scheme = cut.get("prepend_scheme") if cut.get("type") == "Metaspace" else cut.get("type")
    equal = [(["Prepend", "Replace"], None)] if prefix else [(["Replace"], None), ([], "never")]
    if cut.get("split") or (kinds, scheme) not in equal:
        return [NO_SPACE_AFTER_SPECIAL]
    flags = [token.content for token in tokenizer.added.values() if token.lstrip or token.rstrip or token.single_word]
    return [f"the added token {flags[0]!r} takes the spaces around it"] if flags else []


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


def _looks_special(token: str) -> bool:
    """Some models forget to mark control tokens (`does_token_look_special`, conversion/base.py)."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return any(token.startswith(a) and token.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))


def _special_tokens(config: Mapping[str, Any]) -> set[str]:
    named = [config.get(key) for key in NAMED_TOKENS]
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    values = [*named, *(more.values() if isinstance(more, Mapping) else more)]
    contents = [value.get("content") if isinstance(value, Mapping) else value for value in values]
    return {content for content in contents if isinstance(content, str)}


def _added_tokens(folder: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    path = folder / "added_tokens.json"
    tokens = read_json(path) if path.is_file() else {}
    if bad := [token for token, number in tokens.items() if type(number) is not int or not 0 <= number < vocab_size]:
        raise FormatError(f"{path}: token {bad[0]!r} has id {tokens[bad[0]]!r}, the vocabulary has {vocab_size}")
    return tokens


def _decoder_tokens(config: Mapping[str, Any], vocab_size: int) -> dict[int, AddedToken]:
    found = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        number = int(key) if str(key).isdecimal() else -1
        if not 0 <= number < vocab_size or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            problem = f"added_tokens_decoder has {key!r}, the vocabulary has {vocab_size}"
            raise FormatError(f"tokenizer_config.json: {problem}")
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[number] = AddedToken(entry["content"], **flags)
    return found


def _finish(
    folder: Path,
    entries: _Entries,
    model: str,
    pre: str,
    carried: str,
    reasons: Sequence[str],
    *,
    with_scores: bool,
) -> Vocabulary:
    _check_unique(folder, entries)
    metadata: dict[str, Value] = {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}
    metadata["tokenizer.ggml.tokens"] = entries.tokens
    if with_scores:
        metadata["tokenizer.ggml.scores"] = entries.scores
    metadata["tokenizer.ggml.token_type"] = entries.types
    metadata |= _special_metadata(folder, len(entries.tokens), load_merges=model == "gpt2")
    ends, notices = end_tokens(folder, metadata, len(entries.tokens))
    metadata |= ends
    notices += lost_templates(folder, metadata)
    metadata["edgelora.tokenizer"] = HUGGINGFACE if reasons else NATIVE
    if reasons:
        metadata["tokenizer.huggingface.json"] = carried
        notices.append(
            f"tokenizer: {'; '.join(reasons)}. A tokenizer.json is kept in the file and edgelora uses it; "
            "other llama.cpp programs would cut some text otherwise"
        )
    return Vocabulary(tuple(entries.tokens), metadata, tuple(notices))


def _check_unique(folder: Path, entries: _Entries) -> None:
    seen: dict[str, int] = {}
    for number, token in enumerate(entries.tokens):
        if (first := seen.setdefault(token, number)) != number:
            raise UnsupportedError(f"{folder}: tokens {first} and {number} are both {token!r}; llama.cpp would abort")


def _special_metadata(folder: Path, n_vocab: int, *, load_merges: bool) -> dict[str, Value]:
    """Merges, ids of bos, eos ..., whether they are added, chat templates: through gguf, as llama.cpp's converter."""
    writer = gguf.GGUFWriter(None, "")
    try:
        special = gguf.SpecialVocab(folder, load_merges=load_merges, n_vocab=n_vocab)
        if (template := folder / "chat_template.jinja").is_file():
            special.chat_template = template.read_text(encoding="utf-8")  # as transformers does: the file wins
        if load_merges:  # without these, llama.cpp decides by the pre-tokenizer's name
            special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
        special.add_to_gguf(writer, quiet=True)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise FormatError(f"{folder}: its tokenizer files cannot be understood ({error})") from None
    if load_merges and not special.merges:
        raise UnsupportedError(f"{folder / 'tokenizer.json'}: has no merges")
    return {key: pair.value for key, pair in writer.kv_data[0].items() if key != "general.architecture"}
