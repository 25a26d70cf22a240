"""Token bytes to text: characters stay whole, stop strings never show."""

from __future__ import annotations

import random

import pytest

from edgelora.engine.reply import ReplyText

TEXT = "naïve café: 日本語 🙂👩‍👩‍👧 «ok» END and more"


def feed_in_pieces(data: bytes, cuts: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], ReplyText]:
    text, pieces = ReplyText(stops), []
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        pieces.append(text.feed(data[start:end]))
        if text.stopped:
            break
    return [*pieces, text.end()], text


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_of_the_bytes_gives_the_same_text_in_whole_characters(seed: int) -> None:
    data = TEXT.encode()
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(data)), rng.randint(1, len(data) - 1)))
    pieces, _ = feed_in_pieces(data, cuts)
    assert "".join(pieces) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_twin_decoding_each_piece_alone_would_break_characters() -> None:
    data = TEXT.encode()
    assert "".join(data[i : i + 1].decode(errors="replace") for i in range(len(data))) != TEXT


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_ends_the_text_wherever_the_bytes_are_cut(seed: int) -> None:
    data = TEXT.encode()
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(data)), rng.randint(1, len(data) - 1)))
    pieces, text = feed_in_pieces(data, cuts, (" END", "never"))
    assert text.stopped
    assert "".join(pieces) == TEXT[: TEXT.index(" END")]


def test_text_that_only_begins_a_stop_string_is_held_and_then_shown() -> None:
    text = ReplyText(("<stop>",))
    assert text.feed(b"a <st") == "a "
    assert text.feed(b"ar>") == "<star>"
    assert text.feed(b"b <s") == "b "
    assert text.end() == "<s"
    assert not text.stopped


def test_the_earliest_stop_wins_and_nothing_after_it_shows() -> None:
    text = ReplyText(("later", "soon"))
    assert text.feed(b"one soon two later") == "one "
    assert text.stopped
    assert text.end() == ""


def test_bytes_that_are_no_text_become_the_replacement_character() -> None:
    text = ReplyText()
    assert (
        text.feed(b"a\xff") + text.feed(b"b\xe2\x82") + text.end()
        == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    )
