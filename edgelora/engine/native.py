"""The ctypes seam to llama.cpp: initialised once, silent, every handle freed exactly once.

llama.cpp writes its reasons to a log and not into its return values. The log is kept here, so that an error says why,
and nothing reaches stderr.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from edgelora.engine import amx

_WARN, _ERROR = 3, 4  # ggml.h, enum ggml_log_level
_keep_alive: list[Any] = []


class _Log(threading.local):
    """The last warnings and errors that llama.cpp logged on this thread."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=32)


_log = _Log()


@cache
def llama() -> Any:
    """The low-level API, with its backends initialised and its log kept."""
    from llama_cpp import llama_cpp as library

    callback = library.llama_log_callback(_on_log)
    library.llama_log_set(callback, None)
    library.llama_backend_init()
    if amx.is_broken(Path(library.__file__).with_name("lib")):
        amx.hide_from(library._lib)
    # llama.cpp may log from destructors that run after the interpreter is gone. Py_IsInitialized is a C function that
    # may be called even then, and does nothing: the sink of the last resort.
    sink = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, library.llama_log_callback)
    atexit.register(library.llama_log_set, sink, None)
    _keep_alive.extend((callback, sink))
    return library


def ggml_function(name: str, result: object, *arguments: object) -> Any:
    """A function of ggml's that llama-cpp-python does not declare.

    Its llama library finds them in the ggml that it is linked to; opening libggml by path could load a second copy.
    """
    return amx.declared(llama()._lib, name, result, *arguments)


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    if level in (_WARN, _ERROR):
        _log.lines.append(text.decode("utf-8", errors="replace").strip())


def forget_log() -> None:
    """Start afresh, before a call whose failure is to be explained by `reason`."""
    _log.lines.clear()


def reason() -> str:
    """What llama.cpp logged on this thread since `forget_log`, as one line, without the functions' names."""
    told = [line.split(": ", 1)[-1].strip() for line in _log.lines]
    return "; ".join(dict.fromkeys(filter(None, told))) or "llama.cpp gave no reason"


class Handle:
    """A native object and the function that frees it, which is called once however often `close` is."""

    def __init__(self, pointer: Any, free: Callable[[Any], None]) -> None:
        self._pointer, self._free = pointer, free

    @property
    def pointer(self) -> Any:
        if self._pointer is None:
            raise RuntimeError("a native object was used after it was freed")
        return self._pointer

    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._free(pointer)


class InterruptFlag:
    """Set from any thread, read by llama.cpp between two operations of a running decode (on CPU backends).

    The abort callback is C's own `strlen` on two bytes: 0 (go on) while they are empty, 1 (abort) once the first is
    set. So a decode never waits for Python's interpreter lock, and Ctrl-C need not wait for a long prompt to be read.
    """

    def __init__(self) -> None:
        self._bytes = ctypes.create_string_buffer(2)

    def set(self) -> None:
        self._bytes[0] = b"\x01"

    def is_set(self) -> bool:
        return self._bytes[0] != b"\x00"

    @property
    def callback(self) -> tuple[Any, Any]:
        """The function and its argument, as `llama_set_abort_callback` takes them; self must outlive their use."""
        return _strlen(), ctypes.cast(self._bytes, ctypes.c_void_p)


@cache
def _strlen() -> Any:
    return ctypes.cast(ctypes.CDLL("msvcrt" if os.name == "nt" else None).strlen, llama().ggml_abort_callback)
