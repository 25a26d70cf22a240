"""A training run from a data file to an adapter folder, in the order in which things can go wrong.

What is quick to check comes first: the folder, the data, the base; torch and its friends take seconds to import and a
base can take minutes to load.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.contract import Contract
from edgelora.dataset import read_conversations
from edgelora.errors import DataFileError, EdgeloraError, SettingsError
from edgelora.messages import Conversation
from edgelora.train.base import Base, Placement, find_base, placement
from edgelora.train.extra import require_extra
from edgelora.train.folder import RunFolder, RunRecord, file_sha256
from edgelora.train.methods import method_named
from edgelora.train.progress import SUMMARY, SilentProgress, TrainProgress, TrainReport, TrainStatus
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.data import TokenRows
    from edgelora.train.library_log import LibraryLog
    from edgelora.train.trainer import AdapterTrainer, RunCallback


def train(
    data: Path,
    base: str,
    output: Path,
    recipe: Recipe,
    *,
    eval_data: Path | None = None,
    resume: bool = False,
    progress: TrainProgress | None = None,
) -> TrainReport:
    """Fine-tune an adapter for `base` on the conversations in `data`, and leave it in `output`.

    Args:
        data, eval_data: JSONL files of `messages`, or of `prompt` and `completion`.
        base: a Hugging Face folder or a hub id.
        output: see `edgelora.train.folder` for what is in it. A new run wants it empty, not there yet, or holding a run
            that never reached a checkpoint.
        resume: go on from the last whole checkpoint in `output`, with the same result as without the break; with no
            checkpoint there, begin; where the adapter is finished, report it.

    Raises:
        MissingExtraError: the packages of the extra `train` are not installed.
        SettingsError: the folder is taken or in use, or the run in it has another recipe, base or data.
        DataFileError: the data cannot be read, or the chat template refuses it.
        ModelFileError: the base cannot be found or loaded, or its template shows no assistant text.
        EdgeloraError: the loss is not a number any more, or memory or disk are full.
        KeyboardInterrupt: Ctrl-C; its argument says what is kept: the first lets the step at hand end and saves it.
    """
    began = time.monotonic()
    require_extra("training")
    said = _Notes(progress or SilentProgress())
    run = RunFolder(output)
    if not resume:
        run.refuse_if_taken()
    from edgelora.train.library_log import library_log

    job = _Job(_conversations(data), _conversations(eval_data) if eval_data else [], find_base(base), recipe, run)
    # OpenMP threads that wait by spinning starve each other on a busy machine (2 threads, a tiny model: 2.5 steps/s
    # spinning, 14.7 asleep). It counts only if torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    said.note("loading the training libraries")
    with run.locked(), library_log() as log, _memory_errors():
        return _train(job, _record(job, data, eval_data), resume, said, log, began)


@dataclass(frozen=True)
class _Job:
    """What to train, on what, and where to."""

    conversations: Sequence[Conversation]
    eval_conversations: Sequence[Conversation]
    base: Base
    recipe: Recipe
    run: RunFolder


@dataclass(frozen=True)
class _Prepared:
    """A job's rows as tokens, and the contract they will be served under."""

    tokenizer: Any
    rows: TokenRows
    eval_rows: TokenRows | None
    contract: Contract


class _Notes:
    """Passes progress on and keeps the notes for the report."""

    def __init__(self, progress: TrainProgress) -> None:
        self.progress = progress
        self.kept: list[str] = []

    def note(self, text: str) -> None:
        self.progress.note(text)

    def keep(self, text: str) -> None:
        self.kept.append(text)
        self.progress.note(text)

    def update(self, status: TrainStatus) -> None:
        self.progress.update(status)


def _train(job: _Job, record: RunRecord, resume: bool, said: _Notes, log: LibraryLog, began: float) -> TrainReport:
    place = placement(job.recipe)
    prepared = _prepare(job, record.base_fingerprint, said)
    template_sha256 = hashlib.sha256(prepared.contract.chat_template.encode()).hexdigest()
    record = replace(record, template_sha256=template_sha256, dtype=place.dtype_name)
    finished, checkpoint = _open(job, record, resume, said)
    log.write_to(job.run.log_path)
    if finished is not None:
        return _report_of(job, record, finished, said)
    said.note(f"loading {job.base.name} ({place.dtype_name}, {place.device})")
    said.note(method_named(job.recipe.method).outcome)
    trainer, callback = _trainer(job, prepared, place, said)
    with _saying_what_is_kept(trainer):
        _fit(trainer, callback, checkpoint)
        report = _report(job, record, prepared, trainer, callback, said, began)
        _save_adapter(job, trainer.model, prepared, record, report, said)
    return replace(report, notes=tuple(said.kept))


