"""What a certificate says and what this device computes, in numbers.

Every number is over the positions that the certificate recorded. P is Hugging Face's distribution of the next token,
Q the device's; both are known on the 64 tokens that are likeliest under P, and the rest is one bucket:

    KL      sum of p * log(p / q) over those 65
    top-1   whether both find the same token likeliest
    greedy  how many tokens of the recorded answer the device would write, too, before it writes another

The adapter's effect is a vector at each position: how it moves the log-probabilities of the tokens that are likeliest
under it, less their mean. Hugging Face's effect and the device's are compared as one long vector each:

    cosine  of the two
    size    length of the device's projected onto Hugging Face's, over the length of that: 1, at half the scale 0.5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgelora.certificate import FLOOR, Probe, TopTokens

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEAST = 1e-12
"""The smallest probability of the bucket for the rest: rounding may leave none."""


@dataclass(frozen=True)
class Observed:
    """A probe on this device.

    Attributes:
        adapter_at, base_at: float64, shape of `probe.adapter.ids`: log-probabilities of these tokens, with the adapter
            and without.
        base_own: float64, shape of `probe.base.ids`: those of the tokens likeliest under Hugging Face's base.
        adapter_best, base_best: int64 (n_tokens,), the likeliest next token at every position.
        base_greedy: int64, the likeliest tokens where the base wrote its own answer.
    """

    adapter_at: Floats
    base_at: Floats
    base_own: Floats
    adapter_best: Ints
    base_best: Ints
    base_greedy: Ints

    @property
    def n_broken(self) -> int:
        """Positions where a log-probability is not a finite number."""
        values = np.concatenate([self.adapter_at, self.base_at, self.base_own], axis=1)
        return int((~np.isfinite(values).all(axis=1)).sum())


@dataclass(frozen=True)
class Agreement:
    """How close the device comes to one of Hugging Face's models; shares are from 0 to 1."""

    kl_mean: float
    kl_p99: float
    top_1: float
    greedy: float
    n_greedy: int
    n_answer: int


@dataclass(frozen=True)
class Effect:
    """The adapter's effect here, against Hugging Face's.

    Attributes:
        length: root mean square of Hugging Face's effect, in nats.
        noise: the same of what quantization does to the base, on the same tokens.
        error: the same of the difference of both effects.
    """

    cosine: float
    size: float
    length: float
    noise: float
    error: float


Pairs = Sequence[tuple[Probe, Observed]]


def base_agreement(pairs: Pairs) -> Agreement:
    """The bare base: what quantization and backend cost."""
    divergences = [_divergence(probe.base, seen.base_own) for probe, seen in pairs]
    best = [seen.base_best[probe.positions] == probe.base.ids[:, 0] for probe, seen in pairs]
    answers = [(np.array(probe.base_continuation), seen.base_greedy) for probe, seen in pairs]
    return _agreement(divergences, best, answers)


def adapter_agreement(pairs: Pairs) -> Agreement:
    """The base with the adapter: what both cost together."""
    divergences = [_divergence(probe.adapter, seen.adapter_at) for probe, seen in pairs]
    best = [seen.adapter_best[probe.positions] == probe.adapter.ids[:, 0] for probe, seen in pairs]
    answers = [(np.array(probe.continuation), seen.adapter_best[len(probe.prompt) - 1 : -1]) for probe, seen in pairs]
    return _agreement(divergences, best, answers)


def _agreement(
    divergences: Sequence[Floats], best: Sequence[npt.NDArray[np.bool_]], answers: Sequence[tuple[Ints, Ints]]
) -> Agreement:
    divergence = np.concatenate(divergences)
    prefix = sum(common_prefix(recorded, written) for recorded, written in answers)
    length = sum(len(recorded) for recorded, _ in answers)
    return Agreement(
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.percentile(divergence, 99)),
        top_1=float(np.concatenate(best).mean()),
        greedy=prefix / length if length else 1.0,
        n_greedy=prefix,
        n_answer=length,
    )


def _divergence(recorded: TopTokens, seen: Floats) -> Floats:
    """KL at every position, float64 (n,), in nats."""
    log_p = recorded.log_probs.astype(np.float64)
    p, rest_p, rest_q = np.exp(log_p), _rest(log_p), _rest(seen)
    inside = (p * (log_p - seen)).sum(axis=1)
    divergence: Floats = np.maximum(inside + rest_p * np.log(rest_p / rest_q), 0.0)
    return divergence


def _rest(log_probs: Floats) -> Floats:
    rest: Floats = np.maximum(1.0 - np.exp(log_probs).sum(axis=1), LEAST)
    return rest


def common_prefix(recorded: Ints, written: Ints) -> int:
    """How many of the first tokens are the same."""
    same = recorded == written[: len(recorded)]
    return len(same) if same.all() else int(same.argmin())


def effect(pairs: Pairs) -> Effect:
    """The adapter's effect; see the module."""
    wanted = np.concatenate([_centred(_shift(probe), probe) for probe, _ in pairs])
    found = np.concatenate([_centred(seen.adapter_at - seen.base_at, probe) for probe, seen in pairs])
    noise = np.concatenate([_centred(seen.base_at - probe.base_at, probe) for probe, seen in pairs])
    product, length = float(wanted @ found), float(np.linalg.norm(wanted))
    both = length * float(np.linalg.norm(found))
    return Effect(
        cosine=product / both if both else 0.0,
        size=product / length**2 if length else 0.0,
        length=_rms(wanted),
        noise=_rms(noise),
        error=_rms(found - wanted),
    )


def _shift(probe: Probe) -> Floats:
    shift: Floats = probe.adapter.log_probs.astype(np.float64) - probe.base_at
    return shift


def _centred(shift: Floats, probe: Probe) -> Floats:
    """Less each position's mean, as one vector; without tokens that the certificate holds as "less than `FLOOR`"."""
    held = np.minimum(probe.adapter.log_probs, probe.base_at) > FLOOR
    counts = np.maximum(held.sum(axis=1, keepdims=True), 1)
    mean = np.where(held, shift, 0.0).sum(axis=1, keepdims=True) / counts
    centred: Floats = (shift - mean)[held]
    return centred


def _rms(values: Floats) -> float:
    return float(np.sqrt((values**2).mean())) if values.size else 0.0
