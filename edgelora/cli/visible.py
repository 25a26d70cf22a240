"""Text from strangers' files on a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""`text` with what would steer a terminal spelled out: an escape character becomes \x1b. Lines stay lines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else _spelled(letter) for letter in text)


def _spelled(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
