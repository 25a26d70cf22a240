"""Before adapters are mixed on a model: that a mixed decode computes what llama.cpp computes with its own adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelora.engine.context import Applied, Context
from edgelora.engine.low_rank import F32, LowRank, Weights, tiled
from edgelora.engine.mixing import Mixer, Runs, make_adapter
from edgelora.engine.model import Model
from edgelora.errors import EdgeloraError

ROWS = 3
TOLERANCE = 0.3
"""Of the change that an adapter makes to the logits. Additions have another order than in llama.cpp, and a quantized
base makes more of it (3 % on Q4_0); rows or matrices taken for others are off by 100 % and more."""


@dataclass(frozen=True)
class Proof:
    """What a trial of mixing said.

    Attributes:
        problem: why it cannot be used; empty if it can.
        unused: matrices whose adapters this model's graph never applies, llama.cpp's own neither.
    """

    problem: str
    unused: tuple[str, ...] = ()


def prove(model: Model, names: Sequence[str], threads: int) -> Proof:
    """Compare rows of a mixed decode with llama.cpp's own adapter, on a strong random one on these matrices.

    Three rows with different tokens are decoded three times: the first and last with the adapter and the middle one
    without; all with llama.cpp's own adapter; all without. It has a context of its own, and three decodes' time.
    """
    rng = np.random.default_rng(0)
    pairs = {}
    for name in names:
        n_out, n_in = model.header.tensors[name].shape
        a = rng.standard_normal((2, n_in), np.float32) * np.float32(n_in**-0.5)
        pairs[name] = a, rng.standard_normal((n_out, 2), np.float32) * np.float32(0.2)
    weights = Weights({name: LowRank(a, tiled(b), F32, 1.0) for name, (a, b) in pairs.items()})
    tokens = [token % model.n_vocab for token in (11, 23, 47)]
    with ExitStack() as undo:
        try:
            mixer = Mixer(model, ROWS)
            undo.callback(mixer.close)
            own = make_adapter(model, pairs)
            undo.callback(own.close)
            context = Context(model, n_ctx=16, n_sequences=ROWS, threads=threads, n_batch=ROWS, callback=mixer.callback)
            undo.callback(context.close)
            mixer.plug(weights)

            def logits(applied: Applied) -> npt.NDArray[np.float32]:
                context.apply(applied)
                context.decode_rows(0, tokens, [0] * ROWS)
                for sequence in range(ROWS):
                    context.trim(sequence, 0)
                return context.all_logits(ROWS).copy()

            rows: Runs = [(1, ((weights, 1.0),)), (1, ()), (1, ((weights, 1.0),))]
            mixer.fill(rows, rows)
            mixed = logits(((mixer.socket, 1.0),))
            mixer.check()
            unused = tuple(mixer.unseen())
            mixer.stand_aside()
            with_own, without = logits(((own.pointer, 1.0),)), logits(())
        except EdgeloraError as error:
            return Proof(error.message)
    wanted = np.stack([with_own[0], without[1], with_own[2]])
    difference, effect = float(np.linalg.norm(mixed - wanted)), float(np.linalg.norm(with_own - without))
    if difference <= TOLERANCE * effect or (len(unused) == len(names) and difference == 0):
        return Proof("", unused)
    share = difference / max(effect, 1e-30)
    return Proof(f"mixed logits differ from llama.cpp's own by {share:.0%} of what the adapter changes", unused)
