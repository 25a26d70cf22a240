"""Which KV a request may start from: that of the same adapters' content, at the same scales, for the same tokens.

KV computed under one adapter is wrong under another, so tokens alone never decide. That of one tenant is no business of
another's: how soon a reply begins would tell what others have said, so they share what the operator wrote, and no more.
Within one key the common prefix is kept and the rest recomputed. A prefix that another sequence holds is copied, and
what has to make room for another conversation is copied into a budget of bytes: a system prompt is read once, however
many requests begin with it.

Reusing KV is not free of rounding: a token read in a batch of another size rounds otherwise in the last bits. A
`deterministic` request therefore starts only from *exact* KV: whole prefill chunks at multiples of the chunk size, as
a fresh engine would compute them, so that its logits are the same bits whatever ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgelora.engine.context import State
from edgelora.errors import EdgeloraError

CHUNK = 128
"""Tokens read in one decode while a prompt is prefilled; the grain of exact reuse, and of cancellation on a GPU."""

MIN_COPY = 32
"""Tokens that are worth a copy: reading them again takes a tenth of a second and more, copying a few milliseconds."""

Key = tuple[tuple[str, float], ...]
"""Content hash and scale of each adapter; empty for the bare base."""


@dataclass(eq=False)
class KVSequence:
    """What one KV sequence of the context holds.

    Attributes:
        key: what its KV was computed under; None while empty.
        begins: the first position that the key's adapters act on; before it, the KV is the bare base's.
        tokens: the tokens whose KV it holds, from position 0.
        tenant: whose they are; another one's request starts from no more than the `public` first ones.
        exact: how many of the first tokens were computed in whole, aligned chunks.
        last_used: a counter; the lowest is evicted first.
        busy: a request is writing to it.
    """

    id: int
    key: Key | None = None
    begins: int = 0
    tokens: list[int] = field(default_factory=list)
    tenant: str | None = None
    public: int = 0
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

    def usable(self, wanted: Wanted) -> int:
        """How many of the first tokens need not be computed again; the last one always is, for its logits."""
        return _usable(self, wanted)


@dataclass(frozen=True)
class Wanted:
    """What a request is going to read, under what, and for whom: see `KVSequence`.

    Attributes:
        deterministic: it starts from exact KV only.
    """

    key: Key
    tokens: Sequence[int]
    begins: int = 0
    deterministic: bool = False
    tenant: str | None = None
    public: int = 0


def _weight(leaving: Iterable[KVSequence]) -> tuple[int, int]:
    """How many have to change places, and how much they hold."""
    sizes = [len(each.tokens) for each in leaving]
    return len(sizes), sum(sizes)


def _usable(held: KVSequence | Kept, wanted: Wanted) -> int:
    if held.key is None:
        return 0
    tokens, deterministic = wanted.tokens, wanted.deterministic
    limit = min(held.exact if deterministic else len(held.tokens), len(tokens) - 1)
    if (held.key, held.begins) != (wanted.key, wanted.begins):
        limit = min([limit, *(each.begins for each in (held, wanted) if each.key)])
    if held.tenant != wanted.tenant:
        limit = min(limit, held.public, wanted.public)
    same = next((at for at in range(limit) if held.tokens[at] != tokens[at]), limit)
    return same // CHUNK * CHUNK if deterministic else same


@dataclass(frozen=True, eq=False)
class Kept:
    """The KV of a sequence that had to make room, or that an earlier engine left.

    Attributes:
        state: gives the copy; None where it is gone.
        size_bytes: of memory.
    """

    key: Key
    begins: int
    tokens: Sequence[int]
    exact: int
    state: Callable[[], State | None]
    size_bytes: int = 0
    tenant: str | None = None
    public: int = 0

    def usable(self, wanted: Wanted) -> int:
        return _usable(self, wanted)


class SequencesLost(EdgeloraError):
    """What these held could not be put back: whoever was writing to them cannot go on."""

    def __init__(self, sequences: Sequence[KVSequence]) -> None:
        super().__init__("llama.cpp has no room for a conversation that it held before")
        self.sequences = sequences


class Memory(Protocol):
    """What the cache needs of a context."""

    def trim(self, sequence: int, length: int) -> bool: ...
    def clear(self) -> None: ...
    def state(self, sequence: int) -> State: ...
    def put_state(self, sequence: int, state: State) -> bool: ...


class KVCache:
    """The sequences of one context, and copies of those that made room for others.

    Args:
        n_sequences: how many the context has.
        memory: the context. Its `trim` is False where the model's memory cannot be cut (recurrent layers), which costs
            the whole sequence.
        budget_bytes: for the copies; the least recently used goes first.
        can_cut: False for recurrent layers: a copy is used whole or not at all.
        kept: what an earlier engine left.
    """

    def __init__(
        self,
        n_sequences: int,
        memory: Memory,
        budget_bytes: int = 0,
        *,
        can_cut: bool = True,
        kept: Sequence[Kept] = (),
    ) -> None:
        self.sequences = [KVSequence(id) for id in range(n_sequences)]
        self._memory, self._budget, self._can_cut = memory, budget_bytes, can_cut
        self._kept: list[Kept] = list(kept)  # the most recently used is the last
        self._clock = 0
        self._spoiled = False

    @property
    def kept_bytes(self) -> int:
        """Of the copies."""
        return sum(each.size_bytes for each in self._kept)

    def has_room(self) -> bool:
        """Whether a sequence is idle."""
        return any(not sequence.busy for sequence in self.sequences)

    def take(self, wanted: Wanted) -> KVSequence:
        """An idle sequence, busy from now on and cut to what may be reused: `sequence.tokens` is a prefix of the wanted
        ones, computed under their key.

        The longest usable prefix wins, unless that would throw away most of a sequence while another is older. What
        makes room is copied first, where that is worth it.
        """
        self._clock += 1
        idle = [sequence for sequence in self.sequences if not sequence.busy]
        best = max(idle, key=lambda s: (s.usable(wanted), -s.last_used, -s.id))
        kept = best.usable(wanted)
        oldest = min(idle, key=lambda s: (s.last_used, s.id))
        if 2 * kept < len(best.tokens):
            best, kept = oldest, oldest.usable(wanted)
        copies = list(self._kept)  # what makes room may push out the copy that is wanted
        if kept < len(best.tokens):
            self._keep(best, lost=len(best.tokens) - kept)
        self._cut(best, kept)
        best.key, best.begins, best.last_used, best.busy = wanted.key, wanted.begins, self._clock, True
        best.tenant, best.public = wanted.tenant, wanted.public
        self._share(best, wanted, copies)
        return best

    def share(self, sequence: KVSequence, wanted: Wanted) -> None:
        """Copy into a busy sequence, which holds a prefix of what is wanted, a longer one that another holds, or a
        copy."""
        self._share(sequence, wanted, self._kept)

    def _share(self, sequence: KVSequence, wanted: Wanted, copies: Sequence[Kept]) -> None:
        others = [each for each in self.sequences if each is not sequence]
        sources: list[KVSequence | Kept] = [*others, *copies]
        best = max(sources, key=lambda each: each.usable(wanted), default=None)
        length = best.usable(wanted) if best else 0
        if best is None or length < len(sequence.tokens) + MIN_COPY:
            return
        if not self._can_cut and length < len(best.tokens):
            return
        try:
            state = best.state() if isinstance(best, Kept) else self._memory.state(best.id)
        except MemoryError:  # then it is read again
            return
        if state is None:
            self._kept = [each for each in self._kept if each is not best]
            return
        if best in self._kept:
            self._kept = [*(each for each in self._kept if each is not best), best]
        held = list(best.tokens)
        if not self._memory.put_state(sequence.id, state):
            held = []
        sequence.tokens, sequence.exact = held, best.exact if held else 0
        self._cut(sequence, length if held else 0)

    def give_back(self, sequence: KVSequence) -> None:
        """A request is done with it; what it holds can be used again."""
        sequence.busy = False

    def drop(self, sequence: KVSequence) -> None:
        """Forget a sequence whose state is not known any more, and may be no numbers.

        llama.cpp begins a recurrent state by multiplying what was there with 0, and a NaN stays one: such a place is
        not given to anybody before `heal`.
        """
        self._memory.trim(sequence.id, 0)
        sequence.cut(0)
        sequence.key = None
        sequence.busy = not self._can_cut
        if not self._can_cut:
            self._spoiled = True

    def heal(self) -> None:
        """While nobody is under way: clear the memory, where a place of it may hold no numbers."""
        if not self._spoiled:
            return
        self._memory.clear()
        self._spoiled = False
        for sequence in self.sequences:
            sequence.cut(0)
            sequence.key, sequence.busy = None, False

    def close_gaps(self, writing: Sequence[KVSequence]) -> None:
        """Move these to places that follow each other, for they are decoded together. Whoever is there, idle or reading
        or waiting, changes places with one of them: a decode more would cost more than two copies.

        Raises:
            SequencesLost: see there.
        """
        ids, size = {each.id for each in writing}, len(writing)
        if not ids or max(ids) - min(ids) < size:
            return
        windows = [self.sequences[first : first + size] for first in range(len(self.sequences) - size + 1)]
        whole = [each for each in windows if not any(sequence.busy and sequence.key is None for sequence in each)]
        if not whole:  # there are spoiled places everywhere
            return
        window = min(whole, key=lambda each: _weight(sequence for sequence in each if sequence.id not in ids))
        leaving = [sequence.id for sequence in window if sequence.id not in ids]
        coming = sorted(ids - {sequence.id for sequence in window})
        for gap, id in zip(leaving, coming, strict=True):
            if not self._swap(gap, id):
                return

    def _swap(self, one: int, other: int) -> bool:
        """Exchange the places of two sequences. False: there is no memory for copies, and everything is as it was.

        Raises:
            SequencesLost: llama.cpp has no room for what it held before.
        """
        ids = (one, other)
        pair = [self.sequences[id] for id in ids]
        try:
            states = [self._memory.state(id) if self.sequences[id].tokens else None for id in ids]
        except MemoryError:
            return False
        for id, state in zip(reversed(ids), states, strict=True):
            if state is None:
                self._memory.trim(id, 0)
            elif not self._memory.put_state(id, state):
                for sequence in pair:
                    self._memory.trim(sequence.id, 0)
                    sequence.cut(0)
                    sequence.key = None
                raise SequencesLost(pair)
        for id, sequence in zip(reversed(ids), pair, strict=True):
            sequence.id = id
            self.sequences[id] = sequence
        return True

    def all(self) -> Iterator[Kept]:
        """Copies of what sequences hold, and what was copied before."""
        yield from self._kept
        for sequence in self.sequences:
            if len(sequence.tokens) >= MIN_COPY:
                yield self._copy(sequence)

    def _copy(self, sequence: KVSequence) -> Kept:
        state, key = self._memory.state(sequence.id), sequence.key or ()
        return Kept(
            key,
            sequence.begins,
            tuple(sequence.tokens),
            sequence.exact,
            lambda: state,
            state.nbytes,
            sequence.tenant,
            sequence.public,
        )

    def _cut(self, sequence: KVSequence, length: int) -> None:
        if not self._memory.trim(sequence.id, length):
            self._memory.trim(sequence.id, 0)
            length = 0
        sequence.cut(length)

    def _keep(self, sequence: KVSequence, lost: int) -> None:
        """Copy a sequence before `lost` of its tokens are forgotten."""
        if sequence.key is None or lost < MIN_COPY or not self._budget:
            return
        held = tuple(sequence.tokens)
        under = (sequence.key, sequence.begins, sequence.tenant)
        alike = [each for each in self._kept if (each.key, each.begins, each.tenant) == under]
        if any(each.tokens[: len(held)] == held for each in alike):
            return
        try:
            copy = self._copy(sequence)
        except MemoryError:
            return
        shorter = [each for each in alike if held[: len(each.tokens)] == each.tokens]
        self._kept = [each for each in self._kept if each not in shorter]
        self._kept.append(copy)
        while self.kept_bytes > self._budget:
            self._kept.remove(next(each for each in self._kept if each.size_bytes))
