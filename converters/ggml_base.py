"""`libggml-base`, the library of llama.cpp that encodes and decodes blocks, loaded without importing llama_cpp.

llama-cpp-python installs it beside its own library. ctypes lets go of the interpreter lock during calls, so threads
work side by side.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from functools import lru_cache
from pathlib import Path

from converters.block_types import BlockType
from converters.errors import UnsupportedError

_FIRST_USE = threading.Lock()
_ROWS_TO_FLOATS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` (ggml/include/ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ROWS_TO_FLOATS),
        ("from_float", ctypes.c_void_p),
    ]


@lru_cache
def encoder(type_number: int) -> ctypes.CDLL:
    """The library, with the tables of one type filled in; that must not happen in two threads at once."""
    with _FIRST_USE:
        library = _library()
        library.ggml_quantize_init(type_number)
        return library


def traits(block_type: BlockType) -> TypeTraits:
    """What the library knows of a type.

    Raises:
        UnsupportedError: the installed library's table is not the one that this file describes.
    """
    pointer = _library().ggml_get_type_traits(block_type.number)
    found = pointer.contents if pointer else TypeTraits()
    described = ((found.type_name or b"").decode("ascii", "replace").upper(), found.block, found.size)
    if described != (block_type.name, block_type.block, block_type.size):
        raise UnsupportedError(
            f"the installed llama-cpp-python stores {block_type.name} otherwise: it says {described}",
            hint="pip install the version of llama-cpp-python that constraints.txt pins.",
        )
    return TypeTraits.from_buffer_copy(found)


@lru_cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    return library


@lru_cache
def is_installed() -> bool:
    try:
        return library_path().is_file()
    except UnsupportedError:
        return False


def library_path() -> Path:
    """Where it is installed.

    Raises:
        UnsupportedError: nowhere.
    """
    package = importlib.util.find_spec("llama_cpp")
    folders = [Path(folder) / "lib" for folder in (package.submodule_search_locations or [])] if package else []
    for folder in folders:
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            if (folder / name).is_file():
                return folder / name
    raise UnsupportedError(
        "llama-cpp-python is not installed, and its library makes and reads the quantized types",
        hint="pip install llama-cpp-python, or convert to f32, f16 or bf16.",
    )
