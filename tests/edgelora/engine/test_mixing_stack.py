"""Stacks of adapters: what is in them, their masks, and when they are put together anew.

That whole models compute with them what llama.cpp computes with its own adapters is in `test_mixing`.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.reader import read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.engine import kernels, mixing, mixing_stack
from edgelora.engine.engine import Engine
from edgelora.engine.graph import Node
from edgelora.engine.low_rank import BF16, F16, F32, LowRank, Weights, tiled, untiled, widened
from edgelora.engine.mixer import Parts, Runs
from edgelora.engine.mixing_stack import ALIGNED, Stack, StackMixer, mask_of, padded, plan_stack
from edgelora.engine.runtime import Runtime, Settings
from edgelora.engine.stream import Request
from edgelora.errors import EdgeloraError
from tests.edgelora.engine.gguf_copies import read_tensors
from tests.edgelora.engine.runtimes import runtime
from tests.edgelora.engine.traces import Traced, alone, assert_same_reply, together

pytestmark = pytest.mark.skipif(kernels.stack() is None, reason="needs a C compiler")
GREEDY = {"temperature": 0, "max_tokens": 12}
QUESTION = "Where does the miller live?"
ROUNDING = 0.05  # of logits on a base in F32, whose KV is in F16: sums of another order


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixer that is chosen where llama.cpp does not compute on the CPU; the CPU can compute with it as well."""
    monkeypatch.setattr(mixing, "backend_name", lambda: "another backend")


# What is in a stack


