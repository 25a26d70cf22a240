"""`edgelora serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import FILE, adapter_option, base_option, config_option, engine_options, template_option


@click.command("serve")
@base_option
@adapter_option
@click.option(
    "--adapter-dir",
    type=FILE,
    help="A folder whose GGUF files are adapters, under their stems; it is watched.",
)
@click.option("--keys", type=FILE, help="Who may ask, and how much: see `edgelora keys`.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option("--parallel", type=click.IntRange(1, 256), help="Replies that are written at the same time.")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Requests that may wait for their turn; more get 429.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds that a reply may take."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds in which replies under way may end after SIGTERM.",
)
@click.option(
    "--step-timeout",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="Seconds in one step after which the engine counts as hanging; more for a base that memory cannot hold.",
)
@click.option("--max-body", type=click.IntRange(min=1), default=8, show_default=True, help="Of a request, in MB.")
@click.option("--max-upload", type=click.IntRange(min=1), default=2048, show_default=True, help="Of a file, in MB.")
@click.option("--require-verify", is_flag=True, help="Uploads replay their certificate first.")
@click.option("--origin", "origins", multiple=True, help="Another web origin that browsers may call from.")
@template_option
@engine_options
@config_option
def command(
    base: Path | None,
    adapters: tuple[AdapterRef, ...],
    adapter_dir: Path | None,
    keys: Path | None,
    host: str,
    port: int,
    parallel: int | None,
    max_waiting: int,
    timeout: float,
    grace: float,
    step_timeout: float,
    max_body: int,
    max_upload: int,
    require_verify: bool,
    origins: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve a base and its adapters over HTTP, with OpenAI's API and a web page.

    A request's `model` is an adapter's name, or `base`. Without --keys, only this machine may ask.

    \b
    Examples:
      edgelora serve --adapter support.gguf
      edgelora serve --base base-q4_k_m.gguf --adapter-dir adapters/ --keys keys.toml --host 0.0.0.0
    """
    from edgelora.cli.serving import serve

    code = serve(
        base,
        adapters,
        adapter_dir=adapter_dir,
        keys=keys,
        host=host,
        port=port,
        parallel=parallel,
        max_waiting=max_waiting,
        request_seconds=timeout,
        grace=grace,
        step_seconds=step_timeout,
        max_body=max_body * 1_000_000,
        max_upload=max_upload * 1_000_000,
        require_verify=require_verify,
        origins=origins,
        options=options,
    )
    click.get_current_context().exit(code)
