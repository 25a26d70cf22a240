"""`edgelora doctor`."""

from __future__ import annotations

import json
import platform
from typing import Any

import click

from edgelora.version import __version__

PACKAGES = ("llama-cpp-python", "gguf", "numpy", "tokenizers", "torch", "transformers", "peft", "trl")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show backend, devices, memory and versions."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as plain data; sizes in bytes."""
    import psutil

    from edgelora.engine.devices import backend_name, devices, system_info
    from edgelora.engine.threads import usable_cores
    from edgelora.store import BASE_VARIABLE, Store

    memory, store = psutil.virtual_memory(), Store()
    return {
        "edgelora": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": backend_name(),
        "devices": [vars(device) for device in devices()],
        "cpu_features": system_info(),
        "cores": usable_cores(),
        "native_kernels": _has_native_kernels(),
        "memory_bytes": {"total": memory.total, "available": memory.available},
        "packages": {name: _version(name) for name in PACKAGES},
        "store": {"folder": str(store.folder), "bases": [str(path) for path in store.registered_bases()]},
        "base_variable": BASE_VARIABLE,
    }


def _has_native_kernels() -> bool:
    """Whether quantization runs on kernels of our own: compiled for this machine, and equal to llama.cpp's bytes."""
    from converters import native
    from converters.block_types import TYPES
    from converters.ggml_base import encoder

    return native.quantizer(TYPES["Q4_K"], encoder(TYPES["Q4_K"].number)) is not None


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import, and `--help` loads this file

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("edgelora", f"{report['edgelora']}, Python {report['python']}, {report['system']}")
    table.add_row("backend", f"llama.cpp on {report['backend']}, {report['cores']} usable cores")
    for device in report["devices"]:
        memory = f"{_gigabytes(device['free_bytes'])} free of {_gigabytes(device['total_bytes'])}"
        table.add_row("device", f"{device['name']}: {device['description']} ({device['kind']}), {memory}")
    table.add_row("cpu", ", ".join(report["cpu_features"]) or "no vector extensions reported")
    kernels = "native kernels, proven on this machine" if report["native_kernels"] else "llama.cpp's own code"
    table.add_row("quantization", kernels)
    free = report["memory_bytes"]
    table.add_row("memory", f"{_gigabytes(free['available'])} available of {_gigabytes(free['total'])}")
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version))
    missing = [name for name, version in report["packages"].items() if version is None]
    if missing:
        table.add_row("missing", f"{', '.join(missing)} (training needs them: pip install 'edgelora[train]')")
    table.add_row("store", report["store"]["folder"])
    for base in report["store"]["bases"] or ["none yet; `edgelora convert` adds what it writes"]:
        table.add_row("base", base)
    Console(soft_wrap=True, markup=False, highlight=False).print(table)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
