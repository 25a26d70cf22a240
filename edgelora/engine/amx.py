"""Matrix tiles (Intel AMX) that end every process that uses them.

GCC 12 compiles llama.cpp's set-up of the tiles wrong: on a processor that has them, the first prompt that a quantized
base reads is a segmentation fault, in each of llama.cpp's programs. So a process of its own tries one product
(`amx_trial`); where it dies, llama.cpp is made to believe that there are no tiles, and computes without them.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

TRIAL = Path(__file__).with_name("amx_trial.py")
TRY_SECONDS = 20
CPU = 0  # ggml_backend_dev_type, ggml/include/ggml-backend.h
TILES = b"AMX"  # the name of ggml's way to store weights for them


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
    """Take tiles out of ggml's list of ways to store weights, which llama.cpp goes through for each tensor.

    Args:
        ggml: the library, before it has loaded a model.
    """
    if ways := _list_of_ways(ggml):
        name_of = declared(ggml, "ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
        kept = [way for way in _until_null(ways) if name_of(way) != TILES]
        for place, way in enumerate([*kept, None]):
            ways[place] = way


def ways_to_store(ggml: ctypes.CDLL) -> list[bytes]:
    """Names of ggml's ways to store weights, beside the plain one."""
    name_of = declared(ggml, "ggml_backend_buft_name", ctypes.c_char_p, ctypes.c_void_p)
    return [name_of(way) for way in _until_null(_list_of_ways(ggml))]


def _list_of_ways(ggml: ctypes.CDLL) -> Any:
    """ggml's own array of addresses, a null at its end; None where it has no such list."""
    pointer = ctypes.c_void_p
    device = declared(ggml, "ggml_backend_dev_by_type", pointer, ctypes.c_int)(CPU)
    registry = declared(ggml, "ggml_backend_dev_backend_reg", pointer, pointer)(device)
    find = declared(ggml, "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    found = find(registry, b"ggml_backend_dev_get_extra_bufts")
    return ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(found)(device) if found else None


def _until_null(ways: Any) -> list[int]:
    return list(itertools.takewhile(bool, (ways[place] for place in itertools.count()))) if ways else []


def declared(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a C library, with the types of its result and arguments."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function
