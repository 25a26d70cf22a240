"""Every variant's answers to every row: replies through mixed batches, likelihoods of references, nothing twice.

Replies are greedy by default, and each depends on its row alone (`Request.deterministic` in an engine that is
`reproducible`): so what an interrupted run has worked out is what an uninterrupted one would have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgelora.engine.devices import backend_name
from edgelora.engine.engine import BATCH_WINDOW, Engine, Request, Stream
from edgelora.engine.scoring import ReplyScore, Wanted
from edgelora.entry import content_of
from edgelora.errors import ContextOverflowError, DataFileError, EdgeloraError, ModelFileError, SettingsError
from edgelora.evaluation.divergence import TOP, Divergence
from edgelora.evaluation.rows import EvalRow
from edgelora.evaluation.settings import EngineSettings
from edgelora.evaluation.variants import Variant
from edgelora.evaluation.work_file import WorkFile, digest
from edgelora.rows import listed_problems

TOO_LONG = "Leave such rows out, or ask for a larger window: --ctx-size."
"""Of a row that does not fit; the engine's own advice has options of other commands."""
ROW_ERRORS = (ContextOverflowError, SettingsError, ModelFileError)
Progress = Callable[[int, int, str], None]
"""Called with answers done, answers in all, and what is being done."""


@dataclass(frozen=True)
class Answer:
    """What one variant makes of one row; what was not asked for is None.

    Attributes:
        reply: its text.
        finish_reason: as `Completion.finish_reason`; "length" is a reply that was cut.
        loss: -log p of the reference, in nats; `n_tokens` are its tokens.
        divergence: from the reference variant, of one on another quantization.
        verdict: the judge's.
    """

    reply: str | None = None
    finish_reason: str = ""
    loss: float | None = None
    n_tokens: int = 0
    divergence: Divergence | None = None
    verdict: float | None = None


@dataclass(frozen=True)
class Needs:
    """What the metrics look at."""

    replies: bool = True
    likelihoods: bool = True
    divergences: bool = False


@dataclass(frozen=True)
class _Job:
    """A variant that is to answer a row, and what its answer is known by.

    Attributes:
        place: of the row, 0-based.
        identity: hash of all that the variant's answers depend on, beside the row.
    """

    variant: Variant
    place: int
    row: EvalRow
    identity: str

    @property
    def request(self) -> Request:
        return Request(self.row.messages, self.variant.adapter, tools=self.row.tools or None)

    def key(self, kind: str, *more: Any) -> str:
        """Of a result in the work file."""
        return digest(kind, self.identity, self.row.messages, self.row.tools, *more)


