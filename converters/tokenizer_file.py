"""The Hugging Face tokenizer of a model folder, as transformers opens it, through the `tokenizers` package alone.

`tokenizer.json` is read as it is. A folder with `vocab.json` and `merges.txt` gets the steps of its tokenizer class
(`models/*/tokenization_*.py` in transformers 5.23). To either, the special tokens that the other files name are added,
as `TokenizersBackend.__init__` does (tokenization_utils_tokenizers.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from converters.checkpoint import read_json
from converters.errors import FormatError, UnsupportedError
from converters.pretokenizer_hashes import PROBE, hash_of
from converters.pretokenizers import QWEN2, QWEN35

Json = Mapping[str, Any]
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NFC = {"type": "NFC"}
END = "<|endoftext|>"
ID = re.compile(r"[0-9]{1,10}")


def _bytes(*, use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _bytes(use_regex=False)]}


@dataclass(frozen=True)
class Pipeline:
    """What a tokenizer class does beside its vocabulary.

    Attributes:
        special: name to text, for the special tokens that no file names.
    """

    normalizer: Json | None
    pre_tokenizer: Json
    special: Mapping[str, str]


_ENDS = {"unk_token": END, "bos_token": END, "eos_token": END}
_QWEN_ENDS = {"unk_token": END, "eos_token": END, "pad_token": END}
_COHERE = {
    "unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
    "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>",
}  # fmt: skip
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _bytes()]}
PIPELINES: Mapping[str, Pipeline] = {
    "GPT2Tokenizer": Pipeline(None, _bytes(), _ENDS),
    "CodeGenTokenizer": Pipeline(None, _bytes(), _ENDS),
    "GPTNeoXTokenizer": Pipeline(NFC, _bytes(), {**_ENDS, "pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": Pipeline(NFC, _split(QWEN2), _QWEN_ENDS),
    "Qwen3_5Tokenizer": Pipeline(NFC, _split(QWEN35), _QWEN_ENDS),
    "CohereTokenizer": Pipeline(NFC, _DIGITS, _COHERE),
}
# the same for classes whose folders have a tokenizer.json or a tokenizer.model
SENTENCEPIECE_SPECIAL: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>",
    },
}  # fmt: skip
# TOKENIZER_MAPPING_NAMES in transformers (models/auto/tokenization_auto.py); other models open tokenizer.json as it is
CLASS_OF_MODEL: Mapping[str, str] = {
    **dict.fromkeys(("gpt2", "phi", "starcoder2", "gptj", "gpt_neo", "codegen"), "GPT2Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"), "GemmaTokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}


@dataclass(frozen=True)
class AddedTokens:
    """What the other files add to a tokenizer.

    Attributes:
        by_id: those of `added_tokens_decoder` or added_tokens.json.
        named: special tokens with a name (bos_token ...); they are special wherever they are already.
        listed: other special tokens.
        size: of the vocabulary; there is no room for new tokens beyond.
    """

    by_id: Mapping[int, AddedToken]
    named: Sequence[AddedToken]
    listed: Sequence[AddedToken]
    size: int

    @property
    def special(self) -> frozenset[str]:
        return frozenset(token.content for token in (*self.named, *self.listed))

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add them in the order of `TokenizersBackend.__init__`, a token that is new under the next id."""
        vocab, names = tokenizer.get_vocab(with_added_tokens=True), {token.content for token in self.named}
        for number, token in sorted(self.by_id.items()):
            if token.content in vocab or number == _next(tokenizer):
                token.special = token.special or token.content in names
                tokenizer.add_tokens([token])
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        for token in (*self.named, *self.listed):
            if (there := known.get(token.content)) is None:
                if token.content in vocab or _next(tokenizer) < self.size:
                    tokenizer.add_tokens([token])
            elif token.content in names and not there.special:
                there.special = True
                tokenizer.add_tokens([there])


