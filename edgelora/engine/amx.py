"""Matrix tiles (Intel AMX) that end every process that uses them.

GCC 12 compiles llama.cpp's set-up of the tiles wrong: on a processor that has them, the first prompt that a quantized
base reads is a segmentation fault, in each of llama.cpp's programs. So a process of its own tries one product
(`amx_trial`); where it dies, llama.cpp is made to believe that there are no tiles, and computes without them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRIAL = Path(__file__).with_name("amx_trial.py")
TRY_SECONDS = 20


def is_broken(libraries: Path) -> bool:
    """Whether this processor has tiles and ggml dies of them; 0.1 s where there are tiles, else nothing.

    Args:
        libraries: the folder of ggml's shared libraries.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        announced = " amx_int8" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return announced and _dies([sys.executable, "-I", "-S", str(TRIAL), str(libraries)])


def _dies(command: list[str]) -> bool:
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=TRY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode < 0  # a signal; any other failure says nothing of tiles


def hide_from(ggml: ctypes.CDLL) -> None:
    """Let ggml make its list of ways to store weights, which it makes once, while the system refuses tiles.

    Args:
        ggml: the library, before it has loaded a model.
    """
    device = _function(ggml, "ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int)(0)
    registry = _function(ggml, "ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(device)
    find = _function(ggml, "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
    if found := find(registry, b"ggml_backend_dev_get_extra_bufts"):
        list_ways = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(found)
        with _silence(), refused():
            list_ways(device)


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


@contextmanager
def _silence() -> Iterator[None]:
    """ggml says on stderr, not in its log, that there are no tiles."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _SignalStack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def refused() -> Iterator[None]:
    """While it lasts, the system refuses tiles to this process.

    It does so where a thread's alternate signal stack could not hold their state (kernel's Documentation/arch/x86/
    xstate.rst), so this thread gets a small one: enough for every other register, too little for 8 KiB of tiles.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    memory = ctypes.create_string_buffer(8192)
    small = _SignalStack(ctypes.cast(memory, ctypes.c_void_p), 0, len(memory))
    before = _SignalStack()
    if libc.sigaltstack(ctypes.byref(small), ctypes.byref(before)):
        yield
        return
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
