"""A vocabulary on its way into a GGUF file: what it is made from, its tokens by id, and all but its special ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from converters.errors import FormatError, MissingFileError, UnsupportedError
from converters.tokenizer_file import TokenizerFile
from converters.tokenizer_rules import AS_CONFIGURED, TokenizerRules

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0


@dataclass
class Entries:
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

    def set_added(self, number: int, token: str, *, special: bool) -> None:
        """An added token, its spaces as they stand in text."""
        if special or _looks_special(token):
            self.set(number, token, TokenType.CONTROL)
        else:
            self.set(number, token.replace("▁", " "), TokenType.USER_DEFINED)

    def set_as_spelled(self, number: int, token: str, *, special: bool) -> None:
        self.set(number, token, TokenType.CONTROL if special else TokenType.USER_DEFINED)


def _looks_special(token: str) -> bool:
    """Some models forget to mark control tokens (`does_token_look_special`, conversion/base.py)."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return any(token.startswith(a) and token.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))


@dataclass(frozen=True)
class Source:
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

    def entries(self, score: float) -> Entries:
        highest = max(self.file.vocab.values(), default=-1) if self.file else -1
        if self.file and highest >= self.size:
            raise FormatError(
                f"{self.file.path}: token ids go up to {highest}, config.json says vocab_size {self.size}"
            )
        return Entries(self.size, score)


@dataclass(frozen=True)
class Draft:
    """A vocabulary before its special tokens.

    Attributes:
        model: `tokenizer.ggml.model`; `pre` and `merges` are left out of the file where they are None.
        reasons: what llama.cpp's tokenizer does otherwise, and `example` a sentence with a text.
        carried: the tokenizer.json for the file, if there are reasons.
        n_vocab: special ids from here on are left out, as llama.cpp's converter does for some layouts.
    """

    entries: Entries
    model: str
    pre: str | None
    merges: list[str] | None
    reasons: Sequence[str]
    example: str
    carried: str
    with_scores: bool = True
    n_vocab: int | None = None
