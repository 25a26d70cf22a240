"""Types that somebody chose by hand for some tensors, as llama-quantize's options do. Stdlib only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from converters.block_types import find_type
from converters.errors import UnsupportedError, listed


@dataclass(frozen=True)
class Overrides:
    """Types that somebody chose by hand, as llama-quantize's options do. Type names in any case.

    Attributes:
        tensor_types: (regular expression, type name); the first that is found in a tensor's name wins over the recipe
            (`--tensor-type`). Rows that do not fill its blocks fall back as they do with a recipe. They count in
            recipes that quantize; f32, f16 and bf16 do not look at them (see `without_effect`).
        output: type of `output.weight` (`--output-tensor-type`).
        token_embedding: type of the token embeddings (`--token-embedding-type`).
        pure: the recipe's default type everywhere, instead of its mixture (`--pure`).

    Raises:
        UnsupportedError: an unknown type, or an expression that cannot be read.
    """

    tensor_types: tuple[tuple[str, str], ...] = ()
    output: str | None = None
    token_embedding: str | None = None
    pure: bool = False

    def __post_init__(self) -> None:
        for name in (*(name for _, name in self.tensor_types), self.output, self.token_embedding):
            if name is not None:
                find_type(name)
        for pattern, _ in self.tensor_types:
            _compiled(pattern)

    def matching(self, name: str) -> str | None:
        """The type that `tensor_types` has for the tensor called `name`."""
        return next((find_type(kind).name for part, kind in self.tensor_types if _compiled(part).search(name)), None)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The expressions of `tensor_types` that are found in none of `names`."""
        names = list(names)
        return [part for part, _ in self.tensor_types if not any(map(_compiled(part).search, names))]


def _compiled(pattern: str) -> re.Pattern[str]:
    if "[[:" in pattern or "[[." in pattern or "[[=" in pattern:
        raise UnsupportedError(
            f"tensor type {pattern!r}: POSIX character classes are not supported", hint=r"Write [0-9] or \d."
        )
    try:
        return re.compile(pattern, re.ASCII)
    except re.error as error:
        raise UnsupportedError(
            f"tensor type {pattern!r}: not a regular expression ({error})",
            hint="Example: --tensor-type 'ffn_down=q6_k' or --tensor-type 'blk\\.[0-3]\\.attn_v=q8_0'.",
        ) from None


def parse_tensor_types(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """`Overrides.tensor_types` from what people type: 'ffn_down=q6_k'.

    As in llama-quantize (`parse_tensor_type`, tools/quantize/quantize.cpp) the expression ends at the first `=` and is
    turned to lower case, and the type's name may have any case.

    Raises:
        UnsupportedError: all that cannot be read, in one message.
    """
    pairs, problems = [], []
    for text in texts:
        pattern, separator, kind = text.partition("=")
        try:
            if not (pattern and separator and kind):
                raise UnsupportedError(f"tensor type {text!r}: expected NAME=TYPE")
            pairs.append((pattern.lower(), find_type(kind).name))
            _compiled(pattern.lower())
        except UnsupportedError as error:
            problems.append(error)
    if len(problems) == 1:
        raise UnsupportedError(f"{problems[0].message}", hint=problems[0].hint or "Example: ffn_down=q6_k.")
    if problems:
        hint = next((problem.hint for problem in problems if problem.hint), "Example: ffn_down=q6_k.")
        raise UnsupportedError(f"tensor types:{listed([problem.message for problem in problems])}", hint=hint)
    return tuple(pairs)
