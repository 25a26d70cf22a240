"""A training run from a data file to an adapter folder, in the order in which things can go wrong.

What is quick to check comes first: the folder, the data, the base; torch and its friends take seconds to import and a
base can take minutes to load.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.contract import Contract
from edgelora.dataset import Given, data_sha256, sources_of
from edgelora.errors import DataFileError, EdgeloraError, SettingsError
from edgelora.train import ranks
from edgelora.train.base import Placement, find_base, placement
from edgelora.train.extra import require_extra
from edgelora.train.folder import RunFolder, RunRecord, file_sha256
from edgelora.train.job import Job, Notes, Prepared
from edgelora.train.progress import SUMMARY, SilentProgress, TrainProgress, TrainReport
from edgelora.train.recipe import Recipe

if TYPE_CHECKING:
    from edgelora.train.library_log import LibraryLog
    from edgelora.train.rows import Data
    from edgelora.train.run_callback import RunCallback
    from edgelora.train.run_trainer import RunTrainer
    from edgelora.train.trainee import Trainee


def train(
    data: Given,
    base: str,
    output: Path,
    recipe: Recipe,
    *,
    eval_data: Given | None = None,
    resume: bool = False,
    progress: TrainProgress | None = None,
) -> TrainReport:
    """Fine-tune an adapter for `base`, or its own weights, on the rows in `data`, and leave the result in `output`.

    Args:
        data, eval_data: what `edgelora.dataset` reads, one or several files with weights; for preferences, of pairs.
        base: a Hugging Face folder, a GGUF file or a hub id.
        output: see `edgelora.train.folder` for what is in it. A new run wants it empty, not there yet, or holding a run
            that never reached a checkpoint.
        resume: go on from the last whole checkpoint in `output`, with the same result as without the break; with no
            checkpoint there, begin; where the adapter is finished, report it.

    Raises:
        MissingExtraError: the packages of the extra `train`, or of a setting, are not installed.
        SettingsError: the folder is taken or in use, the run in it has another recipe, base or data, or the method has
            nothing for this base.
        DataFileError: the data cannot be read, or the chat template refuses it.
        ModelFileError: the base cannot be found or loaded, or its template shows no assistant text.
        EdgeloraError: the loss is not a number any more, or memory or disk are full.
        KeyboardInterrupt: Ctrl-C; its argument says what is kept: the first lets the step at hand end and saves it.
    """
    began = time.monotonic()
    require_extra("training")
    said = Notes(ranks.heard(progress or SilentProgress()))
    run = RunFolder(output)
    check_settings(recipe, has_eval=eval_data is not None)
    if not resume and ranks.is_first():
        run.refuse_if_taken()
    from edgelora.train.library_log import library_log

    job = read_job(data, base, recipe, eval_data, run)
    said.note("loading the training libraries")
    prepare_libraries()
    with ranks.only_first(run.locked), library_log() as log, _memory_errors():
        return _train(job, _record(job, data, eval_data), resume, said, log, began)


def prepare_libraries() -> None:
    """What must be set before torch is loaded.

    OpenMP threads that wait by spinning starve each other on a busy machine (2 threads, a tiny model: 2.5 steps/s
    spinning, 14.7 asleep).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def read_job(data: Given, base: str, recipe: Recipe, eval_data: Given | None, run: RunFolder) -> Job:
    """What there is to do, as `train` is given it.

    Raises:
        DataFileError, ModelFileError: see `train`.
    """
    from edgelora.train.rows import DATA

    kind = DATA[recipe.objective]
    rows, eval_rows = _read(kind, data, recipe), _read(kind, eval_data, recipe) if eval_data else []
    return Job(kind, rows, eval_rows, find_base(base, recipe.base_config), recipe, run)


def check_settings(recipe: Recipe, *, has_eval: bool) -> None:
    """Raises SettingsError for what takes no base and no library to see."""
    if recipe.ends_with_best and not has_eval:
        raise SettingsError(
            "the best checkpoint is the one with the lowest loss on evaluation data, and there is none",
            hint="Give --eval-data, or leave out --keep-best and --early-stopping-patience.",
        )
    if recipe.eval_steps is not None and not has_eval:
        raise SettingsError(
            "eval_steps is given, and there is no evaluation data", hint="Give --eval-data, or leave out --eval-steps."
        )
    if recipe.peft_config is not None and not recipe.torch_only:
        from edgelora.train.peft_file import refusal_of

        if refusal := refusal_of(recipe.peft_config):
            raise SettingsError(
                f"{recipe.peft_config}: what it describes becomes nothing that llama.cpp runs: {refusal}",
                hint="Choose another method; or train it for PEFT alone with --torch-only.",
            )


