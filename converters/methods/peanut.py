"""PEANuT (arXiv:2410.01870): the change is what a small network makes of the weight itself.

    h = f(A @ W)                                   A (rank, rows), h (rank, columns)
    h = f(E[i] @ h)                                for each encoder, (rank, rank)
    h = f(D[i] @ h) + what encoder depth-1-i got   for each decoder
    W' = W + scaling * B @ h                       B (rows, rank)

PEFT's names: <module>.peanut_A.weight, .peanut_B.weight, .peanut_encoders.<i>.weight, .peanut_decoders.<i>.weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converters.checkpoint import Floats
from converters.methods.activations import ACTIVATIONS
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, scaled
from converters.peft_settings import choice, number, rank, whole

MAX_DEPTH = 32  # deeper networks are refused


def read(module: Module) -> Iterator[Change]:
    depth, r = module.setting("depth"), module.setting("r")
    a, b = module.shape("a"), module.shape("b")
    if len(a) != 2 or b != a[::-1] or a[0] != r or 0 in a:
        raise ModuleProblem(f"A {a} and B {b} are not of rank {r}")
    network = {role for role in module.parts if role not in ("a", "b")}
    levels = range(min(depth, MAX_DEPTH + 1))
    if network != {f"{kind} {level}" for kind in ("encoder", "decoder") for level in levels}:
        raise ModuleProblem(f"has {len(network)} encoders and decoders, and depth {depth} asks for {depth} of each")
    if wrong := sorted(role for role in network if module.shape(role) != (r, r)):
        raise ModuleProblem(f"{wrong[0]} is {module.shape(wrong[0])}, and must be {(r, r)}")

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        return weight + scaled(module.load("b"), module.setting("scaling")) @ _network(module, weight, depth)

    yield Transformed(module.weight, (b[0], None), apply, by_rows=False)


def _network(module: Module, weight: Floats, depth: int) -> Floats:
    """What B multiplies, (rank, columns)."""
    function = ACTIVATIONS[module.setting("act_fn")]
    hidden, taken = function(module.load("a") @ weight), []
    for index in range(depth):
        taken.append(hidden)
        hidden = function(module.load(f"encoder {index}") @ hidden)
    for index in range(depth):
        hidden = function(module.load(f"decoder {index}") @ hidden) + taken.pop()
    return hidden


def _depth_parts() -> Iterator[tuple[str, Any]]:
    for kind in ("encoder", "decoder"):
        for index in range(MAX_DEPTH):
            yield f".peanut_{kind}s.{index}.weight", f"{kind} {index}"


METHOD = Method(
    "PEANuT",
    "arXiv:2410.01870",
    parts={".peanut_A.weight": "a", ".peanut_B.weight": "b", **dict(_depth_parts())},
    read=read,
    needed=("a", "b"),
    settings={"r": rank(32), "depth": whole(0), "act_fn": choice("relu", *ACTIVATIONS), "scaling": number(1.0)},
    free=("init_weights",),
)
