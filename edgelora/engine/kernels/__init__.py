"""The C half of `mixing`: its structures as ctypes see them, and the library, built for this machine at first use."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from converters.native import build
from edgelora.engine.graph import Node

SOURCE = Path(__file__).with_name("lowrank.c")
FLAGS = ("-O3", "-ffp-contract=fast")
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
        ("name", ctypes.c_char * 64),
    )


class Mixer(ctypes.Structure):
    """Everything that the evaluation callback and the operations look at."""

    _fields_ = (
        ("matrices", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("n_matrices", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
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


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where there is no compiler, it fails, or `EDGELORA_NATIVE=0` forbids them."""
    if os.environ.get("EDGELORA_NATIVE") == "0":
        return None
    found = build.library(FLAGS, SOURCE)
    if found is None or found.lowrank_try() != 0:
        return None
    sizes = (ctypes.c_int64 * 6)()
    found.lowrank_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(each) for each in (Node, Pair, Part, Run, Matrix, Mixer)]:
        return None
    found.lowrank_index.argtypes, found.lowrank_index.restype = [ctypes.c_void_p], None
    return found
