"""Which KV a request may start from: that of the same adapters' content, at the same scales, for the same tokens.

KV computed under one adapter is wrong under another, so tokens alone never decide. Within one key the common prefix is
kept and the rest recomputed.

Reusing KV is not free of rounding: a token read in a batch of another size rounds otherwise in the last bits. A
`deterministic` request therefore starts only from *exact* KV: whole prefill chunks at multiples of the chunk size, as
a fresh engine would compute them, so that its logits are the same bits whatever ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

CHUNK = 128
"""Tokens read in one decode while a prompt is prefilled; the grain of exact reuse, and of cancellation on a GPU."""

Key = tuple[tuple[str, float], ...]
"""Content hash and scale of each adapter; empty for the bare base."""


@dataclass
class KVSequence:
    """What one KV sequence of the context holds.

    Attributes:
        key: what its KV was computed under; None while empty.
        tokens: the tokens whose KV it holds, from position 0.
        exact: how many of the first tokens were computed in whole, aligned chunks.
        last_used: a counter; the lowest is evicted first.
        busy: a request is writing to it.
    """

    id: int
    key: Key | None = None
    tokens: list[int] = field(default_factory=list)
    exact: int = 0
    last_used: int = 0
    busy: bool = False

    def cut(self, length: int) -> None:
        del self.tokens[length:]
        self.exact = min(self.exact, length // CHUNK * CHUNK)

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens that were decoded in one call."""
        if len(tokens) == CHUNK and self.exact == len(self.tokens):
            self.exact += CHUNK
        self.tokens.extend(tokens)

    def usable(self, key: Key, tokens: Sequence[int], deterministic: bool) -> int:
        """How many of the first `tokens` need not be computed again; the last one always is, for its logits."""
        if self.key != key:
            return 0
        limit = min(self.exact if deterministic else len(self.tokens), len(tokens) - 1)
        same = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens[:limit], tokens, strict=False))
        )
        return same // CHUNK * CHUNK if deterministic else same


class KVCache:
    """The sequences of one context.

    Args:
        n_sequences: how many the context has.
        trim: forgets a native sequence's cells from a position on; False where the model's memory cannot be cut there
            (recurrent layers), which costs the whole sequence.
    """

    def __init__(self, n_sequences: int, trim: Callable[[int, int], bool]) -> None:
        self.sequences = [KVSequence(id) for id in range(n_sequences)]
        self._trim = trim
        self._clock = 0

    def has_room(self) -> bool:
        """Whether a sequence is idle."""
        return not all(sequence.busy for sequence in self.sequences)

    def take(self, key: Key, tokens: Sequence[int], *, deterministic: bool = False) -> KVSequence:
        """An idle sequence, busy from now on and cut to what may be reused: `sequence.tokens` is a prefix of `tokens`,
        computed under `key`.

        The longest usable prefix wins, unless that would throw away most of a sequence while another is older.
        """
        self._clock += 1
        idle = [sequence for sequence in self.sequences if not sequence.busy]
        best = max(idle, key=lambda s: (s.usable(key, tokens, deterministic), -s.last_used, -s.id))
        kept = best.usable(key, tokens, deterministic)
        oldest = min(idle, key=lambda s: (s.last_used, s.id))
        if 2 * kept < len(best.tokens):
            best, kept = oldest, oldest.usable(key, tokens, deterministic)
        if not self._trim(best.id, kept):
            self._trim(best.id, 0)
            kept = 0
        best.cut(kept)
        best.key, best.last_used, best.busy = key, self._clock, True
        return best

    def give_back(self, sequence: KVSequence) -> None:
        """A request is done with it; what it holds can be used again."""
        sequence.busy = False

    def drop(self, sequence: KVSequence) -> None:
        """Forget a sequence whose state is not known any more."""
        self._trim(sequence.id, 0)
        sequence.cut(0)
        sequence.key = None
        sequence.busy = False
