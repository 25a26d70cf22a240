"""A certificate's probes, read by this device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgelora.certificate import Probe
from edgelora.engine.replay import Logits, Replay
from edgelora.verification.comparison import Floats, Ints, Observed

ROWS_AT_ONCE = 16
"""Rows of logits turned into probabilities at a time: 10 MiB of float32 for a vocabulary of 152,000."""


def observe(replay: Replay, probe: Probe) -> Observed:
    """The probe with the adapter and without; and the base on its own answer.

    Raises:
        Interrupted, EdgeloraError: see `Replay.logits`.
    """
    adapter_best, (adapter_at,) = _read(replay, probe.tokens, probe, [probe.adapter.ids], adapted=True)
    own = [probe.adapter.ids, probe.base.ids]
    base_best, (base_at, base_own) = _read(replay, probe.tokens, probe, own, adapted=False)
    answered, _ = _read(replay, probe.prompt + probe.base_continuation, probe, [], adapted=False)
    return Observed(adapter_at, base_at, base_own, adapter_best, base_best, answered[len(probe.prompt) - 1 : -1])


def _read(
    replay: Replay, tokens: Sequence[int], probe: Probe, asked: Sequence[npt.NDArray[np.int32]], *, adapted: bool
) -> tuple[Ints, list[Floats]]:
    """The likeliest token at every position, and at the probe's the log-probabilities of the tokens in `asked`."""
    best = np.empty(len(tokens), np.int64)
    found = [np.empty(ids.shape, np.float64) for ids in asked]
    for start, logits in replay.logits(tokens, adapted=adapted):
        best[start : start + len(logits)] = logits.argmax(axis=1)
        inside = (probe.positions >= start) & (probe.positions < start + len(logits))
        for at in _pieces(np.flatnonzero(inside)) if asked else ():
            rows, log_sums = _normalized(logits[probe.positions[at] - start])
            for values, ids in zip(found, asked, strict=True):
                values[at] = np.take_along_axis(rows, ids[at].astype(np.int64), axis=1) - log_sums
    return best, found


def _pieces(at: Ints) -> Iterator[Ints]:
    return (at[start : start + ROWS_AT_ONCE] for start in range(0, len(at), ROWS_AT_ONCE))


def _normalized(logits: Logits) -> tuple[Floats, Floats]:
    """Logits less the highest of their row, and the logarithm of the sum of their exponentials (n, 1)."""
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is counted later
        rows = logits.astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        return rows, np.log(np.exp(rows).sum(axis=1, keepdims=True))
