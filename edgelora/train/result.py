"""What a run leaves: said before it trains, saved and certified when it has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError
from converters.outlook import Outlook, outlook
from edgelora.errors import EdgeloraError, SettingsError
from edgelora.train.base import placement
from edgelora.train.folder import writing
from edgelora.train.job import Job, Notes, Prepared
from edgelora.train.methods import EXPORTS, Export
from edgelora.train.saving import save_trained
from edgelora.train.trainee import Trainee

SHOWN = 3
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                   "chat_template*", "generation_config.json")  # fmt: skip
QUANTIZED = (
    "{} trains on the base in {}: what is served is another quantization of it, on which the adapter does nearly the "
    "same (`edgelora verify` shows how nearly)"
)


def said_before(trainee: Trainee, job: Job, said: Notes) -> Export:
    """Tell what the result will become, as the converter sees the adapter on this base.

    Raises:
        SettingsError: nothing that llama.cpp runs, and the recipe does not say that it is for torch alone.
    """
    method, recipe = job.recipe.row, job.recipe
    if method.trains_base:
        said.keep(f"{method.name}: {EXPORTS['base']}")
        return "base"
    found = _outlook(trainee, job)
    kind: Export = found.kind  # type: ignore[assignment]
    reasons = "".join(f"\n  - {reason}" for reason in found.reasons[:SHOWN])
    if kind == "refused" and not recipe.torch_only:
        raise SettingsError(
            f"{method.name}: {EXPORTS[kind]}:{reasons}",
            hint="Choose another method or other layers; or train it for PEFT alone with --torch-only.",
        )
    said.keep(f"{method.name}: {EXPORTS[kind]}{':' if reasons else ''}{reasons}")
    if method.quantization:
        said.keep(QUANTIZED.format(method.name, method.quantization.upper()))
    return kind


def _outlook(trainee: Trainee, job: Job) -> Outlook:
    partial = job.run.path / ".partial-outlook"
    with writing(job.run.path):
        partial.mkdir()
        try:
            save_trained(trainee, partial)
            return outlook(partial, job.base.path)
        except ConversionError as error:
            return Outlook("refused", (error.message,))
        finally:
            shutil.rmtree(partial)


def save_result(
    job: Job, trainee: Trainee, prepared: Prepared, training: Mapping[str, Any], export: Export, said: Notes
) -> None:
    """The adapter's or the model's files with the contract and its certificate, whole or not at all."""
    contract = prepared.contract.with_changes(training=dict(training))
    with job.run.result_files() as folder:
        if job.recipe.row.trains_base:
            save_trained(trainee, folder)
            _add_tokenizer(job, prepared, folder)
            contract.save(folder)
            return
        trainee.model.peft_config["default"].base_model_name_or_path = job.base.reference
        save_trained(trainee, folder)
        contract.with_changes(certificate=_certificate(job, trainee, prepared, folder, export, said)).save(folder)


def _add_tokenizer(job: Job, prepared: Prepared, folder: Path) -> None:
    """The base's own files: transformers writes some families' otherwise than it reads them."""
    if not job.base.path.is_dir():
        prepared.tokenizer.save_pretrained(folder)
    for pattern in TOKENIZER_FILES if job.base.path.is_dir() else ():
        for file in job.base.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if prepared.contract.chat_template != prepared.tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(prepared.contract.chat_template, encoding="utf-8")


def _certificate(job: Job, trainee: Trainee, prepared: Prepared, folder: Path, export: Export, said: Notes) -> str:
    """Recorded on held-out rows where there are some, else on those of training; empty where none can be."""
    from torch import OutOfMemoryError

    from edgelora.train.certificate import RecordSettings, record, record_trained
    from edgelora.train.probes import GENERAL_PROMPTS

    if not job.recipe.certificate_probes or export not in ("adapter", "approximate"):
        return ""  # `verify` replays adapters
    said.note("recording the certificate for edgelora verify")
    # Before a plain text there is no prompt.
    own = [prompt for prompt in map(job.data.prompt, job.eval_examples or job.examples) if prompt]
    prompts = own or GENERAL_PROMPTS
    place = placement(job.recipe).as_served()
    settings = RecordSettings(job.recipe.certificate_probes, dtype=place.dtype_name, device=place.device)
    try:
        if _shows_base(job, trainee):
            return record_trained(trainee.model, prepared.tokenizer, prompts, prepared.contract, settings).encode()
        return record(job.base, folder, prompts, prepared.contract, settings).encode()
    except EdgeloraError as error:  # the adapter is made, and worth keeping
        said.keep(f"no certificate: {error.message}")
        return ""
    except OutOfMemoryError:  # of a base that was only ever here in NF4
        said.keep(
            "no certificate: the base as it is served does not fit; record it elsewhere: convert --certify general"
        )
        return ""


def _shows_base(job: Job, trainee: Trainee) -> bool:
    """Whether the model in memory is the base as it is served, once the adapter is switched off."""
    method = job.recipe.row
    return not trainee.is_moved and not method.quantization and method.exports_to != "asked"