def _conversations(path: Path) -> list[Conversation]:
    if str(path) == "-":
        raise DataFileError(
            "training data is read again on --resume and cannot come from standard input",
            hint="Save it to a file first.",
        )
    return read_conversations(path)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say what helps when a GPU's memory is full."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise EdgeloraError(
            f"out of memory: {str(error).splitlines()[0]}",
            hint="Lower --batch-size and raise --gradient-accumulation by as much, lower --max-length, or add "
            "--gradient-checkpointing.",
        ) from error


def _record(job: _Job, data: Path, eval_data: Path | None) -> RunRecord:
    from importlib.metadata import version

    from converters.fingerprint import fingerprint

    return RunRecord(
        recipe=job.recipe.to_dict(),
        base=job.base.reference,
        base_fingerprint=fingerprint(job.base.path),
        data_sha256=file_sha256(data),
        eval_sha256=file_sha256(eval_data),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    )


def _prepare(job: _Job, fingerprint: str, said: _Notes) -> _Prepared:
    from edgelora.template import ChatTemplate
    from edgelora.train.contract import contract_of_run
    from edgelora.train.data import finder_for, tokenize_conversations
    from edgelora.train.passages import chosen_template

    tokenizer = job.base.load_tokenizer()
    everything = [*job.conversations, *job.eval_conversations]
    source = chosen_template(
        job.recipe.chat_template, tokenizer.chat_template, chat_needed=any(c.templated for c in everything)
    )
    finder = finder_for(tokenizer, ChatTemplate(source))
    contract = contract_of_run(job.base, fingerprint, tokenizer, finder, job.conversations)
    both = (("training data", job.conversations), ("evaluation data", job.eval_conversations))
    rows = {}
    for name, conversations in both:
        if conversations:
            rows[name] = tokenize_conversations(conversations, tokenizer, finder, job.recipe.max_length)
            for note in rows[name].notes(name, job.recipe.max_length):
                said.keep(note)
    return _Prepared(tokenizer, rows["training data"], rows.get("evaluation data"), contract)


def _open(job: _Job, record: RunRecord, resume: bool, said: _Notes) -> tuple[Contract | None, Path | None]:
    """Begin in the run's folder or go on in it: the contract if it is finished, the checkpoint to go on from."""
    run = job.run
    if resume and run.record_path.is_file():
        started = run.load_record()
        _refuse_other_run(started, record, job)
        if run.finished and (contract := Contract.load(run.path)) is not None:
            said.keep("already finished: nothing to do")
            return contract, None
        if (step := max(run.checkpoint_steps(), default=0)) > 0:
            run.go_on(step)
            said.keep(f"going on after step {step}")
            if changes := started.library_changes(record):
                said.keep(f"not the libraries that the run began with: {', '.join(changes)}")
            return None, run.checkpoint(step)
    run.refuse_if_taken()
    run.begin(record)
    return None, None


def _refuse_other_run(started: RunRecord, now: RunRecord, job: _Job) -> None:
    if differences := started.differences(now, job.recipe):
        raise SettingsError(
            f"{job.run.path}: the run there was started otherwise: {'; '.join(differences)}",
            hint="Give the settings it was started with (see run.json there), or another folder with -o.",
        )


def _trainer(job: _Job, prepared: _Prepared, place: Placement, said: _Notes) -> tuple[AdapterTrainer, RunCallback]:
    from edgelora.train.trainer import build_trainer, rank_notes

    model = job.base.load_model(place)
    trainer, callback = build_trainer(
        model, prepared.tokenizer, prepared.rows, prepared.eval_rows, job.recipe, place, job.run, said
    )
    for note in rank_notes(trainer.model, job.recipe):
        said.keep(note)
    return trainer, callback