def _flags(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    return [(number, repr(token)) for number, token in tokenizer.get_added_tokens_decoder().items()]


def _without_vocabulary(tokenizer: dict[str, Any]) -> Json:
    """The largest part, which the `tokenizers` package holds already."""
    tokenizer["model"].pop("vocab", None)
    return tokenizer


def _next(tokenizer: Tokenizer) -> int:
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


NOTHING_ADDED = AddedTokens({}, (), (), 0)


class TokenizerFile:
    """A tokenizer: as JSON, and as the `tokenizers` package reads it.

    Attributes:
        path: the file its vocabulary is from.
        text: the whole `tokenizer.json`, the added special tokens in it.
        as_read: the file without them, and without its vocabulary.
        model: that part of it.
        special: texts of the tokens that have a name or are listed as special (`all_special_tokens`).
        vocab: text to id, added tokens included.
        added: the added tokens by id.
    """

    def __init__(self, path: Path, text: str, value: dict[str, Any], more: AddedTokens = NOTHING_ADDED) -> None:
        self.path, self.special = path, more.special
        try:
            self.tokenizer = Tokenizer.from_str(text)
            self.as_read = _without_vocabulary(value)
            before = _flags(self.tokenizer)
            more.add_to(self.tokenizer)
            if _flags(self.tokenizer) != before:
                Tokenizer.from_str(text := self.tokenizer.to_str())  # two tokens under one id cannot be read again
        except Exception as error:  # the package raises bare Exception
            raise FormatError(f"{path}: the tokenizers package cannot read it ({error})") from None
        self.text = text
        self.model: Json = self.as_read["model"]
        self.vocab: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        self.added: dict[int, AddedToken] = self.tokenizer.get_added_tokens_decoder()

    @property
    def hash(self) -> str:
        """The hash by which llama.cpp's converter knows a pre-tokenizer."""
        return hash_of(self.tokenizer.encode(PROBE).ids)

    def is_sentencepiece_like(self) -> bool:
        return bool(self.model.get("byte_fallback"))

    def spelled(self, number: int) -> str:
        """An added token as llama.cpp wants it: encoded and decoded again if it is matched in text as it stands."""
        token = self.added[number]
        if token.normalized:
            return str(token.content)
        ids = self.tokenizer.encode(token.content, add_special_tokens=False).ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def open_tokenizer_file(folder: Path, size: int, tokenizer_config: Json, config: Json) -> TokenizerFile | None:
    """The tokenizer of a folder; None where it has neither tokenizer.json nor vocab.json with merges.txt.

    Args:
        size: of the vocabulary.
        tokenizer_config: tokenizer_config.json, or empty.
        config: config.json, or empty: its `model_type` decides where nothing names a class.

    Raises:
        FormatError: files that cannot be read.
        UnsupportedError: vocab.json and merges.txt of a class that is not in `PIPELINES`.
    """
    name = _class_name(tokenizer_config, config)
    path = folder / "tokenizer.json"
    if path.is_file():
        value, text = read_json(path), _read(path)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        value = _built(folder, name)
        text = json.dumps(value, ensure_ascii=False)
    else:
        return None
    named, listed = _special_tokens(folder, tokenizer_config, name)
    special = {token.content for token in (*named, *listed)}
    more = AddedTokens(_added_tokens(folder, tokenizer_config, special), named, listed, size)
    return TokenizerFile(path, text, value, more)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text ({error})") from None


def _class_name(tokenizer_config: Json, config: Json) -> str:
    declared = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class") or ""
    inner = config.get("text_config") or {}
    types = [str(part.get("model_type")) for part in (config, inner) if isinstance(part, Mapping)]
    registered = next((CLASS_OF_MODEL[kind] for kind in types if kind in CLASS_OF_MODEL), "")
    return str(declared).removesuffix("Fast") or registered


def _built(folder: Path, name: str) -> dict[str, Any]:
    """The tokenizer.json that transformers makes in memory for a class."""
    pipeline = PIPELINES.get(name)
    if pipeline is None:
        raise UnsupportedError(
            f"{folder}: has vocab.json and merges.txt, and how {name or 'its tokenizer'} cuts text is not known",
            hint="Save a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder). Or name a "
            f"class in tokenizer_config.json (tokenizer_class: {', '.join(PIPELINES)}); a new one goes into PIPELINES, "
            "converters/tokenizer_file.py.",
        )
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": read_json(folder / "vocab.json"), "merges": list(merges_of_text(folder / "merges.txt")),
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer, "post_processor": None, "decoder": _bytes(), "model": model,
    }  # fmt: skip


def merges_of_text(path: Path) -> Iterator[list[str]]:
    """The pairs of a merges.txt; its first line may be a comment.

    Raises:
        FormatError: not text.
    """
    lines = _read(path).split("\n")
    for line in lines[1:] if lines[0].startswith("#") else lines:
        parts = line.split()
        if len(parts) == 2:
            yield parts


def _token(entry: Any, *, special: bool) -> AddedToken | None:
    if isinstance(entry, str):
        return AddedToken(entry, special=special, normalized=not special) if entry else None
    if not isinstance(entry, Mapping) or not isinstance(text := entry.get("content"), str) or not text:
        return None
    flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
    return AddedToken(text, **{**flags, "special": special or flags.get("special", False)})


def _special_tokens(
    folder: Path, tokenizer_config: Json, name: str
) -> tuple[Sequence[AddedToken], Sequence[AddedToken]]:
    """Those with a name, of the files or of the class, and those that are listed."""
    given = dict(tokenizer_config)
    path = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in given and path.is_file():
        given |= read_json(path)
    by_class = PIPELINES[name].special if name in PIPELINES else SENTENCEPIECE_SPECIAL.get(name, {})
    given = {**dict.fromkeys(NAMED), **by_class, **given}  # in this order
    more = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    listed = [*(more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else [])]
    named = [given[key] for key in given if key.endswith("_token") and not isinstance(given[key], bool)]
    return _unique(named), _unique(listed)


def _unique(entries: Iterable[Any]) -> Sequence[AddedToken]:
    tokens = [_token(entry, special=True) for entry in entries]
    return list({token.content: token for token in tokens if token is not None}.values())


def _added_tokens(folder: Path, tokenizer_config: Json, special: Collection[str]) -> dict[int, AddedToken]:
    given: Any = tokenizer_config.get("added_tokens_decoder")
    if isinstance(given, Mapping):
        tokens = {int(key): _token(entry, special=False) for key, entry in given.items() if ID.fullmatch(key)}
    else:
        path = folder / "added_tokens.json"
        given = read_json(path) if path.is_file() else {}
        tokens = {
            number: AddedToken(text, special=text in special, normalized=text not in special)
            for text, number in given.items()
            if type(number) is int
        }
    return {number: token for number, token in tokens.items() if token is not None}
