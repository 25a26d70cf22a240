"""From `edgelora serve`'s options to a running server: files found, packages there, logs on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import MissingExtraError, SettingsError


def serve(
    base: Path | None,
    adapters: tuple[AdapterRef, ...],
    *,
    adapter_dir: Path | None,
    options: dict[str, Any],
    parallel: int | None,
    **more: Any,
) -> int:
    """Serve until told to end; the exit code.

    Raises:
        MissingExtraError: the server's packages are not installed.
        EdgeloraError: what keeps it from starting.
    """
    try:
        from edgelora.serve.running import run
        from edgelora.serve.settings import ServeSettings
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"edgelora serve needs the package {error.name}", hint="pip install 'edgelora[serve]'"
        ) from None
    from edgelora.resolution import resolve_files
    from edgelora.template import resolve

    if adapter_dir is not None and not adapter_dir.is_dir():
        raise SettingsError(f"--adapter-dir {adapter_dir} is no folder")
    first = [AdapterRef("first", path) for path in sorted(adapter_dir.glob("*.gguf"))[:1]] if adapter_dir else []
    files = resolve_files(adapters or (() if base else first), base, force=options["force"])
    if files.base_note:
        click.secho(files.base_note, err=True, dim=True)
    if options["chat_template"] is not None:
        resolve(options["chat_template"])  # an unknown one is refused before anything is started
    cache_dir = options["cache_dir"]
    engine = {
        "n_ctx": options["ctx_size"],
        "threads": options["threads"],
        "gpu_layers": options["gpu_layers"],
        "kv_type": options["kv_type"],
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "on_overflow": options["on_overflow"],
        "chat_template": options["chat_template"],
        "force": options["force"],
        "parallel": parallel,
    }
    _log_to_stderr()
    settings = ServeSettings(files.base, engine, files.adapters if adapters else (), adapter_dir, **more)
    return run(settings, lambda url: click.echo(_greeting(url, settings.keys), err=True))


def _greeting(url: str, keys: Path | None) -> str:
    who = f"keys of {keys}" if keys else "no keys: this machine only"
    return f"edgelora serves at {url} ({who}). OpenAI's API is at {url}/v1, the page at {url}/. Ctrl-C ends it."


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines(as_json=not sys.stderr.isatty()))
    for name in ("edgelora.serve", "edgelora.access", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if name.startswith("edgelora") else logging.ERROR)
        logger.handlers, logger.propagate = [handler], False


class _Lines(logging.Formatter):
    """A line for each record: for people on a terminal, JSON elsewhere."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        if self._as_json:
            told = {"time": f"{when}Z", "level": record.levelname.lower(), "message": record.getMessage(), **fields}
            return json.dumps({**told, "trace": trace} if trace else told, ensure_ascii=False)
        text = " ".join([f"{when[11:]}", record.getMessage(), *(f"{name}={value}" for name, value in fields.items())])
        return f"{text}\n{trace}" if trace else text
