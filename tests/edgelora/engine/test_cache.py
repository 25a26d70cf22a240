"""What KV may be reused: the rule alone, with a native memory that only records."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.engine.cache import CHUNK, MIN_COPY, Key, KVCache, KVSequence, Wanted
from edgelora.engine.context import State

RED, BLUE = (("red-hash", 1.0),), (("blue-hash", 1.0),)


class Memory:
    """Records what is trimmed; one that cannot be cut in the middle stands for recurrent models."""

    def __init__(self, can_cut: bool = True) -> None:
        self.trimmed: list[tuple[int, int]] = []
        self.copied: list[int] = []
        self.cleared = 0
        self.put: list[int] = []
        self.can_cut = can_cut

    def trim(self, sequence: int, length: int) -> bool:
        self.trimmed.append((sequence, length))
        return self.can_cut or length == 0

    def clear(self) -> None:
        self.cleared += 1

    def state(self, sequence: int) -> State:
        self.copied.append(sequence)
        return np.zeros(100, np.uint8)

    def put_state(self, sequence: int, state: State) -> bool:
        self.put.append(sequence)
        return True


def fill(cache: KVCache, key: Key, tokens: list[int], *, deterministic: bool = False) -> KVSequence:
    """Take a sequence and 'decode' the rest in chunks, as a generation does."""
    sequence = cache.take(Wanted(key, tokens, deterministic=deterministic))
    while len(sequence.tokens) < len(tokens):
        sequence.extend(tokens[len(sequence.tokens) :][:CHUNK])
    cache.give_back(sequence)
    return sequence


@pytest.mark.parametrize("other", [BLUE, (("red-hash", 0.5),), (), RED + BLUE])
def test_another_adapter_or_scale_shares_nothing(other: Key) -> None:
    cache = KVCache(1, Memory())
    fill(cache, RED, [1, 2, 3, 4])
    assert cache.take(Wanted(other, [1, 2, 3, 4, 5])).tokens == []


def test_the_same_adapter_and_scale_share_the_common_prefix() -> None:
    memory = Memory()
    cache = KVCache(1, memory)
    fill(cache, RED, [1, 2, 3, 4])
    assert cache.take(Wanted(RED, [1, 2, 9, 9])).tokens == [1, 2]
    assert memory.trimmed[-1] == (0, 2)


def test_the_last_prompt_token_is_always_computed() -> None:
    cache = KVCache(1, Memory())
    fill(cache, RED, [1, 2, 3])
    assert cache.take(Wanted(RED, [1, 2, 3])).tokens == [1, 2]


def test_a_memory_that_cannot_be_cut_is_emptied() -> None:
    memory = Memory(can_cut=False)
    cache = KVCache(1, memory)
    fill(cache, RED, [1, 2, 3])
    assert cache.take(Wanted(RED, [1, 2, 9])).tokens == []
    assert memory.trimmed[-1] == (0, 0)


def test_alternating_adapters_keep_a_sequence_each() -> None:
    cache = KVCache(2, Memory())
    fill(cache, RED, [1, 2, 3])
    fill(cache, BLUE, [1, 2, 3])
    assert cache.take(Wanted(RED, [1, 2, 3, 4])).tokens == [1, 2, 3]
    assert cache.take(Wanted(BLUE, [1, 2, 3, 4])).tokens == [1, 2, 3]


def test_the_least_recently_used_sequence_is_evicted() -> None:
    cache = KVCache(2, Memory())
    fill(cache, RED, [1, 2, 3])
    fill(cache, BLUE, [1, 2, 3])
    fill(cache, RED, [1, 2, 3, 4])
    fill(cache, (("green-hash", 1.0),), [7])
    assert cache.take(Wanted(BLUE, [1, 2, 3, 4])).tokens == []


def test_with_all_sequences_used_a_new_conversation_evicts_the_oldest_not_the_most_alike() -> None:
    cache = KVCache(4, Memory())
    system = [9, 9, 9]
    for first in range(3):
        fill(cache, RED, [first] * 10)
    newest = fill(cache, RED, [*system, *range(10)])
    assert fill(cache, RED, [*system, 77, 78]).id == 0
    assert cache.take(Wanted(RED, [*newest.tokens, 1])).tokens == [*system, *range(10)]


def test_deterministic_requests_reuse_whole_aligned_chunks_only() -> None:
    prompt = list(range(2 * CHUNK + 10))
    cache = KVCache(1, Memory())
    fill(cache, RED, prompt)
    assert len(cache.take(Wanted(RED, [*prompt, 1])).tokens) == 2 * CHUNK + 10
    cache = KVCache(1, Memory())
    fill(cache, RED, prompt)
    assert len(cache.take(Wanted(RED, [*prompt, 1], deterministic=True)).tokens) == 2 * CHUNK


def test_what_was_decoded_token_by_token_is_not_exact() -> None:
    prompt = list(range(CHUNK + 1))
    cache = KVCache(1, Memory())
    sequence = fill(cache, RED, prompt)
    for token in range(2 * CHUNK):
        sequence.extend((token,))
    conversation = [*sequence.tokens, 1]
    assert len(cache.take(Wanted(RED, conversation, deterministic=True)).tokens) == CHUNK


def test_a_chunk_read_after_an_unaligned_start_is_not_exact() -> None:
    cache = KVCache(1, Memory())
    fill(cache, RED, list(range(CHUNK + 5)))
    longer = list(range(CHUNK + 5 + CHUNK))
    fill(cache, RED, longer)
    assert len(cache.take(Wanted(RED, [*longer, 1], deterministic=True)).tokens) == CHUNK


def test_a_dropped_sequence_gives_nothing() -> None:
    cache = KVCache(1, Memory())
    cache.drop(fill(cache, RED, [1, 2, 3]))
    assert cache.take(Wanted(RED, [1, 2, 3, 4])).tokens == []


def test_a_busy_sequence_is_not_given_twice() -> None:
    cache = KVCache(2, Memory())
    first = cache.take(Wanted(RED, [1, 2, 3]))
    first.extend([1, 2, 3])
    assert cache.has_room()
    assert cache.take(Wanted(RED, [1, 2, 3, 4])) is not first
    assert not cache.has_room()
    cache.give_back(first)
    assert cache.take(Wanted(RED, [1, 2, 3, 4])).tokens == [1, 2, 3]


LONG = list(range(1000, 1000 + 2 * MIN_COPY))


def test_what_makes_room_is_copied_and_comes_back() -> None:
    memory = Memory()
    cache = KVCache(1, memory, budget_bytes=1000)
    fill(cache, RED, [*LONG, 1])
    fill(cache, BLUE, [*LONG, 2])
    assert memory.put == []
    assert cache.take(Wanted(RED, [*LONG, 3])).tokens == LONG
    assert memory.put == [0]


@pytest.mark.parametrize(("budget", "found"), [(0, False), (99, False), (100, True)])
def test_copies_keep_to_their_budget(budget: int, found: bool) -> None:
    cache = KVCache(1, Memory(), budget_bytes=budget)
    fill(cache, RED, [*LONG, 1])
    fill(cache, BLUE, [*LONG, 2])
    assert cache.kept_bytes <= budget
    assert bool(cache.take(Wanted(RED, [*LONG, 3])).tokens) is found


def test_the_least_recently_used_copy_goes_first() -> None:
    cache = KVCache(1, Memory(), budget_bytes=200)
    for key in (RED, BLUE, (("green", 1.0),)):
        fill(cache, key, [*LONG, 1])
    assert fill(cache, RED, [*LONG, 2]).tokens[: len(LONG)] == LONG
    fill(cache, (("pink", 1.0),), [5])  # copies red; blue was used before red was, and goes
    assert cache.take(Wanted(BLUE, [*LONG, 4])).tokens == []


def test_a_prefix_that_is_being_used_is_copied() -> None:
    memory = Memory()
    cache = KVCache(2, memory)
    first = cache.take(Wanted(RED, [*LONG, 1]))
    first.extend(LONG)
    second = cache.take(Wanted(RED, [*LONG, 2]))
    assert (second.tokens, memory.copied, memory.put) == (LONG, [first.id], [second.id])


def test_a_state_that_cannot_be_cut_is_copied_whole_or_not() -> None:
    memory = Memory(can_cut=False)
    cache = KVCache(2, memory, can_cut=False)
    first = cache.take(Wanted(RED, [*LONG, 1, 1]))
    first.extend([*LONG, 1])
    assert cache.take(Wanted(RED, [*LONG, 2])).tokens == []
    assert memory.put == []


def test_another_key_copies_nothing() -> None:
    memory = Memory()
    cache = KVCache(2, memory, budget_bytes=1000)
    fill(cache, RED, [*LONG, 1])
    assert cache.take(Wanted(BLUE, [*LONG, 2])).tokens == []
    assert memory.put == []


def test_gaps_between_those_who_write_are_closed() -> None:
    memory = Memory()
    cache = KVCache(6, memory)
    taken = [cache.take(Wanted((), [n, 9])) for n in range(6)]
    for sequence in taken:
        sequence.extend([sequence.id])
    for sequence in (taken[1], taken[3], taken[4]):
        cache.give_back(sequence)
    writing = [taken[0], taken[2], taken[5]]
    cache.close_gaps(writing)
    assert sorted(sequence.id for sequence in writing) == [0, 1, 2]
    assert [sequence.id for sequence in cache.sequences] == list(range(6))
    assert taken[5].tokens == [5]


def test_those_who_wait_or_read_make_room_for_those_who_write() -> None:
    """Nobody moves twice, and of two ways with as many moves the one that copies less is taken."""
    memory = Memory()
    cache = KVCache(7, memory)
    taken = [cache.take(Wanted((), [n, 9])) for n in range(7)]
    for sequence, count in zip(taken, (5, 7, 2, 5, 5, 0, 5), strict=True):
        sequence.extend([sequence.id] * count)
    cache.close_gaps([taken[0], taken[3], taken[4], taken[6]])
    assert [sequence.id for sequence in taken] == [5, 1, 2, 3, 4, 0, 6]
    assert [len(sequence.tokens) for sequence in taken] == [5, 7, 2, 5, 5, 0, 5]
    assert cache.sequences == sorted(taken, key=lambda sequence: sequence.id)


def test_places_that_may_hold_no_numbers_are_no_gaps() -> None:
    cache = KVCache(3, Memory(), can_cut=False)
    taken = [cache.take(Wanted((), [n, 9])) for n in range(3)]
    cache.drop(taken[1])
    cache.close_gaps([taken[0], taken[2]])
    assert [sequence.id for sequence in taken] == [0, 1, 2]


@pytest.mark.parametrize(
    ("held", "wanted", "usable"),
    [
        ((RED, 20), (RED, 20), 60),
        ((RED, 20), (RED, 30), 20),
        ((RED, 30), (RED, 20), 20),
        ((RED, 20), (BLUE, 30), 20),
        ((RED, 20), ((), 0), 20),
        (((), 0), (RED, 20), 20),
        (((), 0), ((), 0), 60),
        ((RED, 0), (BLUE, 20), 0),
    ],
)
def test_before_an_adapter_begins_to_act_the_kv_is_the_bare_bases(
    held: tuple[Key, int], wanted: tuple[Key, int], usable: int
) -> None:
    tokens = list(range(60))
    sequence = KVSequence(0, key=held[0], begins=held[1], tokens=tokens)
    assert sequence.usable(Wanted(wanted[0], [*tokens, 7], wanted[1])) == usable


def test_a_recurrent_place_that_may_hold_no_numbers_is_cleared_before_it_is_given_again() -> None:
    memory = Memory(can_cut=False)
    cache = KVCache(1, memory, can_cut=False)
    cache.drop(cache.take(Wanted(RED, [1, 2, 3])))
    assert not cache.has_room()
    cache.heal()
    cache.heal()
    assert (cache.has_room(), memory.cleared) == (True, 1)
