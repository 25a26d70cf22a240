"""What the training libraries say goes to a file: their warnings, progress bars and advice would garble the screen."""

from __future__ import annotations

import logging
import logging.handlers
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers", "trl")
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
    """Redirect the libraries' loggers, Python warnings and progress bars until the block ends."""
    log = LibraryLog()
    loggers = {name: logging.getLogger(name) for name in (*LIBRARIES, WARNINGS)}
    before = {name: (logger.handlers[:], logger.propagate) for name, logger in loggers.items()}

    def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        loggers[WARNINGS].warning("%s:%s: %s: %s", filename, lineno, category.__name__, message)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = warn  # type: ignore[assignment]
        for logger in loggers.values():
            logger.handlers[:], logger.propagate = [log.handler], False
        try:
            yield log
        finally:
            for name, (handlers, propagate) in before.items():
                loggers[name].handlers[:], loggers[name].propagate = handlers, propagate
            log.close()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the bars of transformers (loading) and datasets; call it when both are imported."""
    import datasets
    from transformers.utils import logging as transformers_logging

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
