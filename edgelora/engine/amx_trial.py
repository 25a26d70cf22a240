"""A program: one small product of a quantized matrix with matrix tiles (Intel AMX), by the ggml in the folder given.

It ends with 0 where the product is right or this ggml has no tiles, and by a signal where it was compiled wrong: GCC 12
drops the stores that set the tiles up (its `_tile_loadconfig` names 8 of the 64 bytes that it reads), and `ldtilecfg`
faults on what is left. See `edgelora.engine.amx`, which runs it; it imports nothing of edgelora.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

F32, Q8_0 = 0, 8
WIDTH, ROWS, TOKENS = 64, 32, 4  # the smallest that tiles are used for


class InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def main(folder: Path) -> int:
    libraries = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]

    def call(name: str, result: Any, *arguments: Any) -> Any:
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype = result
        return function(*arguments)

    pointer, whole, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    registry = pointer(call("ggml_backend_cpu_reg", pointer))
    find = call("ggml_backend_reg_get_proc_address", pointer, registry, b"ggml_backend_dev_get_extra_bufts")
    device = pointer(call("ggml_backend_reg_dev_get", pointer, registry, size(0)))
    ways = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(find)(device)
    tiles = pointer(ways[0])
    if not tiles or call("ggml_backend_buft_name", ctypes.c_char_p, tiles) != b"AMX":
        return 0
    context = pointer(call("ggml_init", pointer, InitParams(1 << 20, None, True)))
    weight = pointer(call("ggml_new_tensor_2d", pointer, context, Q8_0, whole(WIDTH), whole(ROWS)))
    tokens = pointer(call("ggml_new_tensor_2d", pointer, context, F32, whole(WIDTH), whole(TOKENS)))
    product = pointer(call("ggml_mul_mat", pointer, context, weight, tokens))
    graph = pointer(call("ggml_new_graph", pointer, context))
    call("ggml_build_forward_expand", None, graph, product)

    def place(tensor: ctypes.c_void_p, way: ctypes.c_void_p) -> None:
        buffer = pointer(call("ggml_backend_buft_alloc_buffer", pointer, way, size(1 << 16)))
        start = pointer(call("ggml_backend_buffer_get_base", pointer, buffer))
        call("ggml_backend_tensor_alloc", ctypes.c_int, buffer, tensor, start)

    host = pointer(call("ggml_backend_cpu_buffer_type", pointer))
    for tensor, way in ((weight, tiles), (tokens, host), (product, host)):
        place(tensor, way)
    ones = (b"\x00\x3c" + b"\x01" * 32) * (WIDTH // 32 * ROWS)  # blocks of Q8_0: a scale of 1 and 32 ones
    call("ggml_backend_tensor_set", None, weight, ones, size(0), size(len(ones)))
    rows = (ctypes.c_float * (WIDTH * TOKENS))(*[1.0] * (WIDTH * TOKENS))
    call("ggml_backend_tensor_set", None, tokens, rows, size(0), size(ctypes.sizeof(rows)))
    call("ggml_backend_graph_compute", ctypes.c_int, pointer(call("ggml_backend_cpu_init", pointer)), graph)
    got = (ctypes.c_float * (ROWS * TOKENS))()
    call("ggml_backend_tensor_get", None, product, got, size(0), size(ctypes.sizeof(got)))
    return int(any(abs(value - WIDTH) > 1 for value in got))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
