"""Text to tokens and back, with the base's own vocabulary.

Two engines, one face: llama.cpp's tokenizer for the vocabularies it knows, and Hugging Face's `tokenizers` for a base
whose GGUF carries the whole tokenizer.json (`edgelora.tokenizer = "huggingface"`), because llama.cpp would give other
ids or none.
"""

from __future__ import annotations

import ctypes
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

from edgelora.engine.native import forget_log, llama, reason
from edgelora.errors import ModelFileError

UNKNOWN, CONTROL, LEFT_STRIP, RIGHT_STRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8  # llama.h, enum llama_token_attr
HUGGINGFACE_KEY, HUGGINGFACE_JSON = "edgelora.tokenizer", "tokenizer.huggingface.json"
ENDS_KEY = "edgelora.end_token_ids"  # ids that end a reply beside the file's eos and eot


@dataclass(frozen=True)
class SpecialToken:
    """A control token: never made from what a user types."""

    id: int
    text: str
    strips_left: bool
    strips_right: bool


class Tokenizer(ABC):
    """Common part: special tokens come from the GGUF vocabulary whichever engine tokenizes.

    Args:
        ends: ids that end a reply, beside those that llama.cpp takes for ends.
    """

    def __init__(self, vocab: Any, ends: Collection[int] = ()) -> None:
        self.vocab = vocab
        self.size: int = llama().llama_vocab_n_tokens(vocab)
        self._ends = frozenset(ends)

    @abstractmethod
    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of `text`. With `special`, control tokens written out in it become those tokens."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """A fresh decoder for one reply."""

    @cached_property
    def control_tokens(self) -> Mapping[str, SpecialToken]:
        library, found = llama(), {}
        attributes_of, text_of, vocab = library.llama_vocab_get_attr, library.llama_vocab_get_text, self.vocab
        for token, attributes in enumerate(map(attributes_of, repeat(vocab), range(self.size))):
            if attributes & (CONTROL | UNKNOWN):
                text = (text_of(vocab, token) or b"").decode("utf-8", errors="replace")
                strips = bool(attributes & LEFT_STRIP), bool(attributes & RIGHT_STRIP)
                found[text] = SpecialToken(token, text, *strips)
        found.pop("", None)
        return found

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches any control token, the longest first; None in a vocabulary without."""
        texts = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def control_starts(self) -> frozenset[str]:
        """Every beginning of a control token that is not the whole of it."""
        return frozenset(text[:n] for text in self.control_tokens for n in range(1, len(text)))

    @cached_property
    def control_ends(self) -> frozenset[str]:
        """Every end of a control token that is not the whole of it."""
        return frozenset(text[n:] for text in self.control_tokens for n in range(1, len(text)))

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a reply; llama.cpp makes every one it knows by its text a control token."""
        library = llama()
        candidates = {token.id for token in self.control_tokens.values()}
        candidates |= {library.llama_vocab_eos(self.vocab), library.llama_vocab_eot(self.vocab)}
        native = {t for t in candidates if t >= 0 and library.llama_vocab_is_eog(self.vocab, t)}
        return frozenset(native | {t for t in self._ends if 0 <= t < self.size})

    @property
    def bos(self) -> int:
        """Id of the token that begins a text; negative where the vocabulary has none."""
        return int(llama().llama_vocab_bos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether every text of this base begins with that token."""
        return self.bos >= 0 and bool(llama().llama_vocab_get_add_bos(self.vocab))

    def text_of(self, which: str) -> str:
        """The text of the `bos` or `eos` token; empty where the vocabulary has none."""
        library = llama()
        token = {"bos": library.llama_vocab_bos, "eos": library.llama_vocab_eos}[which](self.vocab)
        return (
            ""
            if token < 0
            else str((library.llama_vocab_get_text(self.vocab, token) or b"").decode("utf-8", "replace"))
        )


