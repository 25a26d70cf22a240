"""Matrix tiles that fault: found out in a process of its own, and then not used."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgelora.engine import amx


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


def test_tiles_are_taken_out_of_ggmls_list_and_nothing_else_is() -> None:
    """In a process of its own, also after somebody else (as torch does) asked the system for tiles."""
    program = (
        "import ctypes\n"
        "from edgelora.engine import amx\n"
        "from llama_cpp import llama_cpp\n"
        "ctypes.CDLL(None).syscall(158, 0x1023, 18)\n"
        "before = amx.ways_to_store(llama_cpp._lib)\n"
        "amx.hide_from(llama_cpp._lib)\n"
        "after = amx.ways_to_store(llama_cpp._lib)\n"
        "assert after == [way for way in before if way != amx.TILES], (before, after)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_quantized_base_reads_a_prompt(bases: dict[str, Path]) -> None:
    program = (
        "import sys\n"
        "from edgelora.engine.engine import Engine\n"
        "with Engine(sys.argv[1], threads=1) as engine:\n"
        "    print(engine.chat('one two three four five six', sampling={'max_tokens': 1}).completion_tokens)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, bases["q8_0"]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
