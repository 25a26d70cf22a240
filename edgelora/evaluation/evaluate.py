"""One evaluation: rows read, every variant asked, judged and measured; what was found is `Evaluation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.engine import Engine
from edgelora.engine.preflight import base_fingerprint
from edgelora.errors import BaseMismatchError, DataFileError, SettingsError
from edgelora.evaluation.answers import Answer, Answers, Needs, Progress
from edgelora.evaluation.bootstrap import RESAMPLES
from edgelora.evaluation.comparison import Measured, measure
from edgelora.evaluation.json_fields import field_shares
from edgelora.evaluation.judge import PAIR, TIED, Judge
from edgelora.evaluation.labels import Confusion, Labels
from edgelora.evaluation.metrics import DIVERGENCES, Metric, judged, make_metrics, own
from edgelora.evaluation.own_function import OwnFunction
from edgelora.evaluation.rows import EvalRow, RowSettings, read_eval_rows
from edgelora.evaluation.settings import EngineSettings
from edgelora.evaluation.thresholds import Threshold, check_names, failures
from edgelora.evaluation.variants import Variant, variants_of
from edgelora.evaluation.verdicts import verdicts
from edgelora.evaluation.work_file import WorkFile, digest
from edgelora.resolution import resolve_files

WORK_FILE = "work.sqlite"


@dataclass(frozen=True)
class EvalSettings:
    """What `edgelora eval` can be told.

    Attributes:
        metrics: as on the command line; empty for those that the rows suggest.
        function: `FILE.py:NAME`.
        thresholds: what the measured values have to keep to.
        resamples: of the bootstrap, drawn by `seed`.
        folder: where results go and work is kept; None keeps nothing.
    """

    rows: RowSettings = field(default_factory=RowSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    metrics: tuple[str, ...] = ()
    function: str | None = None
    judge: Judge | None = None
    thresholds: tuple[Threshold, ...] = ()
    seed: int = 0
    resamples: int = RESAMPLES
    folder: Path | None = None

    def check(self) -> None:
        """Raises:
        SettingsError: numbers out of range.
        """
        if self.resamples < 100:
            raise SettingsError(f"resamples is {self.resamples}, expected 100 or more")


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        answers: variant's name to its answers, one for each row.
        measured: metric's name to variant's name to what was measured.
        confusions: variant's name to its confusion table, where labels were asked for.
        fields: variant's name to the share of rows that have each field right, where JSON fields were asked for.
        failures: thresholds that were not kept, a sentence each.
        n_before: answers that an earlier run had worked out.
    """

    data: str
    rows: Sequence[EvalRow]
    variants: Sequence[Variant]
    metrics: Sequence[Metric]
    answers: Mapping[str, Sequence[Answer]]
    measured: Mapping[str, Mapping[str, Measured]]
    confusions: Mapping[str, Confusion]
    fields: Mapping[str, Mapping[str, float]]
    failures: Sequence[str]
    settings: EvalSettings
    seconds: float
    n_before: int


@dataclass(frozen=True)
class Listeners:
    """Who is told of what happens: answers done, and notices. Neither is called after the run."""

    progress: Progress = lambda done, total, what: None
    notice: Callable[[str], None] = lambda text: None


def evaluate(
    data: Path | str,
    base: Path | None,
    adapters: Sequence[AdapterRef] = (),
    against: Sequence[Path] = (),
    settings: EvalSettings | None = None,
    listeners: Listeners | None = None,
) -> Evaluation:
    """Evaluate a base, adapters on it, and the same on other quantizations.

    Args:
        data: a file of rows.
        base: a GGUF file; None finds the first adapter's.
        adapters: GGUF adapters or PEFT folders.
        against: other quantizations of the base.

    Raises:
        SettingsError: settings that make no sense for these rows and variants; all that can be known is said before
            anything is computed.
        DataFileError: rows that cannot be read, or answered.
        ModelFileError, ConversionError: a base or adapter that cannot be used.
        EdgeloraError: the judge or the function failed. What was worked out is kept.
    """
    settings, listeners, started = settings or EvalSettings(), listeners or Listeners(), time.perf_counter()
    settings.check()
    rows = read_eval_rows(data, settings.rows)
    metrics = _metrics(settings, rows, str(data), has_others=bool(against))
    resolved = [resolve_files(adapters, path, force=settings.engine.force) for path in [base, *against]]
    if resolved[0].base_note:
        listeners.notice(resolved[0].base_note)
    first, *others = [files.base for files in resolved]
    variants = variants_of(first, [adapter.name for adapter in adapters], _quantizations(first, others))
    check_names(settings.thresholds, [metric.name for metric in metrics], variants)
    with _work_file(settings.folder) as work:
        gathered = Answers(rows, variants, _needs(metrics), settings.engine, work, listeners.progress)
        with _resumable(settings.folder):
            for files in resolved:
                with _engine(files.base, files.adapters, settings.engine, work) as engine:
                    for notice in engine.notices:
                        listeners.notice(notice)
                    gathered.gather(files.base, engine)
            answers = gathered.of
            if settings.judge:
                answers = verdicts(settings.judge, rows, variants, answers, work, listeners.progress)
    sums = {metric.name: {name: metric.sums(found, rows) for name, found in answers.items()} for metric in metrics}
    measured = measure(metrics, variants, sums, seed=settings.seed, resamples=settings.resamples)
    return Evaluation(
        str(data),
        rows,
        variants,
        metrics,
        answers,
        measured,
        _confusions(rows, answers) if "accuracy" in measured else {},
        _fields(rows, answers) if "json-fields" in measured else {},
        failures(settings.thresholds, variants, measured),
        settings,
        time.perf_counter() - started,
        gathered.n_before,
    )


