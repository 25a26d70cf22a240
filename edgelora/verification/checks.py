"""From what was measured to rows of the report: each function judges one thing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgelora.certificate import Certificate
from edgelora.engine.coverage import Coverage
from edgelora.verification.comparison import Agreement, Effect, Pairs, adapter_agreement, base_agreement, effect
from edgelora.verification.report import Check, Outcome, Part
from edgelora.verification.thresholds import Thresholds
from edgelora.verification.weights import WeightComparison

SHOWN_TENSORS = 3
LEAST_EFFECT = 1e-3
"""Root mean square, in nats: an adapter that moves the output less has no direction to compare."""
EFFECT_ROUNDING = 0.02
"""Of the effect's length: what an adapter's own storage type may cost, on a base without noise."""
LEAST_ERROR = 0.005
"""Root mean square, in nats: F16 KV alone costs 0.003."""
LEAST_KL = 0.01
"""Mean KL that a backend may cost on a base without noise, in nats: F16 KV alone costs 0.0001."""
APPROXIMATION_SLACK = 3.0
"""How far a sample of an approximated weight may lie beyond the error that the converter states: sixteen numbers."""

# Names of the checks that need a certificate, with their parts and titles.
CERTIFIED: Mapping[str, tuple[Part, str]] = {
    "template": ("file", "chat template"),
    "tokens": ("file", "token ids of the probes"),
    "weights": ("adapter", "weights as trained"),
    "effect": ("adapter", "effect on the output, error"),
    "cosine": ("adapter", "effect on the output, cosine"),
    "size": ("adapter", "effect on the output, size"),
    "kl": ("quantization", "KL per token, mean"),
    "kl_p99": ("quantization", "KL per token, 99th percentile"),
    "top_1": ("quantization", "same likeliest token"),
    "greedy": ("quantization", "greedy answers, same beginning"),
    "adapter_kl": ("together", "KL per token, mean"),
    "adapter_kl_p99": ("together", "KL per token, 99th percentile"),
    "adapter_top_1": ("together", "same likeliest token"),
    "adapter_greedy": ("together", "greedy answers, same beginning"),
}


def verdict(ok: bool) -> Outcome:
    return "ok" if ok else "FAIL"


def certified(
    name: str, value: str, limit: str, outcome: Outcome, *, note: str = "", number: float | None = None
) -> Check:
    part, title = CERTIFIED[name]
    return Check(part, name, title, value, limit, outcome, note, number)


def not_checked(why: str, without: Sequence[str] = ()) -> list[Check]:
    """Rows of what needs a certificate, but those in `without`."""
    return [certified(name, "", "", "not checked", note=why) for name in CERTIFIED if name not in without]


def fingerprint_check(wanted: str, found: str) -> Check:
    title = "fingerprint of the base"
    if not wanted:
        why = "the adapter does not say which base it wants"
        return Check("file", "fingerprint", title, found[:12], "", "not checked", why)
    return Check("file", "fingerprint", title, found[:12], wanted[:12], verdict(found == wanted))


def golden_check(made: Sequence[int], wanted: Sequence[int]) -> Check:
    same = list(made) == list(wanted)
    note = "" if same else parting(made, wanted)
    value = f"{len(made)} ids"
    return Check("file", "golden", "token ids of the contract", value, f"{len(wanted)} ids, equal", verdict(same), note)


def template_check(certificate: Certificate, found_sha256: str, base_fingerprint: str) -> Check:
    same, same_base = found_sha256 == certificate.template_sha256, base_fingerprint == certificate.base_fingerprint
    note = "" if same_base else f"the certificate is of another base ({certificate.base_fingerprint[:12]})"
    value, limit = found_sha256[:12], certificate.template_sha256[:12]
    return certified("template", value, limit, verdict(same and same_base), note=note)


def tokens_check(certificate: Certificate, made: Sequence[Sequence[int] | str], n_vocab: int) -> Check:
    """`made`: ids of each probe's messages here, or why there are none."""
    problems = []
    for number, (probe, ids) in enumerate(zip(certificate.probes, made, strict=True), start=1):
        if isinstance(ids, str):
            problems.append(f"probe {number}: {ids}")
        elif list(ids) != list(probe.prompt):
            problems.append(f"probe {number}: {parting(ids, probe.prompt)}")
    total, wrong = len(certificate.probes), len(problems)
    if n_vocab != certificate.n_vocab:
        problems.insert(0, f"{n_vocab} tokens here, {certificate.n_vocab} in training")
    value, limit = f"{total - wrong} of {total} probes equal", "all"
    note = "; ".join(problems[:1]) + (f"; and {len(problems) - 1} more" if len(problems) > 1 else "")
    return certified("tokens", value, limit, verdict(not problems), note=note)


def parting(made: Sequence[int], wanted: Sequence[int]) -> str:
    """Where two rows of ids part."""
    at = next((i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted)))
    return f"ids part at {at}: here {list(made[at : at + 3])}, in training {list(wanted[at : at + 3])}"


def coverage_check(coverage: Coverage) -> Check:
    unused = coverage.unused
    value, ok = f"{len(coverage.applied)} of {coverage.total} tensors", verdict(not unused)
    note = f"never computed with: {_some(unused)}" if unused else ""
    return Check("adapter", "coverage", "applied in the graph", value, "all", ok, note, float(len(unused)))


