"""From `--adapter` and `--base` to an engine: PEFT folders converted, the base found, what happened said on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelora.adapter_ref import AdapterRef

if TYPE_CHECKING:
    from edgelora.engine.engine import Engine


@contextmanager
def open_engine(
    adapters: Sequence[AdapterRef],
    base: Path | None,
    *,
    chat_template: str | None,
    ctx_size: int | None,
    threads: int | None,
    gpu_layers: int | None,
    kv_type: str | None,
    cache_dir: Path | None,
    on_overflow: str,
    force: bool,
    parallel: int | None = None,
    reproducible: bool = False,
) -> Iterator[Engine]:
    """An engine for the command line's options, closed afterwards."""
    from edgelora.engine.engine import Engine
    from edgelora.resolution import resolve_files

    files = resolve_files(adapters, base, force=force)
    if files.base_note:
        click.secho(files.base_note, err=True, dim=True)
    with Engine(
        files.base,
        adapters=files.adapters,
        n_ctx=ctx_size,
        threads=threads,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        cache_dir=cache_dir,
        on_overflow=on_overflow,
        chat_template=chat_template,
        force=force,
        parallel=parallel,
        reproducible=reproducible,
    ) as engine:
        for notice in engine.notices:
            click.secho(notice, err=True, fg="yellow")
        yield engine
