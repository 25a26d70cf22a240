"""Nodes of a compute graph, as llama.cpp's evaluation callback (`cb_eval`) hands them out, and their values.

llama.cpp asks about each node before it is computed; for those that the callback wants it comes back once their values
are there. ggml gives no functions to look into a node, so its `struct ggml_tensor` is read as it lies in memory, after
a node of a known form came out right (`operations`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine.native import ggml_function
from edgelora.errors import EdgeloraError

MAX_DIMENSIONS, MAX_SOURCES, MAX_NAME = 4, 10, 64  # GGML_MAX_DIMS, GGML_MAX_SRC, GGML_MAX_NAME, ggml/include/ggml.h
F32, I32 = 0, 26  # enum ggml_type
_TESTED = "Install the tested llama-cpp-python: pip install llama-cpp-python==0.3.36"
DTYPES: dict[int, type[np.float32] | type[np.int32]] = {F32: np.float32, I32: np.int32}


class Node(ctypes.Structure):
    """`struct ggml_tensor`, ggml/include/ggml.h.

    Attributes:
        ne: sizes, the row length first.
        nb: strides in bytes.
        op: the operation that makes it.
        src: addresses of the nodes it is made from, 0 where there is none.
    """

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMENSIONS),
        ("nb", ctypes.c_size_t * MAX_DIMENSIONS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
    )

    def source(self, index: int) -> Node:
        """A node that this one is made from; the caller knows that it is there."""
        return Node.from_address(self.src[index])


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@contextmanager
def _scratch() -> Iterator[tuple[Any, Any]]:
    """A ggml context for nodes without memory, freed afterwards; and the function that makes tensors in it, of a type
    and three sizes."""
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    init, free = ggml_function("ggml_init", pointer, InitParams), ggml_function("ggml_free", None, pointer)
    context = init(InitParams(1 << 16, None, True))
    try:
        yield context, ggml_function("ggml_new_tensor_3d", pointer, pointer, ctypes.c_int, size, size, size)
    finally:
        free(context)


@cache
def operations() -> tuple[int, int]:
    """The numbers of MUL_MAT and MUL_MAT_ID in `enum ggml_op`.

    Raises:
        EdgeloraError: this build of llama.cpp lays its nodes out otherwise.
    """
    pointer = ctypes.c_void_p
    set_name = ggml_function("ggml_set_name", pointer, pointer, ctypes.c_char_p)
    multiply = ggml_function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    multiply_by_id = ggml_function("ggml_mul_mat_id", pointer, pointer, pointer, pointer, pointer)
    name_of = ggml_function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    with _scratch() as (context, new):
        weight, rows, ids = new(context, F32, 8, 5, 3), new(context, F32, 8, 2, 7), new(context, I32, 2, 7, 1)
        set_name(weight, b"weight")
        plain = Node.from_address(multiply(context, new(context, F32, 8, 5, 1), rows))
        by_id = Node.from_address(multiply_by_id(context, weight, rows, ids))
        found = (
            list(by_id.src[:4]) == [weight, rows, ids, None]
            and by_id.source(0).name == b"weight"
            and list(by_id.ne) == [5, 2, 7, 1]
            and list(by_id.nb) == [4, 20, 40, 280]
            and (by_id.source(2).type, by_id.source(2).data, by_id.buffer, plain.view_src) == (I32, None, None, None)
        )
        operation = int(plain.op), int(by_id.op)
    if not found or [name_of(number) for number in operation] != [b"MUL_MAT", b"MUL_MAT_ID"]:
        raise EdgeloraError(
            "this llama.cpp lays out its graphs in a way that edgelora does not know",
            hint=_TESTED,
        )
    return operation


@cache
def elementwise_operations() -> tuple[int, int]:
    """The numbers of MUL and SCALE in `enum ggml_op`.

    Raises:
        EdgeloraError: this build of llama.cpp lays its nodes out otherwise.
    """
    operations()
    pointer = ctypes.c_void_p
    with _scratch() as (context, new):
        rows = new(context, F32, 8, 2, 1)
        product = ggml_function("ggml_mul", pointer, pointer, pointer, pointer)(context, rows, rows)
        scaled = ggml_function("ggml_scale", pointer, pointer, pointer, ctypes.c_float)(context, rows, 2.0)
        numbers = int(Node.from_address(product).op), int(Node.from_address(scaled).op)
    name_of = ggml_function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    if [name_of(number) for number in numbers] != [b"MUL", b"SCALE"]:
        raise EdgeloraError("this llama.cpp lays out its operations in a way that edgelora does not know", hint=_TESTED)
    return numbers


def custom_operation(function: Any) -> tuple[int, bytes, int]:
    """How ggml writes down an operation that runs a C function on all threads: its number, its parameters (64 bytes,
    the function first), and where among them the function's own argument is.

    Raises:
        EdgeloraError: this build of llama.cpp lays its nodes out otherwise.
    """
    operations()
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    custom = ggml_function(
        "ggml_custom_4d",
        pointer,
        pointer,
        ctypes.c_int,
        *[size] * 4,
        pointer,
        ctypes.c_int,
        pointer,
        ctypes.c_int,
        pointer,
    )
    address, argument, every_thread = ctypes.cast(function, pointer), 0x5AFE5EED5AFE5EED, -1  # GGML_N_TASKS_MAX
    with _scratch() as (context, new):
        inputs = (pointer * 1)(new(context, F32, 8, 1, 1))
        node = Node.from_address(custom(context, F32, 8, 1, 1, 1, inputs, 1, address, every_thread, argument))
        number, parameters = int(node.op), bytes(node.op_params)
    name = ggml_function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)(number)
    user_at = parameters.find(argument.to_bytes(8, sys.byteorder))
    if name != b"CUSTOM" or user_at < 8 or int.from_bytes(parameters[:8], sys.byteorder) != address.value:
        raise EdgeloraError("this llama.cpp lays out its operations in a way that edgelora does not know", hint=_TESTED)
    return number, parameters, user_at


def values(node: Node) -> npt.NDArray[Any]:
    """A node's values, shape (ne[3], ne[2], ne[1], ne[0]) with its own strides; float32 or int32.

    In host memory they are not copied, and are valid until the callback returns.

    Raises:
        EdgeloraError: of another type.
    """
    dtype = DTYPES.get(node.type)
    if dtype is None:
        raise EdgeloraError(f"the node {weight_name(node)!r} has values of ggml type {node.type}, expected F32 or I32")
    size = ggml_function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)(ctypes.addressof(node))
    memory: Any
    if is_host(node):
        memory = (ctypes.c_char * size).from_address(node.data)
    else:
        memory = ctypes.create_string_buffer(size)
        get = ggml_function("ggml_backend_tensor_get", None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)
        get(ctypes.addressof(node), ctypes.addressof(memory), 0, size)
    return np.ndarray(tuple(node.ne[::-1]), dtype, buffer=memory, strides=tuple(node.nb[::-1]))


def is_host(node: Node) -> bool:
    """Whether the node's values lie in memory that the CPU can read."""
    return bool(ggml_function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)(node.buffer))


def weight_name(node: Node) -> str:
    """A node's name without what the scheduler puts around that of a copy: CUDA0#blk.0.attn_k.weight#0."""
    parts: Sequence[str] = node.name.decode("utf-8", errors="replace").split("#")
    return parts[1] if len(parts) > 1 else parts[0]
