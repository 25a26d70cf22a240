"""Who is decoded next: requests join and leave at every step, and share a decode wherever they can.

A step is one decode of all replies under way, a token each, and one chunk of a prompt. Replies share a decode where
they form one *group*. Adapters that can be mixed, and the bare base, are one; every other adapter, blend and scale is a
group of its own, and so is each deterministic request that has to be decoded alone. Groups take turns, `QUANTUM` tokens
each.

Requests that wait are let in by priority, then to whom was served least (each adapter's tokens are counted, as in
Virtual Token Counter, arXiv:2401.00588), then by age: an adapter with a thousand requests does not starve the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.engine.adapters import Adapters
from edgelora.engine.cache import CHUNK, KVCache, SequencesLost
from edgelora.engine.context import Context, Interrupted
from edgelora.engine.generation import Generation, Plan, unstarted
from edgelora.engine.mixer import Mixer, Parts, Runs
from edgelora.engine.model import Model
from edgelora.engine.stream import Completion, Task
from edgelora.engine.threads import LoadFollower

PAUSE = 64
"""Tokens of prompts read between two decodes while others write: their streams pause for no longer. Kernels are at half
their speed with fewer than 16 rows, and at their best from 64 on."""
QUANTUM = 128
"""Tokens, read or written, after which another group has its turn: switching costs 2 ms, a step 20 and more."""
READ = 512
"""Tokens of prompts read in one decode while nobody writes; who comes meanwhile waits for no more."""
TAIL = 8
"""Last tokens of a prompt that are decoded beside those who write, a token a step: as a chunk of their own, which no
batch is as slow as, they would take as long as several steps."""
MIN_TOGETHER = 16
"""Tokens of each prompt that are worth reading several in one decode."""
MIXED = "mixed"


@dataclass
class _Waiting:
    """A request without a place; with `is_next`, it gets one as soon as its adapters are in memory."""

    order: int
    task: Task
    plan: Plan
    is_next: bool = False


class Scheduler:
    """The requests of one context. Lives on the engine's thread.

    Args:
        mixer: None where adapters cannot share a decode.
        load: how many threads to decode with. Deterministic requests always get the most: kernels split their sums by
            thread.
        reproducible: every decode has a row for each sequence of the context, so that no reply depends on how many
            others are under way.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        cache: KVCache,
        adapters: Adapters,
        mixer: Mixer | None,
        load: LoadFollower,
        *,
        reproducible: bool = False,
    ) -> None:
        self._model, self._context, self._cache, self._adapters = model, context, cache, adapters
        self.mixer, self._load, self.reproducible = mixer, load, reproducible
        self._waiting: list[_Waiting] = []
        self._running: list[Generation] = []
        self._order = itertools.count()
        self._served: dict[tuple[str, ...], int] = {}
        self._turns: list[Hashable] = []  # groups, the one whose turn it is first
        self._turn_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests wait, and how many are under way."""
        return len(self._waiting), len(self._running)

    @property
    def backlog(self) -> int:
        """How many requests more there are than places; one that comes now begins at once where that is below 0."""
        return len(self._waiting) - sum(not sequence.busy for sequence in self._cache.sequences)

    def submit(self, task: Task, plan: Plan) -> None:
        """Let a request wait for its turn. Its adapters are known until it is done."""
        self._adapters.claim(plan.adapters)
        account = _account(plan)
        plans = [each.plan for each in self._waiting] + [each.plan for each in self._running]
        active = {_account(each) for each in plans}
        if account not in active:  # who comes back has no credit from the time away
            self._served = {each: tokens for each, tokens in self._served.items() if each in active}
            self._served[account] = min(self._served.values(), default=0)
        self._waiting.append(_Waiting(next(self._order), task, plan))

    def step(self) -> bool:
        """One decode of those who write, and some of the prompts. False: there was nothing that could be done now."""
        self._leave()
        self._admit()
        group = self._group()
        writing = [each for each in group if each.pending is not None]
        if writing:
            tails = [each for each in group if self._is_tail(each)]
            self._write([*writing, *tails])
        most, done = self._pause() if writing else READ, 0
        while done < most and (reading := self._reading(group)):
            each = min(reading, key=_impatience)
            if done and each.unread > most - done:  # the next step has room for a piece that is read fast
                break
            done += self._read(each, reading, most - done)
            self._leave()
            if any(each.pending is not None for each in self._running):
                most = self._pause()
        self._leave()
        return bool(group)

    def _pause(self) -> int:
        """For how many tokens of prompts those who write pause now: for twice as many, where more wait than write."""
        writing = sum(each.pending is not None for each in self._running)
        return PAUSE if 2 * writing >= len(self._running) else 2 * PAUSE

    def _reading(self, group: Sequence[Generation]) -> list[Generation]:
        """Whose prompts are still to be read."""
        alive = [each for each in group if each in self._running and each.pending is None and not each.reason]
        writers = any(each.pending is not None and not each.reason for each in self._running)
        return [each for each in alive if not (writers and self._is_tail(each))]

    def _is_tail(self, each: Generation) -> bool:
        """Whether the rest of a prompt can be decoded beside those who write."""
        begun = each.pending is None and not each.reason and each.read_from is not None
        return begun and self._is_free(each) and each.unread <= TAIL

    def _is_free(self, each: Generation) -> bool:
        """Whether its prompt may be read in pieces of any size, with others."""
        return self._mixes(each.plan) and not each.plan.deterministic and not self.reproducible

    def close(self, error: Callable[[], BaseException]) -> None:
        """End everything: what is under way is cancelled, what waits gets the error."""
        for each in self._running:
            each.reason = each.reason or "cancelled"
        self._leave()
        for waiting in list(self._waiting):
            self._forget(waiting, error())

    def _leave(self) -> None:
        """Who is done, cancelled or late gives its place back."""
        for each in list(self._running):
            each.reason = each.reason or _gone(each.task)
            if each.reason:
                self._running.remove(each)
                self._cache.give_back(each.sequence)
                self._let_go(each.plan)
                each.task.put(each.end())

    def _admit(self) -> None:
        """Give places to those who wait, and have the next ones' adapters read."""
        for waiting in list(self._waiting):
            if reason := _gone(waiting.task):
                self._forget(waiting, unstarted(waiting.task, waiting.plan, reason))
        if not self._running:
            self._cache.heal()
        places = sum(not sequence.busy for sequence in self._cache.sequences)
        places -= sum(waiting.is_next for waiting in self._waiting)
        for waiting in sorted(self._waiting, key=self._rank):
            if not waiting.is_next and places > 0:
                self._adapters.use(waiting.plan.adapters)
                waiting.is_next = True
                places -= 1
            if waiting.is_next:
                self._begin(waiting)

    def _rank(self, waiting: _Waiting) -> tuple[int, int, int]:
        return waiting.task.request.priority, self._served.get(_account(waiting.plan), 0), waiting.order

    def _begin(self, waiting: _Waiting) -> None:
        """Give a request its place, if its adapters are in memory."""
        task, plan = waiting.task, waiting.plan
        try:
            if not self._adapters.ready(plan.adapters, mixed=self._mixes(plan)):
                return
            sequence = self._cache.take(plan.wanted)
        except BaseException as error:
            self._forget(waiting, error)
            return
        try:
            self._running.append(Generation(task, plan, sequence, self._model.tokenizer, self._context.n_vocab))
            self._waiting.remove(waiting)
        except BaseException as error:
            self._cache.give_back(sequence)
            self._forget(waiting, error)

    def _forget(self, waiting: _Waiting, answer: Completion | BaseException) -> None:
        """A request that never begins."""
        self._waiting.remove(waiting)
        if waiting.is_next:
            self._adapters.release(waiting.plan.adapters)
        self._adapters.disclaim(waiting.plan.adapters)
        waiting.task.put(answer)

    def _let_go(self, plan: Plan) -> None:
        self._adapters.release(plan.adapters)
        self._adapters.disclaim(plan.adapters)

    def _group(self) -> list[Generation]:
        """Whose turn it is."""
        groups: dict[Hashable, list[Generation]] = {}
        for each in self._running:
            groups.setdefault(self._group_of(each), []).append(each)
        if not groups:
            return []
        first = self._turns[0] if self._turns else None
        self._turns = [each for each in self._turns if each in groups]
        self._turns += [each for each in groups if each not in self._turns]
        if self._turn_tokens >= QUANTUM and self._turns[0] == first:
            self._turns.append(self._turns.pop(0))
        if self._turns[0] != first or self._turn_tokens >= QUANTUM:
            self._turn_tokens = 0
        return groups[self._turns[0]]

    def _group_of(self, each: Generation) -> Hashable:
        if each.plan.deterministic and not self.reproducible:
            return id(each)
        return MIXED if self._mixes(each.plan) else each.plan.key_at(len(each.sequence.tokens))

    def _mixes(self, plan: Plan) -> bool:
        if self.mixer is None or (plan.deterministic and not self.mixer.rows_are_independent):
            return False
        return all(adapter.is_mixable for adapter, _ in plan.adapters)

    def _read(self, each: Generation, reading: Sequence[Generation], most: int) -> int:
        """Decode the next chunk of a prompt, at most so many tokens of it; at its end, choose the first token.

        Others that are read as well join in where that makes a better batch. A deterministic prompt is always read
        alone, in whole chunks. Returns how many tokens were read.
        """
        for other in self._running:
            other.passed_over += other.pending is None and other is not each
        self._begin_reading(each)
        together = self._companions(each, reading, most)
        if len(together) > 1:
            return self._read_together(together, most)
        plan, sequence = each.plan, each.sequence
        size = CHUNK if plan.deterministic else _even(each.unread, most)
        tokens, position = each.chunk(size), len(sequence.tokens)
        before = max(0, min(plan.begins - position, len(tokens)))  # tokens that the adapters do not act on
        if before and not self._mixes(plan):
            tokens = tokens[:before]
        parts = self._parts(plan)
        rows = [(before, ()), (len(tokens) - before, parts)]

        def decode() -> None:
            self._apply(plan, position, [run for run in rows if run[0]], [(1, parts if before < len(tokens) else ())])
            self._context.decode(sequence.id, tokens, position)

        if self._decoded(decode, [each]):
            sequence.extend(tokens)
            if not each.unread:
                self._draw(each, -1)
        self._count(each, len(tokens))
        return len(tokens)

    def _begin_reading(self, each: Generation) -> None:
        """Others may have read what it begins with since it got its place."""
        if each.read_from is None:
            self._cache.share(each.sequence, each.plan.wanted)
            each.read_from = len(each.sequence.tokens)

    def _companions(self, each: Generation, reading: Sequence[Generation], most: int) -> list[Generation]:
        """Those with short prompts, too, whose places follow each other around this one's; in the order of places."""
        if not self._is_short(each, most):
            return [each]
        others = (other for other in reading if other is not each and self._is_short(other, most))
        by_place = {each.sequence.id: each}
        for other in sorted(others, key=lambda other: abs(other.sequence.id - each.sequence.id)):
            is_next = {other.sequence.id - 1, other.sequence.id + 1} & by_place.keys()
            if is_next and (len(by_place) + 1) * MIN_TOGETHER <= most:
                self._begin_reading(other)
                if self._is_short(other, most):  # and not the same prompt, which is copied once it was read
                    by_place[other.sequence.id] = other
        return [by_place[id] for id in sorted(by_place)]

    def _is_short(self, each: Generation, most: int) -> bool:
        return self._is_free(each) and not each.plan.begins and MIN_TOGETHER <= each.unread <= most // 2

    def _read_together(self, together: Sequence[Generation], most: int) -> int:
        """As many tokens of each of these prompts as the shortest has, or there is room for."""
        size = min(most // len(together), *(each.unread for each in together))
        rows = [each.chunk(size) for each in together]
        positions = [len(each.sequence.tokens) for each in together]
        parts = [self._parts(each.plan) for each in together]

        def decode() -> None:
            self._apply(together[0].plan, 0, [(size, each) for each in parts], [(1, each) for each in parts])
            self._context.decode_together(together[0].sequence.id, rows, positions)

        done = self._decoded(decode, together)
        for index, each in enumerate(together):
            if done:
                each.sequence.extend(rows[index])
                if not each.unread:
                    self._draw(each, size * (index + 1) - 1)
            self._count(each, size)
        return size * len(together)

    def _write(self, writing: Sequence[Generation]) -> None:
        """Decode a token of each, in as few batches as their places allow, and choose the next ones."""
        if self.reproducible:
            by_place = {each.sequence.id: each for each in writing}
            self._write_rows(0, [by_place.get(id) for id in range(self._context.n_sequences)])
            return
        try:
            self._cache.close_gaps([each.sequence for each in writing])
        except SequencesLost as error:
            for each in [each for each in self._running if each.sequence in error.sequences]:
                self._fail(each, error)
        by_place = {each.sequence.id: each for each in writing if each in self._running}
        for _, places in itertools.groupby(enumerate(sorted(by_place)), key=lambda pair: pair[1] - pair[0]):
            ids = [place for _, place in places]
            self._write_rows(ids[0], [by_place[id] for id in ids])

    def _write_rows(self, first: int, rows: Sequence[Generation | None]) -> None:
        """One batch: a row for each sequence from `first` on. A None is a sequence that only makes up the number: what
        is decoded there is forgotten at once."""
        present = [each for each in rows if each]
        sequences = self._cache.sequences[first : first + len(rows)]
        parts = [
            self._parts(each.plan) if each and each.plan.key_at(len(each.sequence.tokens)) else () for each in rows
        ]
        runs = [(len(list(same)), adapters) for adapters, same in itertools.groupby(parts)]
        for each, sequence in zip(rows, sequences, strict=True):
            if each is None and len(sequence.tokens) >= present[0].plan.n_ctx:
                self._cache.drop(sequence)
        positions = [len(sequence.tokens) for sequence in sequences]
        tokens = [each.next_token if each else 0 for each in rows]

        def decode() -> None:
            self._apply(present[0].plan, max(positions), runs, runs)
            self._context.decode_rows(first, tokens, positions)

        done = self._decoded(decode, present)
        for index, each in enumerate(rows):
            if each is None:
                self._context.trim(sequences[index].id, positions[index])
            elif done:
                each.sequence.extend((tokens[index],))
                if not each.unread:
                    self._draw(each, index)
                self._count(each, 1)

    def _decoded(self, decode: Callable[[], None], present: Sequence[Generation]) -> bool:
        """Decode for these. False: it came to nothing; what went wrong ended them, or they go on by switching."""
        self._context.interrupt_with(present[0].task.interrupt if len(present) == 1 else None)
        steady = any(each.plan.deterministic for each in present)
        self._context.use_threads(self._load.most if steady else self._load.threads())
        try:
            decode()
            if not (self.mixer and self.mixer.problem):
                return True
            self._stop_mixing(self.mixer.problem)
            for each in present:
                self._context.trim(each.sequence.id, len(each.sequence.tokens))
        except Interrupted:
            present[0].reason = "cancelled"
        except BaseException as error:
            for each in present:
                self._fail(each, error)
        return False

    def _stop_mixing(self, problem: str) -> None:
        """A graph was not as expected. No logits of it were used: everybody goes on with llama.cpp's own adapters."""
        self._adapters.stop_mixing(problem)
        self.mixer = None

    def _draw(self, each: Generation, row: int) -> None:
        try:
            each.draw(self._context, row)
        except BaseException as error:
            self._fail(each, error)

    def _fail(self, each: Generation, error: BaseException) -> None:
        self._running.remove(each)
        self._cache.drop(each.sequence)
        each.abandon()
        self._let_go(each.plan)
        each.task.put(error)

    def _count(self, each: Generation, tokens: int) -> None:
        self._turn_tokens += tokens
        self._served[_account(each.plan)] = self._served.get(_account(each.plan), 0) + tokens

    def _parts(self, plan: Plan) -> Parts:
        return tuple((adapter.weights, scale) for adapter, scale in plan.adapters) if self._mixes(plan) else ()

    def _apply(self, plan: Plan, position: int, rows: Runs, outputs: Runs) -> None:
        """Set what the next decode's rows are computed with; without mixing, that of one plan at a position."""
        if self.mixer is not None and self._mixes(plan):
            self.mixer.fill(rows, outputs)
            self._context.apply(((self.mixer.socket, 1.0),) if self.mixer.socket else ())
            return
        if self.mixer is not None:
            self.mixer.stand_aside()
        scales: dict[Any, float] = {}
        acting = plan.adapters if plan.key_at(position) else ()
        for adapter, scale in acting:  # llama.cpp keeps one scale for each adapter, and two names may be one
            scales[adapter.file] = scales.get(adapter.file, 0.0) + scale
        pointers = {adapter.file: adapter.pointer for adapter, _ in acting}
        self._context.apply(tuple((pointers[file], scale) for file, scale in scales.items()))


def _gone(task: Task) -> str:
    """Why nobody waits for this any more; empty while somebody does."""
    return "cancelled" if task.interrupt.is_set() else "deadline" if task.is_late else ""


def _impatience(each: Generation) -> tuple[int, int]:
    """Who is read next: the shortest prompt, but each time it is passed over makes a longer one shorter."""
    return each.task.request.priority, each.unread - PAUSE * each.passed_over


def _even(unread: int, most: int) -> int:
    """The size of the first of as few pieces, as even as can be: a short last one would be read slowly."""
    pieces = -(-unread // most)
    return min(most, -(-unread // pieces // 4) * 4)


def _account(plan: Plan) -> tuple[str, ...]:
    """Under which name tokens are counted: by content, whatever the scale."""
    return tuple(sorted({adapter.content_hash for adapter, _ in plan.adapters}))
