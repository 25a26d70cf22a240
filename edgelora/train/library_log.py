"""What the training libraries say goes to a file: their warnings, progress bars and advice would garble the screen."""

from __future__ import annotations

import logging
import logging.handlers
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")
WARNINGS = "edgelora.train.warnings"


class LibraryLog:
    """Collects records in memory until it is told which file they belong in."""

    def __init__(self) -> None:
        self.handler = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)

    def write_to(self, path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        self.handler.setTarget(file)
        self.handler.flush()
        self.handler.capacity = 1  # from now on each record is written as it comes

    def close(self) -> None:
        file = self.handler.target
        self.handler.close()
        if file is not None:
            file.close()


@contextmanager
def library_log() -> Iterator[LibraryLog]:
    """Redirect the libraries' loggers, Python warnings and progress bars until the block ends.

    It imports transformers and datasets, which set up their own output when they are imported.
    """
    log = LibraryLog()
    warner = logging.getLogger(WARNINGS)

    def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        warner.warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = warn  # type: ignore[assignment]
        with _handled_by(log.handler, warner), _no_progress_bars():
            libraries = [logging.getLogger(name) for name in LIBRARIES]
            with _handled_by(log.handler, *libraries):
                try:
                    yield log
                finally:
                    log.close()


@contextmanager
def _handled_by(handler: logging.Handler, *loggers: logging.Logger) -> Iterator[None]:
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the bars of transformers (loading) and datasets."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_verbosity()  # adds its handler, which it otherwise does at its first message
    shown = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown[0]:
            transformers_logging.enable_progress_bar()
        if not shown[1]:
            datasets.enable_progress_bars()
