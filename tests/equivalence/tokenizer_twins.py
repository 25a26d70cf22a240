"""Hugging Face twins of the vocabularies in llama.cpp's models/: the same tokens and merges behind the steps that each
family's tokenizer.json has. A twin is right if it gives the ids of the test vectors beside the vocabulary (.inp, .out).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from converters.pretokenizers import LLAMA3, QWEN2, QWEN35, WIDE
from converters.reader import read_header
from converters.sentencepiece_json import merges
from converters.sentencepiece_model import Piece, SentencePieceModel
from converters.tokenizer_rules import (
    BYTE_LEVEL_RULES,
    GEMMA_4_RULES,
    LLAMA_RULES,
    PHI_3_RULES,
    QWEN_RULES,
    TokenizerRules,
)
from tests.converters.folders import write_json

PADDING = re.compile(r"\[PAD\d+\]")  # older converters made these USER_DEFINED
SENTENCEPIECES = 32000  # of Llama 2, and of Phi-3, which added to them
SEPARATOR = "\n__ggml_vocab_test__\n"
NFC: Mapping[str, Any] = {"type": "NFC"}
BYTES: Mapping[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BYTES_GPT2 = {**BYTES, "use_regex": True}
DIGITS: Mapping[str, Any] = {"type": "Digits", "individual_digits": True}
SPACE = {"String": " "}
REPLACE: Mapping[str, Any] = {"type": "Replace", "pattern": SPACE, "content": "▁"}
LEGACY: Mapping[str, Any] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
# deepseek-llm's own list of letters: Latin, Greek, Cyrillic and the like, as its tokenizer.json spells it
LETTERS = (
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)


def cut(*steps: str | Mapping[str, Any]) -> dict[str, Any]:
    """Pre-tokenizer steps; a string is a regular expression."""
    parts = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        if isinstance(step, str)
        else step
        for step in steps
    ]
    return {"type": "Sequence", "pretokenizers": parts}


@dataclass(frozen=True)
class Twin:
    """How a family's tokenizer.json is made.

    Attributes:
        rules: the family's rules here.
        pre: the name llama.cpp knows it by, where its hash is known.
        first: a token that the post-processor puts before a text.
        settings: of the BPE model.
        native: whether llama.cpp's own tokenizer cuts all text equally.
        unproven: it cuts the corpus equally, and nothing says that it cuts all text so.
        rstrip: special tokens take the spaces after them.
    """

    rules: TokenizerRules
    architecture: str
    pre: str | None
    pre_tokenizer: Mapping[str, Any] | None
    normalizer: Mapping[str, Any] | None = None
    first: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    native: bool = False
    unproven: bool = False
    rstrip: bool = False


FALCON = cut(
    {"type": "Punctuation", "behavior": "Contiguous"}, BYTES_GPT2, {"type": "Digits", "individual_digits": False},
    "[0-9][0-9][0-9]",
)  # fmt: skip
DEEPSEEK_LLM = cut(
    "[\r\n]", LETTERS, "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", "\\s+$",
    WIDE, DIGITS, BYTES,
)  # fmt: skip
TWINS: Mapping[str, Twin] = {
    "gpt-2": Twin(BYTE_LEVEL_RULES, "GPT2LMHeadModel", "gpt-2", BYTES_GPT2, native=True),
    "llama-bpe": Twin(
        LLAMA_RULES, "LlamaForCausalLM", "llama-bpe", cut(LLAMA3, BYTES), first="<|begin_of_text|>",
        settings={"ignore_merges": True}, native=True,
    ),
    "qwen2": Twin(QWEN_RULES, "Qwen2ForCausalLM", "qwen2", cut(QWEN2, BYTES), NFC),
    # its vectors are those of Qwen 2's vocabulary behind the newer expression, not normalized: Qwen 2's hash
    "qwen35": Twin(BYTE_LEVEL_RULES, "Qwen3_5ForCausalLM", "qwen2", cut(QWEN35, BYTES)),
    # one byte of 256, the first of characters that nobody has assigned, is not in their vocabularies
    "starcoder": Twin(BYTE_LEVEL_RULES, "Starcoder2ForCausalLM", "starcoder", cut(DIGITS, BYTES_GPT2), unproven=True),
    "refact": Twin(BYTE_LEVEL_RULES, "Starcoder2ForCausalLM", "refact", cut(DIGITS, BYTES_GPT2), unproven=True),
    "command-r": Twin(
        BYTE_LEVEL_RULES, "CohereForCausalLM", "command-r", cut(DIGITS, BYTES_GPT2), NFC, first="<BOS_TOKEN>"
    ),
    "mpt": Twin(BYTE_LEVEL_RULES, "GPTNeoXForCausalLM", "olmo", BYTES_GPT2, NFC),
    "falcon": Twin(BYTE_LEVEL_RULES, "FalconForCausalLM", "falcon", FALCON, unproven=True),
    "deepseek-llm": Twin(
        LLAMA_RULES, "LlamaForCausalLM", "deepseek-llm", DEEPSEEK_LLM, first="<｜begin▁of▁sentence｜>",
        unproven=True,
    ),
    "deepseek-coder": Twin(
        LLAMA_RULES, "LlamaForCausalLM", "deepseek-coder",
        cut("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", WIDE, DIGITS, BYTES), first="<｜begin▁of▁sentence｜>",
        native=True,
    ),
    "llama-spm": Twin(
        LLAMA_RULES, "LlamaForCausalLM", None, None, LEGACY, first="<s>",
        settings={"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, native=True,
    ),
    "phi-3": Twin(
        PHI_3_RULES, "Phi3ForCausalLM", None, None, LEGACY, first="<s>",
        settings={"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, rstrip=True,
    ),
    "gemma-4": Twin(
        GEMMA_4_RULES, "Gemma4ForCausalLM", None,
        {"type": "Split", "pattern": SPACE, "behavior": "MergedWithPrevious", "invert": False}, REPLACE,
        settings={"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}, native=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """What a vocabulary GGUF holds."""

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    metadata: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Original:
        metadata = read_header(path).metadata
        lists = (metadata.get(f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type", "scores", "merges"))
        return cls(*lists, metadata)

    def special(self, kind: str) -> str | None:
        number = self.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return None if number is None else self.tokens[number]


def vectors(models: Path, name: str) -> tuple[list[str], list[list[int]]]:
    """The texts of the .inp file beside a vocabulary and the ids of its .out file."""
    stem = f"ggml-vocab-{name}.gguf"
    texts = (models / f"{stem}.inp").read_text(encoding="utf-8").split(SEPARATOR)
    lines = (models / f"{stem}.out").read_text(encoding="utf-8").split("\n")
    return texts[:-1], [[int(number) for number in line.split()] for line in lines[: len(texts) - 1]]


def make_twin(models: Path, name: str, folder: Path) -> Original:
    """A model folder without weights: config.json, tokenizer.json, tokenizer_config.json, perhaps tokenizer.model."""
    twin, original = TWINS[name], Original.read(models / f"ggml-vocab-{name}.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {text: number for number, text in enumerate(original.tokens) if not PADDING.fullmatch(text)}
    added = [
        _added(
            number, text, special=original.types[number] in (TokenType.CONTROL, TokenType.UNKNOWN), rstrip=twin.rstrip
        )
        for text, number in vocab.items()
        if original.types[number] in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        or text in twin.rules.visible
    ]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             **twin.settings, "vocab": vocab, "merges": _merges(original)}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
             "normalizer": twin.normalizer, "pre_tokenizer": twin.pre_tokenizer,
             "post_processor": _post_processor(twin, vocab), "decoder": _decoder(twin), "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    kinds = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "mask": "mask"}
    named = {f"{kind}_token": text for key, kind in kinds.items() if (text := original.special(key))}
    special = [token["content"] for token in added if token["special"]]
    extra = {"extra_special_tokens": [text for text in special if text not in named.values()]}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named, **extra})
    write_json(folder / "config.json", {"architectures": [twin.architecture], "vocab_size": len(original.tokens)})
    if twin.normalizer is LEGACY:
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(_pieces(original)))
    return original


def _added(number: int, text: str, *, special: bool, rstrip: bool) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": rstrip and special,
            "normalized": not special, "special": special}  # fmt: skip


def _merges(original: Original) -> list[list[str]]:
    if original.merges:
        return [list(pair.split(" ", 1)) for pair in original.merges]
    pieces = _pieces(original)
    score_of = {piece.text: piece.score for piece in pieces}
    model = SentencePieceModel(tuple(pieces), "bpe", normalizes=False, adds_prefix=True)
    by_score = sorted(merges(model), key=lambda pair: (score_of["".join(pair)], len(pair[0]), len(pair[1])))
    return [list(pair) for pair in reversed(by_score)]  # as transformers 4 did (`generate_merges` with scores)


def _pieces(original: Original) -> list[Piece]:
    """The pieces of tokenizer.model: those before the tokens that were added to it."""
    rows = list(zip(original.tokens, original.scores, original.types, strict=True))[:SENTENCEPIECES]
    return [Piece(text, score, kind) for text, score, kind in rows]


def _post_processor(twin: Twin, vocab: Mapping[str, int]) -> dict[str, Any] | None:
    if not twin.first:
        return None if twin.settings else dict(BYTES_GPT2)
    special = {"SpecialToken": {"id": twin.first, "type_id": 0}}
    single = [special, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {twin.first: {"id": twin.first, "ids": [vocab[twin.first]], "tokens": [twin.first]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def _decoder(twin: Twin) -> Mapping[str, Any]:
    if not twin.settings.get("byte_fallback"):
        return BYTES
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]}


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def sentencepiece_bytes(pieces: Sequence[Piece], *, prefix: bool = True) -> bytes:
    """A tokenizer.model of type BPE that normalizes nothing."""
    body = b"".join(
        _message(
            1,
            _message(1, piece.text.encode())
            + _varint(2 << 3 | 5)
            + struct.pack("<f", piece.score)
            + _varint(3 << 3)
            + _varint(piece.type),
        )
        for piece in pieces
    )
    unknown = next((number for number, piece in enumerate(pieces) if piece.type == TokenType.UNKNOWN), 0)
    fields = {3: 2, 35: 1, 40: unknown}  # model_type, byte_fallback, unk_id of TrainerSpec
    trainer = b"".join(_varint(number << 3) + _varint(value) for number, value in fields.items())
    return body + _message(2, trainer) + _message(3, _message(1, b"identity") + _varint(3 << 3) + _varint(prefix))