class Decoder(ABC):
    """Tokens of one reply to bytes, one at a time. Control tokens give none."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """The bytes that `token` adds; they may end inside a character."""


class LlamaTokenizer(Tokenizer):
    """llama.cpp's tokenizer (SentencePiece, BPE with a pre-tokenizer it knows, WordPiece, ...)."""

    def __init__(self, vocab: Any, ends: Collection[int] = (), *, strip_first_space: bool) -> None:
        super().__init__(vocab, ends)
        self._strip_first_space = strip_first_space
        self._pieces: dict[tuple[int, int], bytes] = {}

    def encode(self, text: str, *, special: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        capacity = len(data) + 8
        tokens = (ctypes.c_int32 * capacity)()
        forget_log()
        count = llama().llama_tokenize(self.vocab, data, len(data), tokens, capacity, False, special)
        if count < 0:
            raise ModelFileError(f"the tokenizer failed on a text of {len(data)} bytes: {reason()}")
        return tokens[:count]

    def decoder(self) -> Decoder:
        return _PieceDecoder(self, self._strip_first_space)

    def piece(self, token: int, left_strip: int = 0) -> bytes:
        known = self._pieces.get((token, left_strip))
        if known is None:
            known = self._pieces[token, left_strip] = self._read_piece(token, left_strip)
        return known

    def _read_piece(self, token: int, left_strip: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = llama().llama_token_to_piece(self.vocab, token, buffer, len(buffer), left_strip, False)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = llama().llama_token_to_piece(self.vocab, token, buffer, len(buffer), left_strip, False)
        return buffer.raw[:length]


class _PieceDecoder(Decoder):
    def __init__(self, tokenizer: LlamaTokenizer, strip_first_space: bool) -> None:
        self._piece, self._left_strip = tokenizer.piece, int(strip_first_space)

    def bytes_of(self, token: int) -> bytes:
        data = self._piece(token, self._left_strip)
        if data:
            self._left_strip = 0  # SentencePiece writes a space before the first word of a text; readers do not
        return data


class HuggingFaceTokenizer(Tokenizer):
    """The `tokenizers` package on the tokenizer.json inside the GGUF.

    Raises:
        ModelFileError: the JSON is not a tokenizer, or gives ids that the base does not have.
    """

    def __init__(self, vocab: Any, tokenizer_json: str, ends: Collection[int] = ()) -> None:
        super().__init__(vocab, ends)
        from tokenizers import Tokenizer as HFTokenizer

        try:
            self._tokenizer = HFTokenizer.from_str(tokenizer_json)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # the package raises bare Exception
            raise ModelFileError(f"{HUGGINGFACE_JSON} in this base is not a tokenizer: {error}") from None

    @cached_property
    def control_tokens(self) -> Mapping[str, SpecialToken]:
        """Those of the GGUF vocabulary and those of the tokenizer, which the GGUF may have as ordinary tokens."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        own = {
            token.content: SpecialToken(number, token.content, token.lstrip, token.rstrip)
            for number, token in added
            if token.special and token.content
        }
        return {**super().control_tokens, **own}

    def encode(self, text: str, *, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # half a character, as the other engine has it
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.size:
            raise ModelFileError(f"the tokenizer gave id {max(ids)}; this base has {self.size} tokens")
        return ids

    def decoder(self) -> Decoder:
        return _ByteLevelDecoder(self._tokenizer) if self._is_byte_level else _StreamDecoder(self)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        parts = decoder.get("decoders", ()) if decoder.get("type") == "Sequence" else (decoder,)
        return [part.get("type") for part in parts] == ["ByteLevel"]

    @cached_property
    def bytes_of_tokens(self) -> Mapping[int, bytes]:
        """The tokens that stand for one byte each (`<0x0A>`), where the tokenizer decodes them so."""
        if "ByteFallback" not in str(json.loads(self._tokenizer.to_str()).get("decoder")):
            return {}
        ids = {self._tokenizer.token_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
        return {token: data for token, data in ids.items() if token is not None}

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        """The package's decoder of one reply: what each token adds, nothing before a character is whole."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: str(stream.step(self._tokenizer, token) or "")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (`bytes_to_unicode`, GPT-2's encoder.py)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class _ByteLevelDecoder(Decoder):
    """Every token has its own bytes, whatever is before it. A token with other characters is its own text."""

    def __init__(self, tokenizer: Any) -> None:
        self._text_of = tokenizer.id_to_token
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def bytes_of(self, token: int) -> bytes:
        text = "" if token in self._special else str(self._text_of(token) or "")
        try:
            return bytes([_BYTE_OF[character] for character in text])
        except KeyError:
            return text.encode("utf-8", errors="replace")


class _StreamDecoder(Decoder):
    """The package's decoder, which takes a byte back that was already told when the next one makes it invalid, and
    raises then. So tokens that are bytes go out as they are, and it never sees them."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer, self._bytes, self._step = tokenizer, tokenizer.bytes_of_tokens, tokenizer.stream()
        self._begun = False

    def bytes_of(self, token: int) -> bytes:
        data = self._bytes.get(token)
        if data is None:
            data = self._text_of(token).encode("utf-8", errors="replace")
        elif not self._begun:
            self._text_of(next(number for number, byte in self._bytes.items() if byte == b"x"))  # a text has begun
        self._begun = True
        return data

    def _text_of(self, token: int) -> str:
        try:
            return self._step(token)
        except Exception:  # the package raises bare Exception
            self._step = self._tokenizer.stream()
            return self._tokenizer.text([token])


def open_tokenizer(vocab: Any, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the base's metadata asks for.

    Raises:
        ModelFileError: it asks for one that this version does not know, or has no vocabulary.
    """
    wanted = metadata.get(HUGGINGFACE_KEY, "llama.cpp")
    if metadata.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        raise ModelFileError("this base has no vocabulary, so no text can go in or out")
    ends = [number for number in metadata.get(ENDS_KEY) or () if type(number) is int]
    if wanted == "huggingface" and isinstance(text := metadata.get(HUGGINGFACE_JSON), str):
        return HuggingFaceTokenizer(vocab, text, ends)
    if wanted != "llama.cpp":
        raise ModelFileError(f"{HUGGINGFACE_KEY} is {wanted!r} and its data is missing or unknown to this version")
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    strips = is_sentencepiece and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    return LlamaTokenizer(vocab, ends, strip_first_space=strips)


def join_controls(tokenizer: Tokenizer, parts: Sequence[SpecialToken | str]) -> list[int]:
    """Ids of a text that was cut into control tokens and plain text."""
    tokens: list[int] = []
    for index, part in enumerate(parts):
        if isinstance(part, SpecialToken):
            tokens.append(part.id)
            continue
        before, after = parts[index - 1] if index else None, parts[index + 1] if index + 1 < len(parts) else None
        text = part.lstrip() if isinstance(before, SpecialToken) and before.strips_right else part
        text = text.rstrip() if isinstance(after, SpecialToken) and after.strips_left else text
        tokens += tokenizer.encode(text, special=False) if text else []
    return tokens
