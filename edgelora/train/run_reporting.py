"""A run's facts gathered while it runs, and its page written when it ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from edgelora.certificate import decode
from edgelora.contract import Contract
from edgelora.errors import EdgeloraError
from edgelora.train import ranks
from edgelora.train.base import Placement
from edgelora.train.data import IGNORED
from edgelora.train.job import Job, Notes, Prepared
from edgelora.train.memory_plan import memory_plan
from edgelora.train.peak_memory import memory_now
from edgelora.train.plan import steps_of
from edgelora.train.report import write_report
from edgelora.train.row_lengths import lengths
from edgelora.train.run_facts import RunFacts, Sample, length_bins

N_SAMPLES = 4


def facts_of(job: Job, prepared: Prepared, place: Placement) -> RunFacts:
    """What is known before the base is loaded."""
    found, sequences = lengths(prepared.rows), prepared.rows.token_rows()
    return RunFacts(
        rows=len(found),
        eval_rows=len(prepared.eval_rows.rows) if prepared.eval_rows else 0,
        tokens=sum(found),
        trained_tokens=sum(label != IGNORED for row in sequences for label in row.labels),
        lengths=length_bins(found),
        steps=steps_of(job.recipe, len(found), ranks.world_size()),
        plan=_plan(job, prepared, place, found),
    )


def _plan(job: Job, prepared: Prepared, place: Placement, found: Sequence[int]) -> dict[str, Any]:
    """Bytes by part; empty for a model that cannot be reckoned with, which is no reason not to train it."""
    libraries = 0 if place.device == "cuda" else memory_now(place.device)
    try:
        memory = memory_plan(job.base, job.recipe, prepared.found, max(found), padded=len({*found}) > 1)
    except EdgeloraError:
        raise  # which the run would come to as well
    except Exception:  # of whatever code a model has, on tensors without values
        return {}
    return {**asdict(memory), "training": memory.training, "libraries": libraries}


@contextmanager
def reporting(job: Job, prepared: Prepared, facts: RunFacts, said: Notes) -> Iterator[None]:
    """Write `report.json` and `report.html` when the block ends, well or not."""
    folder = job.run.path
    facts.save(folder)
    try:
        yield
    finally:
        try:
            ended = replace(facts, notes=tuple(said.kept), **_ended(job, prepared))
            ended.save(folder)
            write_report(folder)
        except (EdgeloraError, OSError) as error:  # what was trained is worth more than a page about it
            said.keep(f"no report: {error}")


def _ended(job: Job, prepared: Prepared) -> dict[str, Any]:
    """What only a finished run has; its figures are in its contract."""
    contract = Contract.load(job.run.path) if job.run.finished else None
    if contract is None:
        return {}
    from edgelora.train.progress import SUMMARY

    report = {name: contract.training[name] for name in SUMMARY if name in contract.training}
    return {"report": report, "samples": _samples(contract, prepared.tokenizer) if contract.certificate else ()}


def _samples(contract: Contract, tokenizer: Any) -> tuple[Sample, ...]:
    """The greedy answers that the certificate holds, of the base and of what was trained."""
    return tuple(
        Sample(
            "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in probe.messages),
            tokenizer.decode(probe.base_continuation, skip_special_tokens=True),
            tokenizer.decode(probe.continuation, skip_special_tokens=True),
        )
        for probe in decode(contract.certificate).probes[:N_SAMPLES]
    )