def _metrics(settings: EvalSettings, rows: Sequence[EvalRow], path: str, *, has_others: bool) -> list[Metric]:
    alone = not settings.metrics and (settings.function or settings.judge)
    found = [] if alone else make_metrics(settings.metrics, rows)
    if settings.function:
        found.append(own(OwnFunction.load(settings.function), path))
    if settings.judge:
        found.append(judged(settings.judge.metric, tied=TIED if settings.judge.mode == PAIR else None))
    if has_others and any(metric.looks_at == "likelihood" for metric in found):
        found += DIVERGENCES
    names = [metric.name for metric in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"two metrics are called {', '.join(twice)}", hint="Give your function another name.")
    return found


def _needs(metrics: Sequence[Metric]) -> Needs:
    looked_at = {metric.looks_at for metric in metrics}
    return Needs(
        replies=bool(looked_at & {"reply", "judge"}),
        likelihoods="likelihood" in looked_at,
        divergences="divergence" in looked_at,
    )


def _quantizations(first: Path, others: Sequence[Path]) -> Sequence[Path]:
    """`others`, if they are quantizations of the first base.

    Raises:
        SettingsError: a file that is evaluated already.
        BaseMismatchError: another model.
    """
    seen = [first.resolve()]
    for other in others:
        if other.resolve() in seen:
            raise SettingsError(f"--against {other}: evaluated already", hint="Name another quantization of the base.")
        seen.append(other.resolve())
        if base_fingerprint(other) != base_fingerprint(first):
            raise BaseMismatchError(
                f"--against {other} is no quantization of {first}: it is another model, or was trained further",
                hint="Evaluate each by itself with --base, and compare their results.",
            )
    return others


@contextmanager
def _work_file(folder: Path | None) -> Iterator[WorkFile]:
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataFileError(
                f"{folder}: cannot be made ({error.strerror})", hint="Name another folder with -o."
            ) from None
    with WorkFile(folder / WORK_FILE if folder else None) as work:
        yield work


@contextmanager
def _resumable(folder: Path | None) -> Iterator[None]:
    """Ctrl-C says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"What was worked out is in {folder}; run the same command to go on" if folder else ""
        raise KeyboardInterrupt(kept) from None


@contextmanager
def _engine(base: Path, adapters: Sequence[AdapterRef], settings: EngineSettings, work: WorkFile) -> Iterator[Engine]:
    """An engine that decodes as many rows at a time as in the run before: another number rounds otherwise."""
    key = digest("parallel", str(base.resolve()))
    with settings.open(base, adapters, work.get(key)) as engine:
        work.put(key, engine.parallel)
        yield engine


def _confusions(rows: Sequence[EvalRow], answers: Mapping[str, Sequence[Answer]]) -> dict[str, Confusion]:
    labels = Labels([row.reference for row in rows])
    return {name: Confusion.of(labels, _pairs(rows, given)) for name, given in answers.items()}


def _fields(rows: Sequence[EvalRow], answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, float]]:
    return {
        name: field_shares((reply, reference) for reference, reply in _pairs(rows, given))
        for name, given in answers.items()
    }


def _pairs(rows: Sequence[EvalRow], answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(reference, reply) of every row."""
    return [(row.reference, answer.reply or "") for row, answer in zip(rows, answers, strict=True)]
