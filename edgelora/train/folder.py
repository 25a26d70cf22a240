"""The folder of a run: what it holds while it goes on, and when a finished adapter stands in it.

DIR/adapter_config.json, adapter_model.safetensors    what PEFT writes; there when the run is done
DIR/config.json, model.safetensors, tokenizer.json    of a run that trained all weights, instead
DIR/edgelora.json                                     the contract
DIR/run.json                                          recipe, base and data hashes: what --resume compares
DIR/metrics.jsonl                                     one object a log line
DIR/report.html, report.json                          the run's page, and what it tells beside the metrics
DIR/.lock                                             held by the process that trains here; gone when it ends
DIR/train.log                                         what the libraries had to say
DIR/checkpoints/checkpoint-N/                         weights, optimizer and random state after step N; always whole
DIR/checkpoints/initial/                              the adapter as it began, where its method needs that again
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgelora.errors import DataFileError, EdgeloraError, SettingsError
from edgelora.train.recipe import Recipe
from edgelora.whole_file import write_whole

VERSION = 1
CHECKPOINT = "checkpoint-"
CHECKPOINTS_KEPT = 2
# What makes a folder an adapter or a model goes in last, when the rest is there.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model*.safetensors"
MARKS = (ADAPTER_CONFIG, MODEL_CONFIG)
LOCK = ".lock"


@dataclass(frozen=True)
class RunRecord:
    """What a run was started with, as `run.json` keeps it.

    Attributes:
        base_content: of a GGUF base: quantizations of one model have one fingerprint, and are different weights.
    """

    recipe: Mapping[str, Any]
    base: str
    base_fingerprint: str
    data_sha256: str
    eval_sha256: str = ""
    template_sha256: str = ""
    peft_config_sha256: str = ""
    base_content: str = ""
    dtype: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    def differences(self, now: RunRecord, recipe: Recipe) -> list[str]:
        """What keeps this run from going on as `now`: everything that would change the result, one a line."""
        said = {
            "base_fingerprint": f"the base was {self.base}, now {now.base} (another model)",
            "data_sha256": "the training data is not the same file any more",
            "eval_sha256": "the evaluation data is not the same",
            "template_sha256": "the chat template is not the same any more",
            "peft_config_sha256": "the file of --peft-config is not the same any more",
            "base_content": f"the base was {self.base}, now {now.base} (other weights)",
            "dtype": f"the base's weights were {self.dtype}, now {now.dtype}",
        }
        return [
            *recipe.differences(self.recipe),
            *(text for name, text in said.items() if getattr(self, name) != getattr(now, name)),
        ]

    def library_changes(self, now: RunRecord) -> list[str]:
        """Libraries of another version than the run began with: the result may differ in the last digits."""
        return [
            f"{name} {version} is now {now.versions.get(name)}"
            for name, version in self.versions.items()
            if version != now.versions.get(name)
        ]


@dataclass(frozen=True)
class RunFolder:
    """Paths and whole-or-nothing writes in the output folder."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def initial(self) -> Path:
        return self.checkpoints / "initial"

    @property
    def finished(self) -> bool:
        is_adapter = all((self.path / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        return is_adapter or ((self.path / MODEL_CONFIG).is_file() and any(self.path.glob(MODEL_WEIGHTS)))

    def checkpoint_steps(self) -> list[int]:
        """Steps after which there is a whole checkpoint, ascending."""
        names = (p.name.removeprefix(CHECKPOINT) for p in self.checkpoints.glob(f"{CHECKPOINT}*"))
        return sorted(int(name) for name in names if name.isdigit())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{CHECKPOINT}{step}"

    def refuse_if_taken(self) -> None:
        """Let a new run begin here, or say why it may not: nothing that took time to make is overwritten.

        Free are a folder that does not exist, an empty one, and one whose run ended before its first checkpoint.

        Raises:
            SettingsError: a finished adapter, a run with checkpoints, or files of something else.
        """
        self.refuse_file()
        if not self.path.is_dir() or all(file.name == LOCK for file in self.path.iterdir()):
            return
        if self.finished:
            raise SettingsError(f"{self.path}: holds a finished run", hint="Give another folder with -o.")
        if not self.record_path.is_file():
            raise SettingsError(f"{self.path}: not empty, and not a training run", hint="Give another folder with -o.")
        if steps := self.checkpoint_steps():
            raise SettingsError(
                f"{self.path}: holds an unfinished run (checkpoint after step {steps[-1]})",
                hint="Go on with it by adding --resume, or remove the folder to begin again.",
            )

    def refuse_file(self) -> None:
        """Raises SettingsError where the folder's name is that of a file."""
        if self.path.is_file():
            raise SettingsError(f"{self.path}: a file, expected a folder", hint="Give another folder with -o.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder.

        Raises:
            SettingsError: another does, or it is a file.
        """
        self.refuse_file()
        lock = FileLock(self.path / LOCK)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise SettingsError(
                    f"{self.path}: another process is training in this folder",
                    hint="Wait until it has ended, or give another folder with -o.",
                ) from None
        try:
            yield
        finally:
            (self.path / LOCK).unlink(missing_ok=True)
            lock.release()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def load_record(self) -> RunRecord:
        """What the run in this folder was started with.

        Raises:
            SettingsError: run.json cannot be read.
        """
        try:
            values = json.loads(self.record_path.read_text(encoding="utf-8"))
            if values.get("version") != VERSION:
                raise ValueError(f"version {values.get('version')}, expected {VERSION}")
            return RunRecord(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"{self.record_path}: cannot be read ({error}), so the run cannot go on",
                hint="Remove the folder and train again.",
            ) from None

    def begin(self, record: RunRecord) -> None:
        """Start over: the record is there before the first step, the metrics are empty."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.discard_partial()
            if self.initial.exists():
                shutil.rmtree(self.initial)
            self.metrics_path.unlink(missing_ok=True)
            write_whole(self.record_path, json.dumps(asdict(record), indent=2) + "\n")

    def go_on(self, step: int) -> None:
        """Forget what was logged after the checkpoint that the run goes on from: those steps are done again."""
        with writing(self.path):
            self.discard_partial()
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines() if self.metrics_path.is_file() else []
            write_whole(self.metrics_path, "".join(f"{line}\n" for line in lines if _logged_by(line, step)))

    def discard_partial(self) -> None:
        """Remove what an earlier run left half written."""
        for leftover in [*self.path.glob(".partial-*"), *self.checkpoints.glob(".partial-*")]:
            shutil.rmtree(leftover)

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Add a line; what is no number is null, as JSON has no NaN."""
        values = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        with writing(self.path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def keep_checkpoint(self, partial: Path, step: int, best: int | None = None) -> None:
        """Move a checkpoint that is complete into place, then drop the oldest, but for that of step `best`."""
        target = self.checkpoint(step)
        if target.exists():
            shutil.rmtree(target)
        _complete_files(partial)
        os.replace(partial, target)
        for old in self.checkpoint_steps()[:-CHECKPOINTS_KEPT]:
            if old != best:
                shutil.rmtree(self.checkpoint(old))

    @contextmanager
    def result_files(self) -> Iterator[Path]:
        """A folder to save the result into; its files move into place together when the block ends well."""
        partial = self.path / ".partial-result"
        with writing(self.path):
            partial.mkdir()
            try:
                yield partial
                _complete_files(partial)
                files = sorted(partial.iterdir(), key=lambda file: file.name in MARKS)
                for file in files:
                    os.replace(file, self.path / file.name)
            finally:
                shutil.rmtree(partial)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name of `folder` when the block ends well."""
    partial = folder.with_name(f".partial-{folder.name}")
    with writing(folder):
        partial.mkdir(parents=True)
        try:
            yield partial
            _complete_files(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the place when it cannot be written (disk full, no permission).

    Raises:
        EdgeloraError: instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise EdgeloraError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="Free some space or give another folder with -o; whole checkpoints are kept.",
        ) from error


def file_sha256(path: Path | None) -> str:
    """Hash of a data file's bytes, as `sha256sum` prints it; empty for no file.

    Raises:
        DataFileError: it cannot be read.
    """
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataFileError(f"{path}: {error.strerror}", hint="Give a JSONL file that can be read.") from None


def _logged_by(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False  # a line cut off by a crash


def _complete_files(folder: Path) -> None:
    """On disk, and with the permissions of any new file: safetensors makes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in filter(Path.is_file, folder.rglob("*")):  # DeepSpeed and FSDP have folders in a checkpoint
        file.chmod(0o666 & ~umask)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
