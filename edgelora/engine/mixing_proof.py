"""Before adapters are mixed on a model: that a mixed decode computes what llama.cpp computes with its own adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.reader import GGUFHeader
from edgelora.engine.context import Applied, Context
from edgelora.engine.low_rank import F32, LowRank, Weights, tiled
from edgelora.engine.mixer import Mixer, Parts, Runs, make_adapter
from edgelora.engine.mixing import make_mixer
from edgelora.engine.model import Model
from edgelora.errors import EdgeloraError

SEQUENCES, ROWS = 2, 3
TOLERANCE = 0.3
"""Of the change that an adapter makes to the logits. Additions have another order than in llama.cpp, and a quantized
base makes more of it (3 % on Q4_0); rows or matrices taken for others are off by 100 % and more."""
MUCH_SLOWER = 1.5
"""A machine that is busy while it is timed is no reason to switch for good."""


@dataclass(frozen=True)
class Proof:
    """What a trial of mixing said.

    Attributes:
        problem: why it cannot be used; empty if it can.
        unused: matrices whose adapters this model's graph never applies, llama.cpp's own neither.
        mixed_seconds: a token each of two sequences with different adapters, in one decode.
        switching_seconds: the same, adapter after adapter.
    """

    problem: str
    unused: tuple[str, ...] = ()
    mixed_seconds: float = 0.0
    switching_seconds: float = 0.0

    @property
    def is_slower(self) -> bool:
        """Whether mixing costs clearly more than switching on this machine, for this model."""
        return self.mixed_seconds > MUCH_SLOWER * self.switching_seconds


def linear_matrices(base: GGUFHeader) -> list[str]:
    """The matrices of a base's layers, which adapters may change."""
    named = (tensor for name, tensor in base.tensors.items() if name.startswith("blk.") and name.endswith(".weight"))
    return [tensor.name for tensor in named if len(tensor.shape) == 2 and "norm" not in tensor.name]


def prove(model: Model, names: Sequence[str], threads: int) -> Proof:
    """Compare a mixed decode with llama.cpp's own adapter, on a strong random one on these matrices.

    Two sequences read a prompt each, one with the adapter and one without, and then write a token in the same decode.
    So do two that llama.cpp's own adapter is applied to, and two without. The last token is also timed, mixed and by
    switching. It has a context of its own, and takes as long as some twenty tokens.
    """
    rng = np.random.default_rng(0)
    pairs = {}
    for name in names:
        n_out, n_in = model.header.tensors[name].shape
        a = rng.standard_normal((2, n_in), np.float32) * np.float32(n_in**-0.5)
        pairs[name] = a, rng.standard_normal((n_out, 2), np.float32) * np.float32(0.2)
    weights = Weights({name: LowRank(a, tiled(b), F32, 1.0) for name, (a, b) in pairs.items()})
    with ExitStack() as undo:
        try:
            mixer = make_mixer(model, ROWS)
            undo.callback(mixer.close)
            own = make_adapter(model, pairs)
            undo.callback(own.close)
            context = Context(
                model, n_ctx=16, n_sequences=SEQUENCES, threads=threads, n_batch=ROWS, callback=mixer.callback
            )
            undo.callback(context.close)
            mixer.plug(weights)
            trial = _Trial(model, context, mixer)
            mixed = trial.mixed([((weights, 1.0),), ()])
            unused = tuple(mixer.unseen())
            mixer.stand_aside()
            with_own, without = trial.logits(((own.pointer, 1.0),)), trial.logits(())
            times = trial.seconds([((weights, 1.0),), ()], [((own.pointer, 1.0),), ()])
        except EdgeloraError as error:
            return Proof(error.message)
    wanted = np.stack([with_own[0], without[1], with_own[2], without[3]])
    difference, effect = float(np.linalg.norm(mixed - wanted)), float(np.linalg.norm(with_own - without))
    if difference <= TOLERANCE * effect or (len(unused) == len(names) and difference == 0):
        return Proof("", unused, *times)
    share = difference / max(effect, 1e-30)
    return Proof(f"mixed logits differ from llama.cpp's own by {share:.0%} of what the adapter changes", unused)


class _Trial:
    """Prompts of `ROWS` tokens in each sequence, and a token more in both: all logits, (2 * SEQUENCES, n_vocab)."""

    def __init__(self, model: Model, context: Context, mixer: Mixer) -> None:
        self._context, self._mixer = context, mixer
        self._tokens = [[token % model.n_vocab for token in row] for row in ((11, 23, 47), (5, 83, 29))]
        self._last = [token % model.n_vocab for token in (61, 17)]

    def mixed(self, parts: Sequence[Parts]) -> npt.NDArray[np.float32]:
        """Each sequence with its own adapters.

        Raises:
            EdgeloraError: the graph is not as expected.
        """
        runs: Runs = [(1, each) for each in parts]

        def filled(rows: Runs, outputs: Runs) -> Applied:
            self._mixer.fill(rows, outputs)
            return ((self._mixer.socket, 1.0),)

        return self._run(
            lambda sequence: filled([(ROWS, parts[sequence])], [(1, parts[sequence])]), lambda: filled(runs, runs)
        )

    def logits(self, applied: Applied) -> npt.NDArray[np.float32]:
        """All with llama.cpp's own adapters."""
        return self._run(lambda sequence: applied, lambda: applied)

    def seconds(self, parts: Sequence[Parts], applied: Sequence[Applied]) -> tuple[float, float]:
        """The best of three times of a token in each sequence: mixed, and adapter after adapter."""
        runs: Runs = [(1, each) for each in parts]

        def mixed() -> None:
            self._mixer.fill(runs, runs)
            self._context.apply(((self._mixer.socket, 1.0),))
            self._context.decode_rows(0, self._last, [ROWS] * SEQUENCES)

        def switching() -> None:
            self._mixer.stand_aside()
            for sequence, each in enumerate(applied):
                self._context.apply(each)
                self._context.decode_rows(sequence, self._last[sequence : sequence + 1], [ROWS])

        return self._best(mixed), self._best(switching)

    def _best(self, step: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            for sequence in range(SEQUENCES):
                self._context.trim(sequence, ROWS)
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)

    def _run(self, for_prompt: Callable[[int], Applied], for_last: Callable[[], Applied]) -> npt.NDArray[np.float32]:
        context, found = self._context, []
        for sequence, tokens in enumerate(self._tokens):
            context.trim(sequence, 0)
            context.apply(for_prompt(sequence))
            context.decode(sequence, tokens, 0)
            found.append(context.all_logits(1).copy())
            self._check()
        context.apply(for_last())
        context.decode_rows(0, self._last, [ROWS] * SEQUENCES)
        found.append(context.all_logits(SEQUENCES).copy())
        self._check()
        return np.concatenate(found)

    def _check(self) -> None:
        if self._mixer.problem:
            raise EdgeloraError(self._mixer.problem)
