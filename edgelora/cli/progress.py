"""Progress bars on stderr: what is done, at what rate, how long it will take. Silent where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def bytes_bar(title: str) -> Iterator[ByteProgress]:
    """A bar for work measured in bytes, as converters report it: `(done_bytes, total_bytes, what)`."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Column

    columns = (
        BarColumn(bar_width=20),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[what]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with _bar(TextColumn("{task.description}", markup=False), *columns) as progress:
        yield ByteProgress(progress, title)


class ByteProgress:
    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None, what="")

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        self._progress.update(self._task, completed=done_bytes, total=total_bytes, what=what)


@contextmanager
def stage_bars() -> Iterator[Stages]:
    """Bars for the stages of one job: each shows with its first report, in the place of the one before it."""
    with ExitStack() as stack:
        yield Stages(stack)


class Stages:
    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._title = ""
        self._bar: Any = None

    def bytes(self, title: str) -> Callable[[int, int, str], None]:
        """Work measured in bytes: `(done_bytes, total_bytes, what)`."""
        if not sys.stderr.isatty():
            return lambda done, total, what: None  # without loading what draws bars
        return lambda done, total, what: self._show(title, bytes_bar, title)(done, total, what)

    def windows(self, title: str) -> Callable[[int, int], None]:
        """A text that is read window by window: `(done, total)`."""
        if not sys.stderr.isatty():
            return lambda done, total: None
        return lambda done, total: self._show(title, count_bar, title, "windows").update(done, total)

    def _show(self, title: str, bar: Callable[..., AbstractContextManager[Any]], *arguments: str) -> Any:
        if self._title != title:
            self._stack.close()
            self._bar, self._title = self._stack.enter_context(bar(*arguments)), title
        return self._bar


@contextmanager
def count_bar(title: str, unit: str) -> Iterator[CountProgress]:
    """A bar for work measured in steps or rows, with a rate and a field for notes (loss, errors)."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    with _bar(TextColumn("{task.description}", markup=False), *columns) as progress:
        yield CountProgress(progress, title, unit)


class CountProgress:
    def __init__(self, progress: Progress, title: str, unit: str) -> None:
        self._progress, self._unit = progress, unit
        self._task = progress.add_task(title, total=None, note="")

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        speed = self._progress.tasks[self._task].speed
        rate = f"{speed:.1f} {self._unit}/s" if speed else ""
        self._progress.update(self._task, completed=done, total=total, note="  ".join(filter(None, (note, rate))))


@contextmanager
def _bar(*columns: object) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:  # type: ignore[arg-type]
        yield progress