@contextmanager
def _saying_what_is_kept(trainer: AdapterTrainer) -> Iterator[None]:
    """Give an interrupt its text, wherever between the first step and the saved adapter it comes."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(trainer)) from None


def _fit(trainer: AdapterTrainer, callback: RunCallback, checkpoint: Path | None) -> None:
    """Run TRL's loop, or where its last step was done before, take the result.

    Raises:
        KeyboardInterrupt: it was interrupted before the last step.
    """
    if checkpoint is not None and _is_last(checkpoint):
        trainer.restore(checkpoint)
        return
    with callback.catching_interrupts():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def _is_last(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _kept(trainer: AdapterTrainer) -> str:
    steps = trainer.run.checkpoint_steps()
    total = trainer.state.max_steps
    if not steps:
        return f"Stopped before the first checkpoint of {total} steps: nothing is kept."
    return f"Step {steps[-1]} of {total} is kept; go on with --resume."


def _report(
    job: _Job,
    record: RunRecord,
    prepared: _Prepared,
    trainer: AdapterTrainer,
    callback: RunCallback,
    said: _Notes,
    began: float,
) -> TrainReport:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    evals = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    trained, total = trainer.model.get_nb_trainable_parameters()
    return TrainReport(
        output=job.run.path,
        base=job.base.reference,
        base_fingerprint=record.base_fingerprint,
        method=job.recipe.method,
        rows=len(prepared.rows.rows),
        eval_rows=len(prepared.eval_rows.rows) if prepared.eval_rows else 0,
        steps=trainer.state.global_step,
        loss=losses[-1],
        eval_loss=evals[-1] if evals else None,
        trained_parameters=trained,
        total_parameters=total,
        seconds=time.monotonic() - began,
        steps_per_second=callback.steps_per_second,
        notes=tuple(said.kept),
        versions=record.versions,
    )


def _save_adapter(
    job: _Job, model: Any, prepared: _Prepared, record: RunRecord, report: TrainReport, said: _Notes
) -> None:
    """PEFT's folder and the contract with its certificate, whole or not at all."""
    from edgelora.train.trainer import save_peft

    training = {**job.recipe.to_dict(), **report.summary(), "data_sha256": record.data_sha256}
    if not report.steps_per_second:  # a run whose last step was done before
        del training["steps_per_second"]
    known = {name: value for name, value in training.items() if value is not None}
    model.peft_config["default"].base_model_name_or_path = job.base.reference
    with job.run.adapter_files() as folder:
        save_peft(model, folder)
        contract = prepared.contract.with_changes(training=known)
        contract.with_changes(certificate=_certificate(job, model, prepared, folder, said)).save(folder)


def _certificate(job: _Job, model: Any, prepared: _Prepared, folder: Path, said: _Notes) -> str:
    """Recorded on held-out rows where there are some, else on those of training; empty where none can be."""
    from edgelora.train.certificate import RecordSettings, record, record_trained
    from edgelora.train.probes import before_the_reply

    if not job.recipe.certificate_probes:
        return ""
    said.note("recording the certificate for edgelora verify")
    prompts = [before_the_reply(conversation) for conversation in job.eval_conversations or job.conversations]
    place = placement(job.recipe)
    settings = RecordSettings(job.recipe.certificate_probes, dtype=place.dtype_name, device=place.device)
    try:
        made = record_trained(model, prepared.tokenizer, prompts, prepared.contract, settings)
        return (made or record(job.base, folder, prompts, prepared.contract, settings)).encode()
    except EdgeloraError as error:  # the adapter is made, and worth keeping
        said.keep(f"no certificate: {error.message}")
        return ""


def _report_of(job: _Job, record: RunRecord, contract: Contract, said: _Notes) -> TrainReport:
    """The report of a run that was finished before: its figures are in the contract."""
    figures: dict[str, Any] = {"steps_per_second": 0.0}
    figures |= {name: contract.training.get(name, figures.get(name)) for name in SUMMARY}
    return TrainReport(
        output=job.run.path,
        base=job.base.reference,
        base_fingerprint=record.base_fingerprint,
        method=job.recipe.method,
        notes=tuple(said.kept),
        **figures,
    )
