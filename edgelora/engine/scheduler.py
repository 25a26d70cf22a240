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
from edgelora.engine.cache import CHUNK, Key, KVCache
from edgelora.engine.context import Context, Interrupted
from edgelora.engine.generation import Generation, Plan, unstarted
from edgelora.engine.mixing import Mixer, Parts
from edgelora.engine.model import Model
from edgelora.engine.stream import Task

SHORT_CHUNK = 32
"""Tokens of a prompt read between two decodes while others write: their streams pause for no longer."""
QUANTUM = 128
"""Tokens, read or written, after which another group has its turn: switching costs 2 ms, a step 20 and more."""
MIXED = "mixed"


@dataclass(frozen=True)
class _Waiting:
    order: int
    task: Task
    plan: Plan


class Scheduler:
    """The requests of one context. Lives on the engine's thread.

    Args:
        mixer: None where adapters cannot share a decode.
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
        *,
        reproducible: bool = False,
    ) -> None:
        self._model, self._context, self._cache, self._adapters = model, context, cache, adapters
        self.mixer, self.reproducible = mixer, reproducible
        self._waiting: list[_Waiting] = []
        self._running: list[Generation] = []
        self._order = itertools.count()
        self._served: dict[Key, int] = {}
        self._turn: Hashable = None
        self._turn_tokens = 0

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def counts(self) -> tuple[int, int]:
        """How many requests wait, and how many are under way."""
        return len(self._waiting), len(self._running)

    def submit(self, task: Task, plan: Plan) -> None:
        """Let a request wait for its turn. Its adapters stay until it is done."""
        self._adapters.hold(plan.adapters)
        active = {waiting.plan.key for waiting in self._waiting} | {each.plan.key for each in self._running}
        if plan.key not in active:  # who comes back has no credit from the time away
            least = min((self._served.get(key, 0) for key in active), default=0)
            self._served[plan.key] = max(self._served.get(plan.key, 0), least)
        self._waiting.append(_Waiting(next(self._order), task, plan))

    def step(self) -> bool:
        """One decode of those who write, one chunk of a prompt. False: there was nothing that could be done now."""
        self._leave()
        self._admit()
        group = self._group()
        writing = [each for each in group if each.pending is not None]
        reading = [each for each in group if each.pending is None]
        if writing:
            self._write(writing)
        if reading:
            self._read(min(reading, key=lambda each: (each.task.request.priority, each.unread)), bool(writing))
        self._leave()
        return bool(group)

    def close(self, error: Callable[[], BaseException]) -> None:
        """End everything: what is under way is cancelled, what waits gets the error."""
        for each in list(self._running):
            each.reason = each.reason or "cancelled"
        self._leave()
        for waiting in self._waiting:
            self._adapters.release(waiting.plan.adapters)
            waiting.task.items.put(error())
        self._waiting.clear()

    def _leave(self) -> None:
        """Who is done, cancelled or late gives its place back."""
        for each in list(self._running):
            if not each.reason and (each.task.interrupt.is_set() or each.task.is_late):
                each.reason = "cancelled" if each.task.interrupt.is_set() else "deadline"
            if each.reason:
                self._running.remove(each)
                self._cache.give_back(each.sequence)
                self._adapters.release(each.plan.adapters)
                each.task.items.put(each.end())

    def _admit(self) -> None:
        for waiting in list(self._waiting):
            if waiting.task.interrupt.is_set() or waiting.task.is_late:
                self._waiting.remove(waiting)
                self._adapters.release(waiting.plan.adapters)
                reason = "cancelled" if waiting.task.interrupt.is_set() else "deadline"
                waiting.task.items.put(unstarted(waiting.task, waiting.plan, reason))
        if not self._waiting or not self._cache.has_room():
            return
        for waiting in sorted(self._waiting, key=self._rank):
            if not self._cache.has_room():
                return
            self._begin(waiting)

    def _rank(self, waiting: _Waiting) -> tuple[int, int, int]:
        return waiting.task.request.priority, self._served.get(waiting.plan.key, 0), waiting.order

    def _begin(self, waiting: _Waiting) -> None:
        """Give a request its place, if its adapters are in memory."""
        task, plan = waiting.task, waiting.plan
        try:
            if not self._adapters.ready(plan.adapters):
                return
            self._waiting.remove(waiting)
            sequence = self._cache.take(plan.key, plan.tokens, deterministic=plan.deterministic)
            tokenizer, n_vocab = self._model.tokenizer, self._context.n_vocab
            self._running.append(Generation(task, plan, sequence, tokenizer, n_vocab))
        except BaseException as error:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            self._adapters.release(plan.adapters)
            task.items.put(error)

    def _group(self) -> list[Generation]:
        """Whose turn it is."""
        groups: dict[Hashable, list[Generation]] = {}
        for each in self._running:
            groups.setdefault(self._group_of(each), []).append(each)
        if not groups:
            return []
        if self._turn not in groups or (self._turn_tokens >= QUANTUM and len(groups) > 1):
            keys = list(groups)
            after = keys.index(self._turn) + 1 if self._turn in groups else 0
            self._turn, self._turn_tokens = keys[after % len(keys)], 0
        return groups[self._turn]

    def _group_of(self, each: Generation) -> Hashable:
        if each.plan.deterministic and not self.reproducible:
            return id(each)
        return MIXED if self._mixes(each) else each.plan.key

    def _mixes(self, each: Generation) -> bool:
        return self.mixer is not None and all(adapter.is_mixable for adapter, _ in each.plan.adapters)

    def _read(self, each: Generation, others_write: bool) -> None:
        """Decode the next chunk of a prompt; at its end, choose the first token."""
        tokens = each.chunk(SHORT_CHUNK if others_write and not each.plan.deterministic else CHUNK)
        sequence, parts = each.sequence, self._parts(each)
        self._apply(each, [(len(tokens), parts)], [(1, parts)])

        def decode() -> None:
            self._context.decode(sequence.id, tokens, len(sequence.tokens))
            sequence.extend(tokens)

        if self._decoded(decode, [each]) and not each.unread:
            self._draw(each, -1)
        self._count(each, len(tokens))

    def _write(self, writing: Sequence[Generation]) -> None:
        """Decode a token of each, in as few batches as their places allow, and choose the next ones."""
        by_place = {each.sequence.id: each for each in writing}
        if self.reproducible:
            self._write_rows(0, [by_place.get(id) for id in range(self._context.n_sequences)])
            return
        for _, places in itertools.groupby(enumerate(sorted(by_place)), key=lambda pair: pair[1] - pair[0]):
            ids = [place for _, place in places]
            self._write_rows(ids[0], [by_place[id] for id in ids])

    def _write_rows(self, first: int, rows: Sequence[Generation | None]) -> None:
        """One batch: a row for each sequence from `first` on. A None is a sequence that only makes up the number: what
        is decoded there is forgotten at once."""
        present = [each for each in rows if each]
        sequences = self._cache.sequences[first : first + len(rows)]
        parts = [self._parts(each) if each else () for each in rows]
        runs = [(len(list(same)), adapters) for adapters, same in itertools.groupby(parts)]
        self._apply(present[0], runs, runs)
        positions = [len(sequence.tokens) for sequence in sequences]
        for index, each in enumerate(rows):
            if each is None and positions[index] >= present[0].plan.n_ctx:
                self._cache.drop(sequences[index])
                positions[index] = 0
        tokens = [each.pending if each and each.pending is not None else 0 for each in rows]

        def decode() -> None:
            self._context.decode_rows(first, tokens, positions)
            for each in present:
                assert each.pending is not None
                each.sequence.extend((each.pending,))

        done = self._decoded(decode, present)
        for index, each in enumerate(rows):
            if each is None:
                self._context.trim(sequences[index].id, positions[index])
            elif done:
                self._draw(each, index)
                self._count(each, 1)

    def _decoded(self, decode: Callable[[], None], present: Sequence[Generation]) -> bool:
        """Decode for these; what goes wrong ends them, and what their sequences held is forgotten."""
        flag = present[0].task.interrupt if len(present) == 1 else None
        self._context.interrupt_with(flag)
        try:
            decode()
            if self.mixer:
                self.mixer.check()
        except Interrupted:
            present[0].reason = "cancelled"
            return False
        except BaseException as error:
            for each in present:
                self._fail(each, error)
            return False
        finally:
            self._context.interrupt_with(None)
        return True

    def _draw(self, each: Generation, row: int) -> None:
        try:
            each.draw(self._context, row)
        except BaseException as error:
            self._fail(each, error)

    def _fail(self, each: Generation, error: BaseException) -> None:
        self._running.remove(each)
        self._cache.drop(each.sequence)
        each.abandon()
        self._adapters.release(each.plan.adapters)
        each.task.items.put(error)

    def _count(self, each: Generation, tokens: int) -> None:
        self._turn_tokens += tokens
        self._served[each.plan.key] = self._served.get(each.plan.key, 0) + tokens

    def _parts(self, each: Generation) -> Parts:
        return tuple((adapter.weights, scale) for adapter, scale in each.plan.adapters) if self._mixes(each) else ()

    def _apply(self, each: Generation, rows: Any, outputs: Any) -> None:
        """Set what the next decode's rows are computed with."""
        if self.mixer is not None and self._mixes(each):
            self.mixer.fill(rows, outputs)
            self._context.apply(((self.mixer.socket, 1.0),) if self.mixer.socket else ())
            return
        if self.mixer is not None:
            self.mixer.stand_aside()
        self._context.apply(tuple((adapter.pointer, scale) for adapter, scale in each.plan.adapters))