def _train(job: Job, record: RunRecord, resume: bool, said: Notes, log: LibraryLog, began: float) -> TrainReport:
    from edgelora.train.preparation import prepare
    from edgelora.train.result import said_before, save_result
    from edgelora.train.run_reporting import facts_of, reporting

    place = placement(job.recipe)
    ranks.join(place.device)
    prepared = prepare(job, record.base_fingerprint, said)
    template_sha256 = hashlib.sha256(prepared.contract.chat_template.encode()).hexdigest()
    record = replace(record, template_sha256=template_sha256, dtype=place.dtype_name)
    finished, checkpoint = ranks.by_first(lambda: _open(job, record, resume, said))
    if ranks.is_first():
        log.write_to(job.run.log_path)
    if finished is not None:
        return _report_of(job, record, finished, said)
    said.note(f"loading {job.base.name} ({place.quantization or place.dtype_name}, {place.device})")
    if ranks.world_size() > 1:
        said.keep(_batch_note(job.recipe))
    facts = facts_of(job, prepared, place)
    with ranks.first_ahead():
        trainee = trainee_of(job, prepared, place)
    export = ranks.by_first(lambda: said_before(trainee, job, said))
    trainer, callback = _trainer(job, prepared, trainee, place, said)
    with _saying_what_is_kept(trainer), ranks.only_first(lambda: reporting(job, prepared, facts, said)):
        _fit(trainer, callback, checkpoint)
        best = _take_best(trainer, job.recipe, said)
        report = _report(job, record, prepared, trainer, callback, said, began)
        report = replace(report, **best, export=export)
        ranks.by_first(lambda: save_result(job, trainee, prepared, _summary(job, report, record), export, said))
    return replace(report, notes=tuple(said.kept))


def _batch_note(recipe: Recipe) -> str:
    count, batch, accumulation = ranks.world_size(), recipe.batch_size, recipe.gradient_accumulation
    rows = count * batch * accumulation
    return f"{count} processes, each with batches of {batch}, {accumulation} a step: the optimizer sees {rows} rows"


def _read(kind: Data, data: Given, recipe: Recipe) -> Sequence[Any]:
    if any(source.name == "-" for source in sources_of(data)):
        raise DataFileError(
            "training data is read again on --resume and cannot come from standard input",
            hint="Save it to a file first.",
        )
    return kind.read(data, recipe.seed)


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


def _record(job: Job, data: Given, eval_data: Given | None) -> RunRecord:
    from importlib.metadata import version

    from converters.fingerprint import fingerprint
    from edgelora.entry import content_of

    return RunRecord(
        recipe=job.recipe.to_dict(),
        base=job.base.reference,
        base_fingerprint=fingerprint(job.base.path),
        base_content=content_of(job.base.path) if job.base.path.is_file() else "",
        data_sha256=data_sha256(sources_of(data)),
        eval_sha256=data_sha256(sources_of(eval_data)) if eval_data else "",
        peft_config_sha256=file_sha256(Path(job.recipe.peft_config).expanduser() if job.recipe.peft_config else None),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    )


def _open(job: Job, record: RunRecord, resume: bool, said: Notes) -> tuple[Contract | None, Path | None]:
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


def _refuse_other_run(started: RunRecord, now: RunRecord, job: Job) -> None:
    if differences := started.differences(now, job.recipe):
        raise SettingsError(
            f"{job.run.path}: the run there was started otherwise: {'; '.join(differences)}",
            hint="Give the settings it was started with (see run.json there), or another folder with -o.",
        )


def trainee_of(job: Job, prepared: Prepared, place: Placement) -> Trainee:
    """The base, loaded, with the recipe's adapter on it.

    Raises:
        ModelFileError, SettingsError, EdgeloraError: see `train`.
    """
    from edgelora.train.trainee import begin
    from edgelora.train.trainer import batches, check_target_modules

    model = job.base.load_model(place).to(place.device)
    check_target_modules(model, job.recipe)
    return begin(
        model,
        job.base,
        job.recipe,
        prepared.found,
        job.run,
        lambda: batches(prepared.rows, prepared.tokenizer, job.recipe, place.device),
    )


