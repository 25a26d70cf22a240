"""Control tokens of a bundle: ids that the vocabulary has but nobody uses, and new ones where those do not suffice.

A control token's text is `<|NAME|>`, so that it can be typed. Its embedding is never looked at: llama.cpp takes that of
its substitute. A new one's rows are its substitute's, so that its logit is nothing a model is likely to say;
llama.cpp's own programs never draw one at all (`tokenizer.ggml.suppress_tokens`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from converters.errors import UnsupportedError, listed
from converters.fingerprint import TOKENS
from converters.reader import GGUFHeader, RawValue
from converters.writer import Value

TYPES, SCORES, SUPPRESSED = (f"tokenizer.ggml.{name}" for name in ("token_type", "scores", "suppress_tokens"))
ADD_BOS = "tokenizer.ggml.add_bos_token"
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.h, enum llama_token_type
ADDED_SCORE = -1000.0  # what llama.cpp's converter gives tokens that no merge may make
# Texts that tokenizers give to ids they keep for later.
RESERVED = re.compile(
    r"<\|reserved(_special)?_token_\d+\|>|<\|?unused_?\d+\|?>|\[unused\d+\]|\[control_\d+\]|<SPECIAL_\d+>"
    r"|<\|(dummy|placeholder|extra)_?\d+\|>"
)
# Names whose text would be a token that llama.cpp gives a meaning of its own, by its text (`llama_vocab::impl::load`,
# src/llama-vocab.cpp).
TAKEN_NAMES = frozenset((
    "eot_id", "im_end", "end", "endoftext", "end_of_text", "eom_id", "return", "call", "calls", "flush",
    "fim_prefix", "fim_suffix", "fim_middle", "fim_pad", "fim_repo", "code_prefix", "code_suffix", "code_middle",
    "prefix", "suffix", "middle", "repo_name", "file_sep", "channel", "message", "start", "constrain",
))  # fmt: skip


@dataclass(frozen=True)
class ControlToken:
    """The token that switches an adapter on.

    Attributes:
        substitute: id of the token whose place it takes: its embedding is used.
        is_added: it is new, behind the base's vocabulary.
    """

    name: str
    id: int
    text: str
    substitute: int
    is_added: bool


def token_text(name: str) -> str:
    """What a client types to choose an adapter."""
    return f"<|{name}|>"


def control_tokens(
    header: GGUFHeader, substitutes: Sequence[tuple[str, int]], texts: Sequence[str]
) -> tuple[ControlToken, ...]:
    """A control token for each adapter.

    Args:
        substitutes: name of each adapter, and the id that its token stands for.
        texts: templates: ids whose text they hold are in use.

    Raises:
        UnsupportedError: names whose token the vocabulary has already, or that mean something to llama.cpp.
    """
    tokens = _items(header.metadata.raw(TOKENS))
    problems = [*_name_problems([name for name, _ in substitutes], set(tokens))]
    problems += [f"{name}: stands for token {id}, and there are {len(tokens)}" for name, id in substitutes
                 if not 0 <= id < len(tokens)]  # fmt: skip
    if problems:
        raise UnsupportedError(
            f"{header.path}: names of adapters that cannot be typed as a token:{listed(problems)}",
            hint="Name them otherwise: --adapter NAME=PATH.",
        )
    free = _free_ids(header, tokens, {id for _, id in substitutes}, texts)
    ids = [next(free, None) for _ in substitutes]
    new = iter(range(len(tokens), len(tokens) + len(ids)))
    return tuple(
        ControlToken(name, next(new) if id is None else id, token_text(name), substitute, id is None)
        for (name, substitute), id in zip(substitutes, ids, strict=True)
    )


def _name_problems(names: Sequence[str], tokens: set[bytes]) -> Iterator[str]:
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"{name}: {names.count(name)} adapters are called so"
        if token_text(name).encode() in tokens:
            yield f"{name}: the base has a token {token_text(name)}"
        elif name in TAKEN_NAMES:
            yield f"{name}: {token_text(name)} means something else to llama.cpp"


def _free_ids(header: GGUFHeader, tokens: Sequence[bytes], stood_for: set[int], texts: Sequence[str]) -> Iterator[int]:
    """Ids that are kept for later, in order."""
    used = stood_for | _special_ids(header)
    for id, (token, kind) in enumerate(zip(tokens, _token_types(header, len(tokens)), strict=True)):
        text = token.decode("utf-8", "replace")
        is_reserved = kind == UNUSED or RESERVED.fullmatch(text)
        if is_reserved and text and id not in used and not any(text in each for each in texts):
            yield id


def _special_ids(header: GGUFHeader) -> set[int]:
    """Every id that some key names: ends, padding, tokens to suppress."""
    named = [value for key, value in header.metadata.items() if key.endswith(("_token_id", "_token_ids", "_tokens"))]
    return {id for value in named for id in (value if isinstance(value, list) else [value]) if type(id) is int}


def _token_types(header: GGUFHeader, count: int) -> list[int]:
    found = header.metadata.get(TYPES)
    return list(found) if isinstance(found, list) and len(found) == count else [NORMAL] * count


def vocabulary(header: GGUFHeader, chosen: Sequence[ControlToken]) -> dict[str, Value]:
    """The vocabulary's keys with control tokens in it.

    llama.cpp no longer puts BOS in front: it would stand before the control token, computed without the adapter.
    """
    tokens = _items(header.metadata.raw(TOKENS))
    kinds = _token_types(header, len(tokens))
    for token in chosen:
        if token.is_added:
            tokens.append(token.text.encode())
            kinds.append(CONTROL)
        else:
            tokens[token.id], kinds[token.id] = token.text.encode(), CONTROL
    before = header.metadata.get(SUPPRESSED)
    keys: dict[str, Value] = {
        TOKENS: tokens,
        TYPES: kinds,
        ADD_BOS: False,
        SUPPRESSED: [*(before if isinstance(before, list) else []), *(token.id for token in chosen)],
    }
    if SCORES in header.metadata:
        keys[SCORES] = [*header.metadata[SCORES], *(ADDED_SCORE for token in chosen if token.is_added)]
    return keys


def _items(raw: RawValue) -> list[bytes]:
    """The strings of an array as they lie in the file: not every token is UTF-8."""
    position, found = 0, []
    for _ in range(raw.count):
        (length,) = struct.unpack_from("<Q", raw.data, position)
        position += 8 + length
        found.append(raw.data[position - length : position])
    return found