def weights_of(seed: int, rank: int, type: int, shapes: dict[str, tuple[int, int]], factor: float = 1.0) -> Weights:
    rng, pairs = np.random.default_rng(seed), {}
    for name, (n_out, n_in) in shapes.items():
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n_in), (n_out, rank)))
        bits = {F32: lambda x: x, F16: lambda x: x.astype(np.float16).view(np.uint16), BF16: bfloat16}[type]
        pairs[name] = LowRank(bits(a), tiled(bits(b)), type, factor)
    return Weights(pairs)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def values(pair: LowRank, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    return widened(pair.a, pair.type).astype(float), widened(untiled(pair.b, n_out), pair.type).astype(float)


@pytest.mark.parametrize("types", [(F32, F32, F32), (F16, F16, F16), (F16, BF16, F32)])
def test_a_masked_stack_is_each_rows_own_adapters(types: tuple[int, int, int], tmp_path: Path) -> None:
    shapes = {"first": (40, 24), "second": (33, 24), "third": (7, 83)}
    some = {name: shapes[name] for name in ("first", "third")}
    one = weights_of(1, 3, types[0], shapes, factor=2.0)
    two = weights_of(2, 40, types[1], some)
    three = weights_of(3, 8, types[2], {"second": shapes["second"]}, factor=0.5)
    plan = plan_stack("llama", shapes, [one, two, three])
    path = tmp_path / "stack.gguf"
    path.write_bytes(plan.file)
    stack = {name: array.astype(float) for name, array in read_tensors(path).items()}
    kinds = {tensor.type_name for tensor in read_header(path).tensors.values()}
    assert kinds == ({"F16"} if types == (F16, F16, F16) else {"F32"})
    twice: Parts = ((one, 1.0), (one, 0.5))
    runs: Runs = [(2, ((one, 1.0),)), (1, ()), (3, ((two, -0.5), (one, 2.0))), (1, ((three, 1.0),)), (1, twice)]
    rng = np.random.default_rng(9)
    for name, (n_out, n_in) in shapes.items():
        a, b = stack[f"{name}.lora_a"], stack[f"{name}.lora_b"]
        assert a.shape[0] == b.shape[1] == padded(a.shape[0])
        mask = mask_of(plan.layouts[plan.matrices[name]], plan.members, runs)
        x = rng.standard_normal((8, n_in))
        got, row = (mask * (x @ a.T)) @ b.T, 0
        for n_rows, parts in runs:
            want = np.zeros((n_rows, n_out))
            for weights, scale in parts:
                if pair := weights.pairs.get(name):
                    down, up = values(pair, n_out)
                    want += scale * pair.factor * (x[row : row + n_rows] @ down.T) @ up.T
            np.testing.assert_allclose(got[row : row + n_rows], want, rtol=1e-5, atol=1e-5)
            row += n_rows
    assert len(plan.layouts) == 2  # the first and the third are alike


def test_matrices_of_one_layout_share_their_masks() -> None:
    shapes = {f"blk.{i}": (32, 32) for i in range(9)}
    plan = plan_stack("llama", shapes, [weights_of(i, 4, F32, shapes) for i in range(3)])
    assert len(plan.layouts) == 1
    assert padded(12) == ALIGNED


# The graph


def graph_of_one(native: Any, place: Any) -> tuple[dict[str, Node], list[Any]]:
    """The five nodes of a matrix `w` as llama.cpp builds them, and what they point to."""
    a, b, x, product = Node(name=b"w.lora_a"), Node(name=b"w.lora_b"), Node(), Node()
    memory = [(ctypes.c_float * 64)() for _ in range(2)]
    nodes = {name: Node() for name in ("hidden", "change", "scaled", "sum")}
    for node, width, at in ((nodes["hidden"], 3, 0), (nodes["change"], 7, 1), (nodes["scaled"], 7, 1)):
        node.ne[:], node.nb[:] = (width, 2, 1, 1), (4, 4 * width, 8 * width, 8 * width)
        node.data, node.buffer = ctypes.addressof(memory[at]), 1
    for name, op, sources in (
        ("hidden", native.mul_mat, (a, x)),
        ("change", native.mul_mat, (b, nodes["hidden"])),
        ("scaled", native.scale, (nodes["change"],)),
        ("sum", 99, (product, nodes["scaled"])),
    ):
        nodes[name].op = op
        nodes[name].src[: len(sources)] = [ctypes.addressof(source) for source in sources]
    return nodes, [a, b, x, product, memory, place]


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        ("the scaling is not in place", lambda nodes: setattr(nodes["scaled"], "data", 8)),
        ("hidden is no product", lambda nodes: setattr(nodes["hidden"], "op", 99)),
        ("hidden has three dimensions", lambda nodes: nodes["hidden"].ne.__setitem__(2, 2)),
        ("rows that nobody spoke of", lambda nodes: nodes["hidden"].ne.__setitem__(1, 5)),
        ("a stack of another rank", lambda nodes: nodes["hidden"].ne.__setitem__(0, 4)),
        ("B of something else", lambda nodes: nodes["change"].src.__setitem__(1, 8)),
        ("something else than a scaling", lambda nodes: setattr(nodes["scaled"], "op", 99)),
        ("nothing follows", lambda nodes: nodes.pop("scaled")),
        ("", lambda nodes: None),
    ],
)
def test_a_graph_that_is_not_as_expected_is_found(broken: str, change: Any) -> None:
    library = kernels.stack()
    assert library is not None
    native, place, mask = kernels.Stack(mul=1, mul_mat=2, scale=3), kernels.Place(), Node()
    mask.ne[:] = (3, 2, 1, 1)
    native.names, memory = kernels.named(["w"])
    library.stack_index(ctypes.byref(native.names))
    masks = (ctypes.c_void_p * 2)(ctypes.addressof(mask), ctypes.addressof(mask))
    native.places, native.masks, native.n_devices = ctypes.addressof(place), ctypes.addressof(masks), 1
    native.n_rows[:] = (2, 1)
    always = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    native.is_host = ctypes.cast(always, ctypes.c_void_p)
    nodes, keep = graph_of_one(native, place)
    change(nodes)
    asked = [
        library.stack_on_node(ctypes.byref(node), ctypes.c_bool(True), ctypes.byref(native)) & 1
        for node in nodes.values()
    ]
    assert not any(asked)
    assert bool(native.broken or native.open) == bool(broken)
    assert place.seen == (0 if broken else 1)
    assert memory
    assert keep