class Answers:
    """The answers of all variants, a base at a time.

    Args:
        on_progress: see `Progress`.

    Attributes:
        of: variant's name to its answers, one for each row.
        n_before: answers that an earlier run had worked out.
    """

    def __init__(
        self,
        rows: Sequence[EvalRow],
        variants: Sequence[Variant],
        needs: Needs,
        settings: EngineSettings,
        work: WorkFile,
        on_progress: Progress,
    ) -> None:
        self._rows, self._variants, self._needs = rows, variants, needs
        self._sampling, self._work, self._on_progress = settings.asked, work, on_progress
        self._contents = {base: content_of(base) for base in {variant.base for variant in variants}}
        self._identities: dict[str, str] = {}
        self._tops: dict[tuple[str, int], ReplyScore] = {}
        self._done = self.n_before = 0
        self._total = len(rows) * len(variants) * (needs.replies + needs.likelihoods)
        self.of: dict[str, list[Answer]] = {variant.name: [Answer() for _ in rows] for variant in variants}

    def gather(self, base: Path, engine: Engine) -> None:
        """Let the engine answer as every variant on its base; the first base comes first.

        Raises:
            DataFileError: rows that cannot be answered; the others are, and what was worked out is kept.
            EdgeloraError: the engine cannot go on.
        """
        variants = [variant for variant in self._variants if variant.base == base]
        self._identities |= {variant.name: self._identity(engine, variant) for variant in variants}
        jobs = [
            _Job(variant, place, row, self._identities[variant.name])
            for place, row in enumerate(self._rows)
            for variant in variants
        ]
        problems: dict[int, EdgeloraError] = {}
        if self._needs.replies:
            self._reply(engine, jobs, problems)
        if self._needs.likelihoods:
            self._score(engine, jobs, problems)
        if problems:
            raise _unanswered({self._rows[place].line: problems[place] for place in sorted(problems)}, len(self._rows))

    def _identity(self, engine: Engine, variant: Variant) -> str:
        adapter = engine.adapter(variant.adapter)
        how = [engine.template_source, engine.kv_type, engine.n_ctx, engine.deterministic_rows, backend_name()]
        return digest(self._contents[variant.base], adapter.content_hash, adapter.scale, *how)

    def _reply(self, engine: Engine, jobs: Sequence[_Job], problems: dict[int, EdgeloraError]) -> None:
        """Replies to all rows, many of them under way at a time."""
        waiting: deque[tuple[_Job, str, Stream]] = deque()
        most = max(BATCH_WINDOW, 2 * engine.parallel)
        for job in jobs:
            key = job.key("reply", self._sampling)
            if found := self._work.get(key):
                self._take(job, **found)
                self.n_before += 1
                continue
            while len(waiting) >= most:
                self._finish(*waiting.popleft(), problems)
            asked = replace(job.request, sampling=self._sampling, deterministic=True)
            waiting.append((job, key, engine.submit(asked)))
        while waiting:
            self._finish(*waiting.popleft(), problems)

    def _finish(self, job: _Job, key: str, stream: Stream, problems: dict[int, EdgeloraError]) -> None:
        try:
            completion = stream.completion
        except ROW_ERRORS as error:
            problems.setdefault(job.place, error)
            return
        found = {"reply": completion.text, "finish_reason": completion.finish_reason}
        self._work.put(key, found)
        self._take(job, **found)

    def _score(self, engine: Engine, jobs: Sequence[_Job], problems: dict[int, EdgeloraError]) -> None:
        """Likelihoods of all references."""
        for job in jobs:
            key = job.key("loss", job.row.reference)
            found = self._work.get(key)
            try:
                if found is None or any(self._work.get(each) is None for each in self._compared_with(job)):
                    found = self._scored(engine, job)
                    self._work.put(key, found)
                else:
                    self.n_before += 1
            except ROW_ERRORS as error:
                problems.setdefault(job.place, error)
                continue
            self._take(job, **found, divergence=self._divergence(job))

    def _scored(self, engine: Engine, job: _Job) -> Mapping[str, Any]:
        """Let the engine score a row; what other quantizations are compared with is kept in memory until they are."""
        pairs = self._compared_with(job)
        first = self._tops.get((job.variant.reference, job.place)) if job.variant.is_requantized else None
        wanted = Wanted(
            top=TOP if pairs and not job.variant.is_requantized else 0,
            at=first.top.ids if first and first.top else None,
        )
        score = engine.score(job.request, job.row.reference, wanted)
        if wanted.top:
            self._tops[job.variant.name, job.place] = score
        if first:
            self._work.put(pairs[0], asdict(Divergence.between(first, score)))
        return {"loss": float(score.losses.sum()), "n_tokens": len(score.tokens)}

    def _compared_with(self, job: _Job) -> list[str]:
        """Keys of the divergences that a row's distributions are for: from the reference, or of all that have this one
        as theirs."""
        if not self._needs.divergences:
            return []
        variant = job.variant
        others = [variant] if variant.is_requantized else self._requantized_from(variant)
        first = self._identities[variant.reference if variant.is_requantized else variant.name]
        said = job.row.messages, job.row.tools, job.row.reference
        return [digest("divergence", first, self._contents[other.base], *said) for other in others]

    def _requantized_from(self, variant: Variant) -> list[Variant]:
        return [each for each in self._variants if each.is_requantized and each.reference == variant.name]

    def _divergence(self, job: _Job) -> Divergence | None:
        if not (self._needs.divergences and job.variant.is_requantized):
            return None
        return Divergence(**self._work.get(self._compared_with(job)[0]))

    def _take(self, job: _Job, **found: Any) -> None:
        answers = self.of[job.variant.name]
        answers[job.place] = replace(answers[job.place], **found)
        self._done += 1
        self._on_progress(self._done, self._total, job.variant.name)


def _unanswered(problems: Mapping[int, EdgeloraError], n_rows: int) -> EdgeloraError:
    """What is wrong with rows, by line; or with all of them at once."""
    first = next(iter(problems.values()))
    hint = TOO_LONG if isinstance(first, ContextOverflowError) else first.hint or "Leave them out."
    if len(problems) == n_rows and all(error.message == first.message for error in problems.values()):
        return type(first)(first.message, hint=hint)
    said = [f"line {line}: {error.message}" for line, error in problems.items()]
    return DataFileError(f"{len(said)} rows cannot be answered:\n{listed_problems(said, 'rows')}", hint=hint)
