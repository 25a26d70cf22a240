"""Different adapters in one decode on any backend: all of them on every row, and masks that let each row have its own.

The socket is a *stack*: the A of the adapters in use one below the other, their B side by side, as one LoRA on the
device. Before the graph is computed, `kernels/stack.c` puts a product with a mask between the two, whose rows have the
scales of that row's adapters and zeros for the others'. The masks lie on each device that computes, and are set
(`ggml_backend_tensor_set`) before a decode whose rows differ from the last one's.

A stack is put together on another thread when an adapter comes into use that it lacks, and holds those that were used
last as well, while there are few enough; decodes go on with the old one meanwhile. Its sums have another order for
other adapters, so a row's last bits depend on which are in it: deterministic requests take turns instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine import kernels
from edgelora.engine.graph import InitParams, Node, elementwise_operations, operations
from edgelora.engine.low_rank import F16, Bits, LowRank, Weights, untiled, widened
from edgelora.engine.mixer import Runs, adapter_file, load_adapter
from edgelora.engine.model import Model
from edgelora.engine.native import ggml_function, llama, reason
from edgelora.errors import EdgeloraError

MAX_RANK = 512
"""Of a stack, as long as those in use do not need more: what is in it is computed for every row."""
ALIGNED = 32
"""Ranks of a stack are a multiple of this, which kernels like."""
MAX_NAME = 40
"""Bytes of a matrix's name that the scheduler's copies of it still have room for: DEVICE#NAME.lora_a#0."""
TABLES = 2

Layout = tuple[tuple[int, int, float], ...]
"""What a matrix has of each adapter of a stack: its number, its rank there, and its factor."""


@dataclass(frozen=True)
class Plan:
    """A stack that was put together, and is not on the device yet.

    Attributes:
        members: its adapters.
        layouts: of its matrices; many have the same.
        matrices: name to the number of its layout.
        file: as a GGUF adapter.
    """

    members: tuple[Weights, ...]
    layouts: tuple[Layout, ...]
    matrices: Mapping[str, int]
    file: bytes


def plan_stack(architecture: str, shapes: Mapping[str, tuple[int, int]], members: Sequence[Weights]) -> Plan:
    """Put adapters together; on any thread.

    Args:
        shapes: matrix to (n_out, n_in).
    """
    names = dict.fromkeys(name for weights in members for name in weights.pairs)
    pairs, layouts, matrices = dict[str, tuple[Bits, Bits]](), dict[Layout, int](), dict[str, int]()
    for name in names:
        has = [(index, weights.pairs[name]) for index, weights in enumerate(members) if name in weights.pairs]
        layout = tuple((index, pair.rank, pair.factor) for index, pair in has)
        matrices[name] = layouts.setdefault(layout, len(layouts))
        pairs[name] = _stacked([pair for _, pair in has], *shapes[name])
    return Plan(tuple(members), tuple(layouts), matrices, adapter_file(architecture, pairs))


def _stacked(pairs: Sequence[LowRank], n_out: int, n_in: int) -> tuple[Bits, Bits]:
    """A, (rank, n_in), and B, (n_out, rank), of all; in the bits of float16 where all are that, else in float32."""
    halves = all(pair.type == F16 for pair in pairs)
    a = [pair.a if halves else widened(pair.a, pair.type) for pair in pairs]
    b = [untiled(pair.b, n_out) if halves else widened(untiled(pair.b, n_out), pair.type) for pair in pairs]
    if spare := padded(sum(pair.rank for pair in pairs)) - sum(pair.rank for pair in pairs):
        a.append(np.zeros((spare, n_in), a[0].dtype))
        b.append(np.zeros((n_out, spare), b[0].dtype))
    return np.concatenate(a), np.concatenate(b, axis=1)


