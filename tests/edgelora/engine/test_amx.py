"""Matrix tiles that fault: found out in a process of its own, and then not used."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora.engine import amx

LIBRARIES = Path(pytest.importorskip("llama_cpp").__file__).with_name("lib")


@pytest.mark.parametrize(
    ("program", "dies"),
    [
        ("pass", False),
        ("import sys; sys.exit(1)", False),
        (f"import os; os.kill(os.getpid(), {signal.SIGSEGV:d})", True),
    ],
)
def test_only_a_signal_counts(program: str, dies: bool) -> None:
    assert amx._dies([sys.executable, "-c", program]) is dies


@pytest.mark.skipif(sys.platform != "linux", reason="tiles are asked for in Linux's way")
def test_the_trial_ends_well_where_tiles_are_refused() -> None:
    """As the engine refuses them, in the trial's own process: whatever this machine has, no signal ends it then."""
    program = (
        "import ctypes, runpy, sys\n"
        "from pathlib import Path\n"
        "from edgelora.engine import amx\n"
        "libraries = [ctypes.CDLL(str(Path(sys.argv[1]) / name), ctypes.RTLD_GLOBAL)"
        " for name in ('libggml-base.so', 'libggml-cpu.so', 'libggml.so')]\n"
        "amx.hide_from(libraries[-1])\n"
        f"runpy.run_path({str(amx.TRIAL)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, LIBRARIES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="the alternate signal stack is Linux's")
def test_the_signal_stack_is_put_back() -> None:
    def size() -> int:
        now = amx._SignalStack()
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(now))
        return int(now.size)

    before = size()
    with amx.refused():
        assert size() == 8192
    assert size() == before


def test_a_quantized_base_reads_a_prompt(bases: dict[str, Path]) -> None:
    program = (
        "import sys\n"
        "from edgelora.engine.engine import Engine\n"
        "with Engine(sys.argv[1], threads=1) as engine:\n"
        "    print(engine.chat('one two three four five six', sampling={'max_tokens': 1}).completion_tokens)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, bases["q8_0"]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
