"""Tokens back to bytes, with the `tokenizers` package: any tokens in any order, and no error."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

from edgelora.engine.model import Model
from edgelora.engine.tokenizer import HuggingFaceTokenizer
from tests.converters.folders import byte_level_tokenizer

WORDS = ["▁the", "▁bread", "ed", "é", "<s>", "\ufffd"]


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[Model]:
    opened = Model(base, vocab_only=True)
    yield opened
    opened.close()


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind in tokenizer.json: words with ▁, and a token for each byte."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + n for n, word in enumerate(WORDS)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(["<s>"])
    return made


def decoded(model: Model, tokenizer: Tokenizer, tokens: Sequence[int]) -> bytes:
    decoder = HuggingFaceTokenizer(model.vocab, tokenizer.to_str()).decoder()
    return b"".join(map(decoder.bytes_of, tokens))


@pytest.mark.parametrize("make", [byte_fallback, byte_level_tokenizer])
def test_a_text_comes_back_whole(make: object, model: Model) -> None:
    tokenizer = make()  # type: ignore[operator]
    for text in ("the miller", "naïve café", "日本語 \U0001f600 e\u0301", "two\n\n  lines\t", "a"):
        tokens = [byte for byte in text.encode()] if make is byte_fallback else tokenizer.encode(text).ids
        assert decoded(model, tokenizer, tokens).decode() == tokenizer.decode(tokens) == text


def test_words_and_bytes_in_turn(model: Model) -> None:
    tokenizer = byte_fallback()
    the, bread, ed, accent = (tokenizer.token_to_id(word) for word in WORDS[:4])
    snow = list("☃".encode())
    for tokens in ([the, bread, ed], [*snow, the], [the, *snow, bread], [accent, *b"x", the, *snow]):
        assert decoded(model, tokenizer, tokens).decode() == tokenizer.decode(tokens)
    assert decoded(model, tokenizer, [the, tokenizer.token_to_id("<s>"), bread]) == b"the bread"


@pytest.mark.parametrize("make", [byte_fallback, byte_level_tokenizer])
def test_bytes_that_are_no_text_are_told_and_no_error(make: object, model: Model) -> None:
    tokenizer, random_ = make(), random.Random(0)  # type: ignore[operator]
    size = tokenizer.get_vocab_size()
    for _ in range(200):
        tokens = [random_.randrange(size) for _ in range(20)]
        got = decoded(model, tokenizer, tokens)
        if "\ufffd" not in (whole := tokenizer.decode(tokens)):
            assert got.decode() == whole
    if make is byte_fallback:
        assert decoded(model, tokenizer, [0x39, 0xC3, 0x28]) == b"9\xc3("


def test_twin_the_packages_own_stream_raises() -> None:
    """Why tokens that are bytes do not go through it: a byte that was told is taken back."""
    tokenizer, stream = byte_fallback(), DecodeStream(skip_special_tokens=True)
    assert stream.step(tokenizer, 0x39) == "9"
    assert stream.step(tokenizer, 0xC3) is None
    with pytest.raises(Exception, match="Invalid prefix"):
        stream.step(tokenizer, tokenizer.token_to_id("é"))


def test_an_error_of_the_package_costs_no_reply(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = HuggingFaceTokenizer(model.vocab, byte_fallback().to_str())
    decoder = tokenizer.decoder()
    broken = iter([True, False])
    real = tokenizer.stream()

    def step(token: int) -> str:
        if next(broken, False):
            raise Exception("Invalid prefix encountered")
        return real(token)

    monkeypatch.setattr(decoder, "_step", step)
    assert decoder.bytes_of(257) == b"bread"
    assert decoder.bytes_of(256) == b"the"