def padded(rank: int) -> int:
    return -(-rank // ALIGNED) * ALIGNED


def mask_of(layout: Layout, members: Sequence[Weights], runs: Runs) -> npt.NDArray[np.float32]:
    """What the hidden values of each row are multiplied with: (rows, ranks of the stack)."""
    mask = np.zeros((sum(n_rows for n_rows, _ in runs), padded(sum(rank for _, rank, _ in layout))), np.float32)
    places, at = dict[int, tuple[slice, float]](), 0
    for index, rank, factor in layout:
        places[id(members[index])] = slice(at, at + rank), factor
        at += rank
    row = 0
    for n_rows, parts in runs:
        for weights, scale in parts:
            if id(weights) in places:
                ranks, factor = places[id(weights)]
                mask[row : row + n_rows, ranks] += np.float32(scale * factor)
        row += n_rows
    return mask


class Stack:
    """A stack on the devices, with masks for at most `max_rows` rows.

    Raises:
        EdgeloraError: there is no room for it.
    """

    def __init__(self, model: Model, plan: Plan, devices: Sequence[int], max_rows: int) -> None:
        self.plan = plan
        self.names = list(plan.matrices)
        self.named, self._memory = kernels.named(self.names)
        self.places = (kernels.Place * len(self.names))()
        for place, layout in zip(self.places, plan.matrices.values(), strict=True):
            place.layout = layout
        with ExitStack() as undo:
            self.adapter = load_adapter(model, plan.file, self.names)
            undo.callback(self.adapter.close)
            sizes = [padded(sum(rank for _, rank, _ in layout)) for layout in plan.layouts for _ in range(TABLES)]
            made = [[*_tensors(device, sizes, max_rows, undo)] for device in devices]
            self._undo = undo.pop_all()
        self._set = ggml_function("ggml_backend_tensor_set", None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)
        self._tensors = list(zip(*made, strict=True))  # of each layout and table, one for each device
        flat = [tensor for each in self._tensors for tensor in each]
        self.masks = (ctypes.c_void_p * len(flat))(*flat)
        self._known: list[Runs] = [(), ()]

    def fill(self, tables: Sequence[Runs]) -> None:
        """Set the masks for a decode of these rows, and of those of them whose logits are wanted."""
        for table, runs in enumerate(tables):
            if self._known[table] == runs:
                continue
            for index, layout in enumerate(self.plan.layouts):
                mask = mask_of(layout, self.plan.members, runs)
                for tensor in self._tensors[index * TABLES + table]:
                    node = Node.from_address(tensor)  # as many rows of it as there are; it has memory for more
                    node.ne[1], node.nb[2:] = len(mask), [mask.nbytes] * 2
                    self._set(tensor, mask.ctypes.data, 0, mask.nbytes)
            self._known[table] = runs

    def close(self) -> None:
        """Free it; no context may have its adapter set."""
        self._undo.close()


class StackMixer:
    """The stack of one context, and its masks. Lives on the engine's thread.

    Args:
        max_rows: the largest batch.

    Raises:
        EdgeloraError: this llama.cpp lays out its graphs in an unknown way.
    """

    rows_are_independent = False

    def __init__(self, model: Model, max_rows: int) -> None:
        library = kernels.stack()
        assert library is not None
        self._library, self._model, self._max_rows = library, model, max_rows
        self._devices = _devices()
        self._loaded: list[Weights] = []  # who was used last comes last
        self._stack: Stack | None = None
        self._max_rank = MAX_RANK
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="edgelora-stack")
        self._planning: Future[Plan] | None = None
        self._leaving: list[Stack] = []  # contexts may have them set until after the next `fill`
        self._left: list[Stack] = []
        self._native = kernels.Stack()
        self._native.mul_mat = operations()[0]
        self._native.mul, self._native.scale = elementwise_operations()
        self._device_array = (ctypes.c_void_p * len(self._devices))(*self._devices)
        self._native.devices, self._native.n_devices = ctypes.addressof(self._device_array), len(self._devices)
        for field, name in (
            ("is_host", "ggml_backend_buffer_is_host"),
            ("type_of", "ggml_backend_buffer_get_type"),
            ("device_of", "ggml_backend_buft_get_device"),
        ):
            function = ggml_function(name, ctypes.c_void_p, ctypes.c_void_p)
            setattr(self._native, field, ctypes.cast(function, ctypes.c_void_p))

    @property
    def callback(self) -> tuple[Any, Any]:
        """See `Mixer`."""
        function = ctypes.cast(self._library.stack_on_node, llama().ggml_backend_sched_eval_callback)
        return function, ctypes.cast(ctypes.pointer(self._native), ctypes.c_void_p)

    @property
    def socket(self) -> Any:
        """See `Mixer`."""
        return self._stack.adapter.pointer if self._stack else None

    @property
    def problem(self) -> str:
        """See `Mixer`."""
        if self._native.broken and self._stack:
            name = self._stack.names[self._native.broken - 1]
            return f"this model computes with {name} in a way in which adapters cannot be mixed"
        return "this model's graph leaves adapters half applied" if self._native.open else ""

    def plug(self, weights: Weights) -> None:
        """See `Mixer`; the stack is put together when the adapter is used."""
        if long := [name for name in weights.pairs if len(name.encode()) > MAX_NAME]:
            raise EdgeloraError(f"the name {long[0]} is too long for adapters to be mixed")
        if weights not in self._loaded:
            self._loaded.append(weights)

    def unplug(self, weights: Weights) -> None:
        """See `Mixer`. It stays in the stack until that is put together anew, or nobody is left in it."""
        self._loaded = [each for each in self._loaded if each is not weights]
        if self._stack and not any(each in self._loaded for each in self._stack.plan.members):
            self._leaving.append(self._stack)
            self._stack = None

    def is_ready(self, used: Sequence[Weights], wake: Callable[[], None]) -> bool:
        """See `Mixer`."""
        self._loaded.sort(key=lambda each: each in used)  # stable
        if self._planning and self._planning.done():
            planning, self._planning = self._planning, None
            plan = planning.result()
            try:
                self._put(plan)
            except EdgeloraError:
                if len(plan.members) <= len(used):
                    raise
                self._max_rank = 0  # from now on without those that are not in use
        if not self._lacks(used):
            return True
        if self._planning is None:
            self._planning = self._planner.submit(self._plan, self._members(used))
            self._planning.add_done_callback(lambda _: wake())
        return False

    def fill(self, rows: Runs, outputs: Runs) -> None:
        """See `Mixer`. Where the stack lacks one of these, it is put together here and now."""
        for stack in self._left:
            stack.close()
        self._left, self._leaving = self._leaving, []
        used = [*dict.fromkeys(weights for runs in (rows, outputs) for _, parts in runs for weights, _ in parts)]
        if self._lacks(used):
            self._put(self._plan(self._members(used)))
        self.stand_aside()
        if self._stack:
            self._show(self._stack, (rows, outputs))

    def stand_aside(self) -> None:
        """See `Mixer`."""
        self._native.open = self._native.broken = self._native.names.count = 0

    def unseen(self) -> list[str]:
        """See `Mixer`; of the present stack."""
        if self._stack is None:
            return []
        return [name for name, place in zip(self._stack.names, self._stack.places, strict=True) if not place.seen]

    def close(self) -> None:
        """See `Mixer`."""
        self._planner.shutdown(wait=True, cancel_futures=True)
        for stack in (*self._left, *self._leaving, *([self._stack] if self._stack else [])):
            stack.close()
        self._left, self._leaving, self._stack = [], [], None

    def _lacks(self, used: Sequence[Weights]) -> bool:
        return any(self._stack is None or each not in self._stack.plan.members for each in used)

    def _members(self, used: Sequence[Weights]) -> list[Weights]:
        """Those in use, and of the others the ones that were used last, as far as there is room."""
        members = list(used)
        for each in reversed(self._loaded):
            if each not in members and sum(weights.width for weights in (*members, each)) <= self._max_rank:
                members.append(each)
        return members

    def _plan(self, members: Sequence[Weights]) -> Plan:
        tensors = self._model.header.tensors
        shapes = {name: tensors[name].shape[:2] for weights in members for name in weights.pairs}
        return plan_stack(self._model.architecture, {name: (n, m) for name, (n, m) in shapes.items()}, members)

    def _show(self, stack: Stack, tables: Sequence[Runs]) -> None:
        """Let the next graph be computed with this stack."""
        stack.fill(tables)
        native = self._native
        native.names, native.places = stack.named, ctypes.addressof(stack.places)
        native.masks = ctypes.addressof(stack.masks)
        native.n_rows[:] = [sum(n_rows for n_rows, _ in runs) for runs in tables]

    def _put(self, plan: Plan) -> None:
        """A stack takes the place of the one before."""
        stack = Stack(self._model, plan, self._devices, self._max_rows)
        self._library.stack_index(ctypes.byref(stack.named))
        if self._stack:
            self._leaving.append(self._stack)
        self._stack = stack