# When it is put together


def made_of(made: Runtime) -> StackMixer:
    assert isinstance(made.mixer, StackMixer)
    return made.mixer


def test_an_adapter_that_comes_while_others_write_is_put_beside_them(base: Path, adapters: dict[str, Path]) -> None:
    requests = [Request(QUESTION, name, sampling={**GREEDY, "max_tokens": 40}) for name in ("red", "blue")]
    with runtime(Settings(base, threads=1, parallel=2), adapters) as made:
        lone = alone(made, requests)
    with runtime(Settings(base, threads=1, parallel=2), {"red": adapters["red"]}) as made:
        traced, mixer = Traced(made), made_of(made)
        first = traced.submit(requests[0])
        traced.until(lambda: len(first.logits) > 3)
        before = mixer._stack
        assert before is not None
        made.load_adapter(AdapterRef("blue", adapters["blue"]))
        assert mixer._stack is before  # nothing is done on the way of those who write
        second = traced.submit(requests[1])
        traced.until(lambda: len(second.logits) > 3)
        assert mixer._stack is not before
        assert len(mixer._stack.plan.members) == 2  # type: ignore[union-attr]
        traced.finish()
    for got, want in zip((first, second), lone, strict=True):
        assert_same_reply(got, want, ROUNDING)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks that hold no more than they must."""
    monkeypatch.setattr(mixing_stack, "MAX_RANK", 1)


@pytest.mark.usefixtures("small")
def test_who_writes_goes_on_while_a_stack_is_put_together(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, may_go_on = mixing_stack.plan_stack, threading.Event()

    def slowly(*arguments: Any) -> Any:
        assert may_go_on.wait(60)
        return plan(*arguments)

    requests = [Request(QUESTION, name, sampling={**GREEDY, "max_tokens": 40}) for name in ("red", "blue")]
    with runtime(Settings(base, threads=1, parallel=2), adapters) as made:
        lone, traced = alone(made, requests), Traced(made)
        first = traced.submit(requests[0])
        traced.until(lambda: len(first.logits) > 3)
        monkeypatch.setattr(mixing_stack, "plan_stack", slowly)
        second = traced.submit(requests[1])
        traced.step(10)
        assert len(first.logits) > 10
        assert not second.logits
        may_go_on.set()
        traced.finish()
    for got, want in zip((first, second), lone, strict=True):
        assert_same_reply(got, want, ROUNDING)


@pytest.mark.usefixtures("small")
def test_what_is_not_used_is_left_out_where_there_is_no_room(base: Path, adapters: dict[str, Path]) -> None:
    with runtime(Settings(base, threads=1, parallel=2), adapters) as made:
        red = together(made, [Request(QUESTION, "red", sampling=GREEDY)])[0]
        mixer = made_of(made)
        assert [each.width for each in mixer._stack.plan.members] == [made.adapters.get("red").weights.width]  # type: ignore[union-attr]
        blue, again = together(made, [Request(QUESTION, name, sampling=GREEDY) for name in ("blue", "red")])
        assert len(mixer._stack.plan.members) == 2  # type: ignore[union-attr]
        (want,) = alone(made, [Request(QUESTION, "blue", sampling=GREEDY)])
    assert_same_reply(again, red, ROUNDING)
    assert_same_reply(blue, want, ROUNDING)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many stacks are on the device."""
    alive, init, close = [0], Stack.__init__, Stack.close

    def made(self: Stack, *arguments: Any) -> None:
        init(self, *arguments)
        alive[0] += 1

    def closed(self: Stack) -> None:
        close(self)
        alive[0] -= 1

    monkeypatch.setattr(Stack, "__init__", made)
    monkeypatch.setattr(Stack, "close", closed)
    return alive