def weights_check(
    certificate: Certificate, found: WeightComparison, thresholds: Thresholds, exactness: Mapping[str, Any]
) -> Check:
    """The farthest weight; an approximation may be as far off as its converter says, and a little more."""
    tensor, error = found.worst
    stated = exactness.get("max_error")
    slack = APPROXIMATION_SLACK * stated if isinstance(stated, float) and math.isfinite(stated) else 0.0
    limit = max(thresholds.max_weight_error, slack)
    far = [name for name, value in found.errors.items() if not value <= limit]
    problems = [f"off: {_some(far)}"] if far else []
    problems += [f"not in this base: {_some(found.unplaced)}"] if found.unplaced else []
    if found.unexplained and not certificate.n_unsampled:
        problems.append(f"not trained: {_some(found.unexplained)}")
    partly = f"{certificate.n_unsampled} modules have no sample" if certificate.n_unsampled else f"farthest: {tensor}"
    value, note = f"{error:.4f} off, of {len(found.errors)} weights", "; ".join(problems)
    return certified("weights", value, f"at most {limit:.2f}", verdict(not problems), note=note or partly, number=error)


def measured_checks(pairs: Pairs, thresholds: Thresholds, *, is_repaired: bool = False) -> Iterator[Check]:
    """Everything that logits say.

    Args:
        is_repaired: the adapter also takes away some of what quantization did, so that its effect here is another.
    """
    base, together = base_agreement(pairs), adapter_agreement(pairs)
    if is_repaired:
        why = "the adapter repairs its base, too"
        yield from (certified(name, "", "", "not checked", note=why) for name in ("effect", "cosine", "size"))
    else:
        yield from _effect_checks(effect(pairs), thresholds)
    yield from _agreement_checks("", base, _base_limits(thresholds))
    yield from _agreement_checks("adapter_", together, _together_limits(base, thresholds))


def _effect_checks(found: Effect, thresholds: Thresholds) -> Iterator[Check]:
    noise, rounding = thresholds.max_effect_error * found.noise, EFFECT_ROUNDING * found.length
    allowed = math.hypot(noise, rounding, LEAST_ERROR)
    if found.length < LEAST_EFFECT:
        why = f"it moves the output by {found.length:.1g} nats only"
        yield certified(
            "effect", f"{found.error:.4f}", f"{allowed:.4f}", verdict(found.error <= allowed + LEAST_EFFECT)
        )
        yield from (certified(name, "", "", "not checked", note=why) for name in ("cosine", "size"))
        return
    relative = allowed / found.length
    note = f"noise of the base {found.noise:.3f}, effect {found.length:.3f}"
    ok = verdict(found.error <= allowed)
    yield certified("effect", f"{found.error:.3f}", f"at most {allowed:.3f}", ok, note=note, number=found.error)
    least = 1 / math.hypot(1.0, relative)
    yield certified(
        "cosine", f"{found.cosine:.4f}", f"{least:.4f} or more", verdict(found.cosine >= least), number=found.cosine
    )
    low, high = max(0.0, 1 - relative), 1 + relative
    inside = verdict(low <= found.size <= high)
    yield certified("size", f"{found.size:.3f}", f"{low:.3f} to {high:.3f}", inside, number=found.size)


Limits = tuple[float | None, float | None, float | None, float | None]
"""Of mean KL, its 99th percentile, top-1 and greedy; None where a value is only shown."""


def _base_limits(thresholds: Thresholds) -> Limits:
    return thresholds.max_kl, thresholds.max_kl_p99, thresholds.min_top_1, None


def _together_limits(base: Agreement, thresholds: Thresholds) -> Limits:
    kl = max(thresholds.max_kl_growth * base.kl_mean, LEAST_KL)
    return kl, None, max(0.0, base.top_1 - thresholds.max_top_1_loss), thresholds.min_greedy or None


def _agreement_checks(prefix: str, found: Agreement, limits: Limits) -> Iterator[Check]:
    kl, kl_p99, top_1, greedy = limits
    answer = f"{found.n_greedy} of {found.n_answer} tokens"
    yield _at_most(f"{prefix}kl", found.kl_mean, kl)
    yield _at_most(f"{prefix}kl_p99", found.kl_p99, kl_p99)
    yield _at_least(f"{prefix}top_1", found.top_1, f"{found.top_1:.1%}", top_1)
    yield _at_least(f"{prefix}greedy", found.greedy, answer, greedy)


def _at_most(name: str, value: float, limit: float | None) -> Check:
    outcome: Outcome = "shown" if limit is None else verdict(value <= limit)
    return certified(name, f"{value:.4f}", "" if limit is None else f"at most {limit:.3g}", outcome, number=value)


def _at_least(name: str, value: float, words: str, limit: float | None) -> Check:
    outcome: Outcome = "shown" if limit is None else verdict(value >= limit)
    return certified(name, words, "" if limit is None else f"{limit:.1%} or more", outcome, number=value)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN_TENSORS
    return ", ".join(names[:SHOWN_TENSORS]) + (f" and {rest} more" if rest > 0 else "")
