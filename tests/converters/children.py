"""Conversions in a process of their own: to be killed, to run out of disk, or to have their memory measured."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SETUP = """
    import json, os, resource, signal, sys, time
    from pathlib import Path
    from converters.base import convert_base
    from converters.errors import ConversionError
    from converters.options import QuantizeOptions
    from converters.requantize import requantize

    source, out, asked = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])

    def convert(**more):
        options = QuantizeOptions(**asked)
        if source.is_dir():
            return convert_base(source, out, options=options, **more)
        return requantize(source, out, options, **more)

    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
"""


def run(code: str, source: Path, out: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `code` after `SETUP`; `convert()` in it converts with `options`."""
    command = _command(code, source, out, options, arguments)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def run_on_a_small_disk(
    code: str, kib: int, source: Path, out: Path, *arguments: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The same, with a disk of `kib` mounted at `out`'s folder, for the child alone (Linux, root)."""
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size="$0"k tmpfs "$1" && shift && exec "$@"']
    command = [*mount, str(kib), str(out.parent), *_command(code, source, out, options, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def can_mount() -> bool:
    """Whether a process may mount a disk of its own here."""
    command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def kill_at_chunk(chunk: int, source: Path, out: Path, **options: Any) -> None:
    """Convert, and send SIGKILL when so many chunks have been written."""
    code = """
        def progress(done, total, what):
            print("chunk", flush=True)
            time.sleep(0.03)
        convert(progress=progress)
        print("done", flush=True)
    """
    command = _command(code, source, out, options, ())
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        for _ in range(chunk):
            assert child.stdout.readline() == "chunk\n"
        child.send_signal(signal.SIGKILL)
        assert "done" not in child.stdout.read()
        assert child.wait() == -signal.SIGKILL


def _command(code: str, source: Path, out: Path, options: dict[str, Any], arguments: tuple[str, ...]) -> list[str]:
    whole = textwrap.dedent(SETUP) + textwrap.dedent(code)
    return [sys.executable, "-c", whole, str(source), str(out), json.dumps(options), *arguments]