@pytest.mark.usefixtures("small")
def test_stacks_that_were_replaced_are_freed(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = counted(monkeypatch)
    with runtime(Settings(base, threads=1, parallel=1), adapters) as made:
        for _ in range(4):
            for name in ("red", "blue"):
                together(made, [Request(QUESTION, name, sampling=GREEDY)])
                assert alive[0] <= 3  # this one, and those that a context might still have set
        weights = weakref.ref(made.adapters.get("red").weights)
        made.unload_adapter("red")
        together(made, [Request(QUESTION, "blue", sampling=GREEDY)])
        gc.collect()
        assert weights() is None
    assert alive[0] == 0


def test_a_removed_adapter_leaves_the_device_once_nobody_is_in_its_stack(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = counted(monkeypatch)
    with runtime(Settings(base, threads=1, parallel=1), {"red": adapters["red"]}) as made:
        together(made, [Request(QUESTION, "red", sampling=GREEDY)])
        assert alive[0] == 1
        made.unload_adapter("red")
        together(made, [Request(QUESTION, sampling=GREEDY)])
        assert alive[0] == 0


def failing(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """No room for stacks of more adapters than that."""
    load, plan = mixing_stack.load_adapter, mixing_stack.plan_stack
    sizes: dict[int, int] = {}

    def planned(*arguments: Any) -> Any:
        made = plan(*arguments)
        sizes[id(made.file)] = len(made.members)
        return made

    def loaded(model: Any, file: bytes, matrices: Any) -> Any:
        if sizes[id(file)] > most:
            raise EdgeloraError("no room for it")
        return load(model, file, matrices)

    monkeypatch.setattr(mixing_stack, "plan_stack", planned)
    monkeypatch.setattr(mixing_stack, "load_adapter", loaded)


def test_where_there_is_little_room_a_stack_has_only_those_in_use(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime(Settings(base, threads=1, parallel=2), adapters) as made:
        want = alone(made, [Request(QUESTION, name, sampling=GREEDY) for name in ("red", "blue")])
        failing(monkeypatch, 1)
        made_of(made)._stack = None
        (red,) = together(made, [Request(QUESTION, "red", sampling=GREEDY)])
        assert_same_reply(red, want[0], ROUNDING)
        both = together(made, [Request(QUESTION, name, sampling=GREEDY) for name in ("red", "blue")])
        assert [str(each.error or "") for each in both].count("no room for it") == 1  # and the other one was answered
        assert sum(each.completion is not None for each in both) == 1


@pytest.mark.parametrize("reproducible", [False, True])
def test_deterministic_requests_take_turns(reproducible: bool, base: Path, adapters: dict[str, Path]) -> None:
    """With llama.cpp's own adapters: each alone, or, where every decode has as many rows, those of one adapter."""
    sampling = {**GREEDY, "temperature": 1.0}
    asked = [Request(QUESTION, "red", sampling={**sampling, "seed": n}, deterministic=True) for n in (3, 4)]
    parallel = 4 if reproducible else 1
    with runtime(
        Settings(base, threads=1, parallel=parallel, mode="switching", reproducible=reproducible), adapters
    ) as made:
        want = alone(made, asked)
    with runtime(Settings(base, threads=1, parallel=4, reproducible=reproducible), adapters) as made:
        others = [Request(QUESTION, name, sampling=GREEDY) for name in ("blue", "red")]
        got = together(made, [*others, *asked])[-2:]
    for mine, theirs in zip(got, want, strict=True):
        assert np.array_equal(mine.logits, theirs.logits)
        assert mine.text == theirs.text


def test_an_engine_says_that_it_mixes(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, adapters, threads=1, mode="mixed") as engine:
        assert engine.mode == "mixed"
        assert {engine.chat(QUESTION, adapter=name, sampling=GREEDY).adapter for name in ("red", "blue")} == {
            "red",
            "blue",
        }


def test_long_names_are_refused_by_name(base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing_stack, "MAX_NAME", 8)
    with Engine(base, adapters, threads=1) as engine:
        assert any("is too long for adapters to be mixed" in notice for notice in engine.notices)
        assert engine.chat(QUESTION, adapter="red", sampling=GREEDY).adapter == "red"
