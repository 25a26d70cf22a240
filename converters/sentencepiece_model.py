"""A SentencePiece `tokenizer.model`, without the sentencepiece and protobuf packages.

The file is a protocol buffer; four of its fields matter here. Wire format: https://protobuf.dev/programming-guides/encoding,
message: sentencepiece_model.proto in https://github.com/google/sentencepiece
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.errors import FormatError, MissingFileError

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PIECE_TYPES = (1, 2, 3, 4, 5, 6)  # normal, unknown, control, user defined, unused, byte: the same numbers as in GGUF
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# field numbers
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
TRAINER_MODEL_TYPE, TRAINER_SUFFIX = 3, 24
NORMALIZER_CHARSMAP, NORMALIZER_DUMMY_PREFIX = 2, 3


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` holds.

    Attributes:
        model_type: "bpe", "unigram", "word" or "char".
        normalizes: text is rewritten by a character map before it is cut (the `nmt_nfkc` rules, for example).
        adds_prefix: a space is put before the text.
        space_is_suffix: a word ends in its space instead of beginning with it.
    """

    pieces: tuple[Piece, ...]
    model_type: str
    normalizes: bool
    adds_prefix: bool
    space_is_suffix: bool = False


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse a `tokenizer.model`.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not a SentencePiece model.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        model = _model(data)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise FormatError(f"{path}: not a SentencePiece model ({error})") from None
    if not model.pieces:
        raise FormatError(f"{path}: not a SentencePiece model (it has no pieces)")
    return model


def _model(data: bytes) -> SentencePieceModel:
    pieces, model_type, normalizes, adds_prefix, is_suffix = [], "unigram", False, True, False
    for field, value in _fields(data):
        if field == PIECES and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field == TRAINER and isinstance(value, bytes):
            fields = dict(_fields(value))
            model_type = MODEL_TYPES[int(fields.get(TRAINER_MODEL_TYPE, 1))]
            is_suffix = bool(fields.get(TRAINER_SUFFIX, 0))
        elif field == NORMALIZER and isinstance(value, bytes):
            fields = dict(_fields(value))
            normalizes = bool(fields.get(NORMALIZER_CHARSMAP))
            adds_prefix = bool(fields.get(NORMALIZER_DUMMY_PREFIX, 1))
    return SentencePieceModel(tuple(pieces), model_type, normalizes, adds_prefix, is_suffix)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(PIECE_TEXT, b""), fields.get(PIECE_SCORE, b"\0\0\0\0"), fields.get(PIECE_TYPE, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or kind not in PIECE_TYPES:
        raise ValueError("a piece with fields of the wrong type")
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], int(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(data, position)
            yield field, value
            continue
        if wire == BYTES:
            length, position = _varint(data, position)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if length > len(data) - position:
            raise ValueError("it ends early")
        position += length
        yield field, data[position - length : position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError("a number that is too long")
