"""`edgelora doctor`."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import click

from edgelora.cli.options import FILE
from edgelora.version import __version__

PACKAGES = ("llama-cpp-python", "gguf", "numpy", "tokenizers", "torch", "transformers", "peft", "trl")


@click.command("doctor")
@click.option("--base", type=FILE, help="Also try how adapters would share this GGUF base.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(base: Path | None, as_json: bool) -> None:
    """Show backend, devices, memory and versions, and how adapters share a decode."""
    report = examine(base)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def examine(base: Path | None = None) -> dict[str, Any]:
    """Everything `doctor` prints, as plain data; sizes in bytes, times in seconds."""
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
        "adapters": _sharing(base),
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


def _sharing(base: Path | None) -> dict[str, Any]:
    """How requests with different adapters would share the machine: what `Engine(mode="auto")` chooses."""
    from edgelora.engine.mixing import why_not

    problem = why_not()
    if base is None or problem:
        return {"mode": "switching" if problem else "mixed", "problem": problem}
    from edgelora.engine.mixing_proof import linear_matrices, prove
    from edgelora.engine.model import Model
    from edgelora.engine.threads import threads_for

    model = Model(base)
    try:
        proof = prove(model, linear_matrices(model.header), threads_for(base.stat().st_size))
    finally:
        model.close()
    return {
        "mode": "switching" if proof.problem or proof.is_slower else "mixed",
        "problem": proof.problem,
        "base": str(base),
        "mixed_seconds": proof.mixed_seconds,
        "switching_seconds": proof.switching_seconds,
        "unused_matrices": list(proof.unused),
    }


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
    table.add_row("adapters", _sharing_text(report["adapters"]))
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


def _sharing_text(sharing: dict[str, Any]) -> str:
    how = "share a decode" if sharing["mode"] == "mixed" else "take turns"
    why = f": {sharing['problem']}" if sharing["problem"] else ""
    if "base" not in sharing:
        return f"different ones {how}{why}" + ("" if why else " (--base FILE tries it on a base)")
    times = (sharing["mixed_seconds"] * 1e3, sharing["switching_seconds"] * 1e3)
    measured = (
        f"; a token each of two takes {times[0]:.1f} ms in one decode, {times[1]:.1f} ms by turns" if any(times) else ""
    )
    unused = len(sharing["unused_matrices"])
    rest = f"; {unused} matrices of this base never use an adapter in llama.cpp" if unused else ""
    return f"different ones {how} on {sharing['base']}{why}{measured}{rest}"


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