def _trainer(
    job: Job, prepared: Prepared, trainee: Trainee, place: Placement, said: Notes
) -> tuple[RunTrainer, RunCallback]:
    from edgelora.train.trainer import build_trainer, rank_notes

    trainer, callback = build_trainer(
        trainee,
        prepared.tokenizer,
        prepared.rows,
        prepared.eval_rows,
        job.recipe,
        place,
        job.run,
        said,
        job.base,
    )
    for note in rank_notes(trainer.model, job.recipe):
        said.keep(note)
    return trainer, callback


@contextmanager
def _saying_what_is_kept(trainer: RunTrainer) -> Iterator[None]:
    """Give an interrupt its text, wherever between the first step and the saved adapter it comes."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(trainer)) from None


def _fit(trainer: RunTrainer, callback: RunCallback, checkpoint: Path | None) -> None:
    """Run TRL's loop, or where its last step was done before, take the result.

    Raises:
        KeyboardInterrupt: it was interrupted before the last step.
    """
    if checkpoint is not None and _is_last(checkpoint, callback.recipe):
        trainer.restore(checkpoint)
        return
    with callback.catching_interrupts():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.interrupted and not _is_done(vars(trainer.state), callback.recipe):
        raise KeyboardInterrupt


def _is_last(checkpoint: Path, recipe: Recipe) -> bool:
    return _is_done(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), recipe)


def _is_done(state: Mapping[str, Any], recipe: Recipe) -> bool:
    from edgelora.train.run_trainer import stopped_early

    return bool(state["global_step"] >= state["max_steps"]) or stopped_early(state, recipe.early_stopping_patience)


def _take_best(trainer: RunTrainer, recipe: Recipe, said: Notes) -> dict[str, Any]:
    """Go back to the best checkpoint where the recipe ends with it; what the report says of it."""
    if not recipe.ends_with_best:
        return {}
    step, state = trainer.restore_best(), trainer.state
    if step is None:
        said.keep("the loss on the evaluation data was never a number: the last step is kept as it is")
        return {}
    why = "stopped early: " if state.global_step < state.max_steps else ""
    said.keep(f"{why}step {step} of {state.global_step} had the lowest eval loss, {state.best_metric:.3f}, and is kept")
    return {"best_step": step, "eval_loss": state.best_metric}


def _kept(trainer: RunTrainer) -> str:
    steps = trainer.run.checkpoint_steps()
    total = trainer.state.max_steps
    if not steps:
        return f"Stopped before the first checkpoint of {total} steps: nothing is kept."
    return f"Step {steps[-1]} of {total} is kept; go on with --resume."


def _report(
    job: Job,
    record: RunRecord,
    prepared: Prepared,
    trainer: RunTrainer,
    callback: RunCallback,
    said: Notes,
    began: float,
) -> TrainReport:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    evals = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    trained, total = _parameters(trainer.model)
    return TrainReport(
        output=job.run.path,
        base=job.base.reference,
        base_fingerprint=record.base_fingerprint,
        method=job.recipe.method,
        rows=len(prepared.rows.token_rows()),
        eval_rows=len(prepared.eval_rows.rows) if prepared.eval_rows else 0,
        steps=trainer.state.global_step,
        loss=losses[-1] if losses else callback.loss,  # stopped early, before the first line
        eval_loss=evals[-1] if evals else None,
        trained_parameters=trained,
        total_parameters=total,
        seconds=time.monotonic() - began,
        steps_per_second=callback.steps_per_second,
        notes=tuple(said.kept),
        versions=record.versions,
    )


def _parameters(model: Any) -> tuple[int, int]:
    """Trained, and all; a quantized weight counts as what it stands for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def _summary(job: Job, report: TrainReport, record: RunRecord) -> dict[str, Any]:
    """What the contract keeps of a run."""
    training = {**job.recipe.to_dict(), **report.summary(), "data_sha256": record.data_sha256}
    if not report.steps_per_second:  # a run whose last step was done before
        del training["steps_per_second"]
    return {name: value for name, value in training.items() if value is not None}


def _report_of(job: Job, record: RunRecord, contract: Contract, said: Notes) -> TrainReport:
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
