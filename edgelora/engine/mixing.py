"""Different adapters in one decode: each row of a batch with its own, at its own rank and scale, or with none.

llama.cpp applies the adapters that are set to every row of a batch. So what is set is a *socket*: a LoRA of rank 1 and
zeros on each matrix that any adapter changes, which gives llama.cpp's graph the places where a LoRA acts. Before the
graph is computed, `kernels/lowrank.c` puts its own operations there, and they read each row's adapters from tables that
are filled here. Nothing is stacked or copied when adapters come and go, a switch costs nothing, an adapter takes the
memory of its file, and a row's result does not depend on the rows beside it.

This is llama.cpp's CPU backend only; adapters on experts or token embeddings have no such place. `why_not` and
`problem_of` say what stands in the way, and the scheduler then lets adapters take turns.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.block_types import TYPES
from converters.writer import TensorSpec, Value, header_bytes
from edgelora.engine import kernels
from edgelora.engine.devices import backend_name
from edgelora.engine.graph import custom_operation
from edgelora.engine.low_rank import Bits, Weights
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.errors import EdgeloraError

Parts = tuple[tuple[Weights, float], ...]
"""The adapters of a row, each with its scale; empty for the bare base."""
Runs = Sequence[tuple[int, Parts]]
"""The rows of a batch: how many follow each other with the same adapters, and which."""


def why_not() -> str:
    """Why this machine cannot mix adapters in a decode; empty if it can."""
    if backend_name() != "CPU":
        return f"llama.cpp computes on {backend_name()}; mixing runs on the CPU"
    if kernels.library() is None:
        return "there is no C compiler that could build its kernels (or EDGELORA_NATIVE=0 is set)"
    return ""


class Mixer:
    """The tables of one context, and its socket. Lives on the engine's thread.

    Args:
        max_rows: the largest batch.

    Raises:
        EdgeloraError: `why_not`, or this llama.cpp lays out its graphs in an unknown way.
    """

    def __init__(self, model: Model, max_rows: int) -> None:
        if problem := why_not():
            raise EdgeloraError(problem)
        library = kernels.library()
        assert library is not None
        self._library, self._model, self._max_rows = library, model, max_rows
        self._names: dict[str, int] = {}  # matrix to its index
        self._loaded: list[Weights] = []
        self._socket: Handle | None = None
        self._native = kernels.Mixer()
        operation, parameters, user_at = custom_operation(library.lowrank_up)
        self._native.custom, self._native.user_at = operation, user_at
        ctypes.memmove(self._native.custom_params, parameters, len(parameters))
        self._known: tuple[Runs, Runs] | None = None
        self._keep: tuple[Any, ...] = ()
        self._matrices: Any = None
        self._slots: Any = None
        self._hidden: npt.NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def callback(self) -> tuple[Any, Any]:
        """`cb_eval` and its argument."""
        function = ctypes.cast(self._library.lowrank_on_node, llama().ggml_backend_sched_eval_callback)
        return function, ctypes.cast(ctypes.pointer(self._native), ctypes.c_void_p)

    @property
    def socket(self) -> Any:
        """The adapter to set on the context, None while there is none to mix."""
        return self._socket.pointer if self._socket else None

    def plug(self, weights: Weights) -> Handle | None:
        """Make room for an adapter. Where it changes matrices that none did before, there is a new `socket`.

        Returns:
            The old socket, to be closed once no context has it set.

        Raises:
            EdgeloraError: llama.cpp refuses the socket.
        """
        old = None
        if missing := [name for name in weights.pairs if name not in self._names]:
            names = {name: index for index, name in enumerate([*self._names, *missing])}
            socket = make_adapter(self._model, {name: self._zeros(name) for name in names})
            old, self._socket, self._names = self._socket, socket, names
            self._index()
            for each in self._loaded:
                each.native = self._pairs(each)
        if weights not in self._loaded:
            self._loaded.append(weights)
            weights.native = self._pairs(weights)
        return old

    def unplug(self, weights: Weights) -> None:
        """Forget an adapter that no row uses any more."""
        self._loaded = [each for each in self._loaded if each is not weights]
        weights.native = self._known = None
        self._keep = ()

    def fill(self, rows: Runs, outputs: Runs) -> None:
        """Say which adapters the rows of the next decode have, and those of its rows whose logits are wanted."""
        self._native.stage = self._native.broken = 0
        self._native.n_matrices = len(self._names)
        if not self._names or (rows, outputs) == self._known:
            return
        parts, tables, stride = list[kernels.Part](), list[Any](), 1
        for index, runs in enumerate((rows, outputs)):
            made, row = list[kernels.Run](), 0
            for n_rows, adapters in runs:
                made.append(kernels.Run(row, n_rows, len(parts), len(adapters)))
                offset = 0
                for weights, scale in adapters:
                    parts.append(kernels.Part(ctypes.addressof(weights.native), scale, offset))
                    offset += weights.width
                row, stride = row + n_rows, max(stride, offset)
            tables.append((kernels.Run * max(1, len(made)))(*made))
            self._native.tables[index] = kernels.Table(ctypes.addressof(tables[-1]), len(made), row)
        array = (kernels.Part * max(1, len(parts)))(*parts)
        self._native.parts, self._native.n_parts = ctypes.addressof(array), len(parts)
        if self._hidden.size < self._max_rows * stride:
            self._hidden = np.empty(self._max_rows * stride, np.float32)
        self._native.hidden, self._native.stride = self._hidden.ctypes.data, stride
        self._keep, self._known = (array, *tables), (rows, outputs)

    def stand_aside(self) -> None:
        """Adapters of llama.cpp's own are set for the next decode; its graph is left as it is."""
        self._native.n_matrices = self._native.broken = 0

    @property
    def problem(self) -> str:
        """After a decode: in what its graph was not as expected, so that its logits are wrong; empty if it was."""
        if not self._native.broken:
            return ""
        name = list(self._names)[self._native.broken - 1]
        return f"this model computes with {name} in a way in which adapters cannot be mixed"

    def unseen(self) -> list[str]:
        """Matrices whose adapters no graph has applied so far."""
        return [name for name, index in self._names.items() if not self._matrices[index].seen]

    def close(self) -> None:
        """Free the socket; no context may have it set."""
        if self._socket:
            self._socket.close()
        self._socket = None

    def _zeros(self, name: str) -> tuple[Bits, Bits]:
        n_out, n_in = self._model.header.tensors[name].shape
        return np.zeros((1, n_in), np.float32), np.zeros((n_out, 1), np.float32)

    def _index(self) -> None:
        count = len(self._names)
        self._matrices = (kernels.Matrix * count)()
        for name, index in self._names.items():
            n_out, n_in = self._model.header.tensors[name].shape
            self._matrices[index] = kernels.Matrix(ctypes.addressof(self._native), n_in, n_out, 0, 0, name.encode())
        n_slots = 1 << (2 * count).bit_length()
        self._slots = (ctypes.c_int32 * n_slots)()
        self._native.matrices = ctypes.addressof(self._matrices)
        self._native.slots, self._native.n_slots = ctypes.addressof(self._slots), n_slots
        self._native.n_matrices = count
        self._library.lowrank_index(ctypes.addressof(self._native))
        self._known = None

    def _pairs(self, weights: Weights) -> Any:
        array = (kernels.Pair * len(self._names))()
        for name, pair in weights.pairs.items():
            array[self._names[name]] = kernels.Pair(
                pair.a.ctypes.data, pair.b.ctypes.data, pair.rank, pair.type, pair.factor
            )
        return array


def make_adapter(model: Model, pairs: Mapping[str, tuple[Bits, Bits]]) -> Handle:
    """An adapter of llama.cpp's own from float32 arrays: matrix to A, (rank, n_in), and B, (n_out, rank).

    Raises:
        EdgeloraError: llama.cpp refuses it.
    """
    tensors = {
        f"{name}.lora_{side}": array for name, pair in pairs.items() for side, array in zip("ab", pair, strict=True)
    }
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": model.architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    specs = [TensorSpec(name, array.shape, TYPES["F32"]) for name, array in tensors.items()]
    descriptor, path = tempfile.mkstemp(prefix="edgelora-socket-", suffix=".gguf")
    try:
        with open(descriptor, "wb") as file:
            file.write(header_bytes(metadata, specs))
            for array in tensors.values():
                file.write(array.tobytes() + bytes(-array.nbytes % 32))
        forget_log()
        pointer = llama().llama_adapter_lora_init(model.pointer, os.fsencode(path))
        if not pointer:
            raise EdgeloraError(f"llama.cpp refuses a LoRA on {', '.join(pairs)}: {reason()}")
        return Handle(pointer, llama().llama_adapter_lora_free)
    finally:
        Path(path).unlink(missing_ok=True)
