"""What another quantization changes in the distribution of the next token, at every token of the references.

P is the first base's distribution, Q the other's, each under teacher forcing. Both are known on the `TOP` tokens that
are likeliest under P, and the rest is one bucket, so that

    KL      sum of p * log(p / q) over those buckets, in nats: at most the divergence over the whole vocabulary
    top-1   whether both find the same token likeliest

as `edgelora verify` has them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelora.engine.scoring import Floats, ReplyScore

TOP = 64
LEAST = 1e-12
"""The smallest probability of the bucket for the rest: rounding may leave none."""


@dataclass(frozen=True)
class Divergence:
    """Over the tokens of one reply: sums, and how many there are."""

    kl: float
    same_best: int
    n_tokens: int

    @classmethod
    def between(cls, first: ReplyScore, other: ReplyScore) -> Divergence:
        """Args:
        first: with `top`.
        other: of the same tokens, `at` the first one's likeliest.
        """
        assert first.top is not None
        assert other.at is not None
        kl = divergences(first.top.log_probs, other.at)
        return cls(float(kl.sum()), int((first.best == other.best).sum()), len(first.tokens))


def divergences(log_p: Floats, log_q: Floats) -> Floats:
    """KL at each place, float64 (n,); log-probabilities of the same tokens, float64 (n, k)."""
    p = np.exp(log_p)
    rest_p, rest_q = (np.maximum(1.0 - np.exp(log).sum(axis=1), LEAST) for log in (log_p, log_q))
    kl: Floats = np.maximum((p * (log_p - log_q)).sum(axis=1) + rest_p * np.log(rest_p / rest_q), 0.0)
    return kl