def _devices() -> list[int]:
    """The devices that may compute a graph's nodes; the first is the CPU."""
    count = ggml_function("ggml_backend_dev_count", ctypes.c_size_t)()
    get = ggml_function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind_of = ggml_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    found = [get(index) for index in range(count)]
    cpu = [device for device in found if kind_of(device) == 0]  # GGML_BACKEND_DEVICE_TYPE_CPU
    return [*cpu[:1], *(device for device in found if device not in cpu)]


def _tensors(device: int, sizes: Sequence[int], max_rows: int, undo: ExitStack) -> Iterator[int]:
    """Tensors of (max_rows, size) float32 in a device's memory."""
    pointer = ctypes.c_void_p
    init, free = ggml_function("ggml_init", pointer, InitParams), ggml_function("ggml_free", None, pointer)
    new = ggml_function("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    context = init(InitParams(512 * (len(sizes) + 1), None, True))
    undo.callback(free, context)
    tensors = [new(context, 0, size, max_rows) for size in sizes]
    buffer_type = ggml_function("ggml_backend_dev_buffer_type", pointer, pointer)(device)
    buffer = ggml_function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)(context, buffer_type)
    if not buffer:
        raise EdgeloraError(f"there is no room for the masks of a stack of adapters: {reason()}")
    undo.callback(ggml_function("ggml_backend_buffer_free", None, pointer), buffer)
    yield from tensors
