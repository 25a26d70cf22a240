"""A judge's verdicts on the replies of all variants, several asked for at a time, none twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from edgelora.evaluation.answers import Answer, Progress
from edgelora.evaluation.judge import PAIR, TIED, Judge
from edgelora.evaluation.judge_client import QuestionRefusedError
from edgelora.evaluation.rows import EvalRow
from edgelora.evaluation.variants import Variant
from edgelora.evaluation.work_file import WorkFile, digest

JUDGED_AT_ONCE = 4


@dataclass(frozen=True)
class _Case:
    """A reply to be judged, in pairs beside that of the variant's reference: None for the first base itself."""

    variant: Variant
    place: int
    row: EvalRow
    reply: str
    other: str | None

    def is_asked(self, judge: Judge) -> bool:
        """Whether a judge has anything to say: the first base is beside itself in no pair."""
        return judge.mode != PAIR or self.other is not None

    def verdict(self, judge: Judge) -> float | None:
        if judge.mode != PAIR:
            return judge.score(self.row, self.reply)
        return TIED if self.other is None else judge.compare(self.row, self.reply, self.other)

    def key(self, judge: Judge) -> str:
        others = [self.other] if judge.mode == PAIR and self.other is not None else []
        return digest("verdict", judge.key(self.row, self.reply, *others))


def verdicts(
    judge: Judge,
    rows: Sequence[EvalRow],
    variants: Sequence[Variant],
    answers: Mapping[str, Sequence[Answer]],
    work: WorkFile,
    on_progress: Progress,
) -> dict[str, list[Answer]]:
    """The answers, with the judge's verdicts; None where it refused to answer, or its answers could not be read.

    Raises:
        EdgeloraError: it cannot be asked, or refuses everything. The verdicts until then are kept.
    """

    def reply(name: str, place: int) -> str:
        return answers[name][place].reply or ""

    cases = [
        _Case(
            variant,
            place,
            row,
            reply(variant.name, place),
            reply(variant.reference, place) if variant.reference else None,
        )
        for place, row in enumerate(rows)
        for variant in variants
    ]
    found = {name: list(given) for name, given in answers.items()}
    pool = ThreadPoolExecutor(JUDGED_AT_ONCE, thread_name_prefix="edgelora-judge")
    refused: QuestionRefusedError | None = None
    n_heard = 0
    try:
        asked: list[tuple[_Case, str, Future[float | None] | None]] = []
        for case in cases:
            key = case.key(judge)
            asked.append((case, key, None if work.get(key) else pool.submit(case.verdict, judge)))
        for done, (case, key, future) in enumerate(asked, start=1):
            value: float | None = None
            try:
                value = future.result() if future else work.get(key)["verdict"]
            except QuestionRefusedError as error:
                refused = refused or error
            if future and value is not None:
                work.put(key, {"verdict": value})
            n_heard += value is not None and case.is_asked(judge)
            own = found[case.variant.name]
            own[case.place] = replace(own[case.place], verdict=value)
            on_progress(done, len(cases), "judging")
    except BaseException:
        judge.client.stop.set()  # nobody waits for the next try
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if refused and not n_heard:
        raise refused
    return found
