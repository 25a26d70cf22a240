"""Different adapters in one decode on the CPU: each row with its own, at its own rank and scale, or with none.

llama.cpp applies the adapters that are set to every row of a batch. So what is set is a *socket*: a LoRA of rank 1 and
zeros on each matrix that any adapter changes, which gives llama.cpp's graph the places where a LoRA acts. Before the
graph is computed, `kernels/lowrank.c` puts its own operations there, and they read each row's adapters from tables that
are filled here. Nothing is stacked or copied when adapters come and go, a switch costs nothing, an adapter takes the
memory of its file, and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine import kernels
from edgelora.engine.graph import custom_operation
from edgelora.engine.low_rank import Bits, Weights
from edgelora.engine.mixer import Parts, Runs, make_adapter
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, llama


class RowMixer:
    """The tables of one context, and its socket. Lives on the engine's thread.

    Args:
        max_rows: the largest batch.

    Raises:
        EdgeloraError: this llama.cpp lays out its graphs in an unknown way.
    """

    rows_are_independent = True

    def __init__(self, model: Model, max_rows: int) -> None:
        library = kernels.lowrank()
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
        self._named: Any = None
        self._hidden: npt.NDArray[np.float32] = np.empty(0, np.float32)

    @property
    def callback(self) -> tuple[Any, Any]:
        """See `Mixer`."""
        function = ctypes.cast(self._library.lowrank_on_node, llama().ggml_backend_sched_eval_callback)
        return function, ctypes.cast(ctypes.pointer(self._native), ctypes.c_void_p)

    @property
    def socket(self) -> Any:
        """See `Mixer`."""
        return self._socket.pointer if self._socket else None

    def plug(self, weights: Weights) -> Handle | None:
        """See `Mixer`. There is a new socket where an adapter changes matrices that none did before."""
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
        """See `Mixer`."""
        self._loaded = [each for each in self._loaded if each is not weights]
        weights.native = self._known = None
        self._keep = ()

    def is_ready(self, used: Sequence[Weights], wake: Callable[[], None]) -> bool:
        """See `Mixer`: tables are filled at once."""
        return True

    def fill(self, rows: Runs, outputs: Runs) -> None:
        """See `Mixer`."""
        self._native.stage = self._native.broken = 0
        self._native.names.count = len(self._names)
        if not self._names or (rows, outputs) == self._known:
            return
        parts, tables, stride = list[kernels.Part](), list[Any](), 1
        for index, runs in enumerate((rows, outputs)):
            starts = itertools.accumulate((n_rows for n_rows, _ in runs), initial=0)
            placed = [(row, n_rows, adapters) for row, (n_rows, adapters) in zip(starts, runs, strict=False)]
            made = list[kernels.Run]()
            for row, n_rows, adapters in sorted(placed, key=_by_adapter):
                made.append(kernels.Run(row, n_rows, len(parts), len(adapters)))
                offset = 0
                for weights, scale in adapters:
                    parts.append(kernels.Part(ctypes.addressof(weights.native), scale, offset))
                    offset += weights.width
                stride = max(stride, offset)
            row = sum(n_rows for n_rows, _ in runs)
            tables.append((kernels.Run * max(1, len(made)))(*made))
            self._native.tables[index] = kernels.Table(ctypes.addressof(tables[-1]), len(made), row)
        array = (kernels.Part * max(1, len(parts)))(*parts)
        self._native.parts, self._native.n_parts = ctypes.addressof(array), len(parts)
        if self._hidden.size < self._max_rows * stride:
            self._hidden = np.empty(self._max_rows * stride, np.float32)
        self._native.hidden, self._native.stride = self._hidden.ctypes.data, stride
        self._keep, self._known = (array, *tables), (rows, outputs)

    def stand_aside(self) -> None:
        """See `Mixer`."""
        self._native.names.count = self._native.broken = 0

    @property
    def problem(self) -> str:
        """See `Mixer`."""
        if not self._native.broken:
            return ""
        name = list(self._names)[self._native.broken - 1]
        return f"this model computes with {name} in a way in which adapters cannot be mixed"

    def unseen(self) -> list[str]:
        """See `Mixer`."""
        return [name for name, index in self._names.items() if not self._matrices[index].seen]

    def close(self) -> None:
        """See `Mixer`."""
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
            self._matrices[index] = kernels.Matrix(ctypes.addressof(self._native), n_in, n_out, 0, 0)
        self._native.names, self._named = kernels.named(list(self._names))
        self._native.matrices = ctypes.addressof(self._matrices)
        self._library.lowrank_index(ctypes.byref(self._native.names))
        self._known = None

    def _pairs(self, weights: Weights) -> Any:
        array = (kernels.Pair * len(self._names))()
        for name, pair in weights.pairs.items():
            array[self._names[name]] = kernels.Pair(
                pair.a.ctypes.data, pair.b.ctypes.data, pair.rank, pair.type, pair.factor
            )
        return array


def _by_adapter(run: tuple[int, int, Parts]) -> tuple[int, ...]:
    """Runs of one adapter are computed after each other, while its weights are in the processor's cache."""
    return tuple(id(weights) for weights, _ in run[2])
