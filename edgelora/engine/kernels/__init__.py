"""The C halves of the mixers: structures as ctypes see them, and the libraries, built for this machine at first use.

`lowrank.c` belongs to `mixing_rows`, `stack.c` to `mixing_stack`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from converters.native import build
from edgelora.engine.graph import Node

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-ffp-contract=fast")
NAME_BYTES = 64  # GGML_MAX_NAME
TILE = 32
"""Columns of B that lie together, rank by rank."""


class Pair(ctypes.Structure):
    """What an adapter has for a matrix: addresses of A, (rank, n_in), and of B, (n_out / TILE, rank, TILE)."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


class Part(ctypes.Structure):
    """One adapter of a row: its pairs, a matrix each; its scale; where its hidden values begin in the row's."""

    _fields_ = (("pairs", ctypes.c_void_p), ("scale", ctypes.c_float), ("offset", ctypes.c_int32))


class Run(ctypes.Structure):
    """Rows that follow each other and are computed alike."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("row", "n_rows", "part", "n_parts"))


class Table(ctypes.Structure):
    """The rows of a batch."""

    _fields_ = (("runs", ctypes.c_void_p), ("n_runs", ctypes.c_int32), ("n_rows", ctypes.c_int32))


class Matrix(ctypes.Structure):
    """A matrix of the base that adapters may change."""

    _fields_ = (
        ("mixer", ctypes.c_void_p),
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("table", ctypes.c_int32),
        ("seen", ctypes.c_int32),
    )


class Names(ctypes.Structure):
    """The names of matrices, and a hash of them."""

    _fields_ = (
        ("text", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
    )


class Mixer(ctypes.Structure):
    """Everything that `lowrank.c`'s evaluation callback and operations look at."""

    _fields_ = (
        ("names", Names),
        ("matrices", ctypes.c_void_p),
        ("tables", Table * 2),
        ("parts", ctypes.c_void_p),
        ("n_parts", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("hidden", ctypes.c_void_p),
        ("custom", ctypes.c_int32),
        ("broken", ctypes.c_int32),
        ("custom_params", ctypes.c_int32 * 16),
        ("user_at", ctypes.c_int32),
        ("current", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("last", ctypes.c_void_p),
    )


class Place(ctypes.Structure):
    """A matrix that a stack changes, and its nodes in the last graph."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("change", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("home", ctypes.c_void_p),
        ("layout", ctypes.c_int32),
        ("stage", ctypes.c_int32),
        ("seen", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Stack(ctypes.Structure):
    """Everything that `stack.c`'s evaluation callback looks at."""

    _fields_ = (
        ("names", Names),
        ("places", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("devices", ctypes.c_void_p),
        ("n_devices", ctypes.c_int32),
        ("n_rows", ctypes.c_int32 * 2),
        ("mul", ctypes.c_int32),
        ("mul_mat", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("open", ctypes.c_int32),
        ("broken", ctypes.c_int32),
        ("is_host", ctypes.c_void_p),
        ("type_of", ctypes.c_void_p),
        ("device_of", ctypes.c_void_p),
    )


def named(names: Sequence[str]) -> tuple[Names, Any]:
    """Matrices by name, before `*_index` fills the hash; and the memory that it points to."""
    text = b"".join(name.encode().ljust(NAME_BYTES, b"\0") for name in names)
    n_slots = 1 << (2 * max(1, len(names))).bit_length()
    memory = ctypes.create_string_buffer(text, max(1, len(text))), (ctypes.c_int32 * n_slots)()
    return Names(ctypes.addressof(memory[0]), ctypes.addressof(memory[1]), len(names), n_slots), memory


@cache
def lowrank() -> ctypes.CDLL | None:
    """The row kernels; None where there is no compiler, it fails, or `EDGELORA_NATIVE=0` forbids them."""
    return _library("lowrank", (Node, Pair, Part, Run, Matrix, Mixer))


@cache
def stack() -> ctypes.CDLL | None:
    """The stack's callback; None as for `lowrank`."""
    return _library("stack", (Node, Place, Stack))


def _library(name: str, structures: Sequence[type[ctypes.Structure]]) -> ctypes.CDLL | None:
    if os.environ.get("EDGELORA_NATIVE") == "0":
        return None
    found = build.library(FLAGS, FOLDER / f"{name}.c")
    if found is None or getattr(found, f"{name}_try")() != 0:
        return None
    sizes = (ctypes.c_int64 * len(structures))()
    getattr(found, f"{name}_sizes")(sizes)
    if list(sizes) != [ctypes.sizeof(each) for each in structures]:
        return None
    index = getattr(found, f"{name}_index")  # an item would be another object each time
    index.argtypes, index.restype = [ctypes.c_void_p], None
    return found
