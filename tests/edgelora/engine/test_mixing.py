"""Different adapters in one decode: the kernels alone, rows beside other rows, and the ways out where it cannot be."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from converters.base import convert_base
from converters.native.build import find_compiler
from converters.reader import read_header
from edgelora.engine import kernels, mixing, mixing_proof, mixing_rows
from edgelora.engine.engine import Engine
from edgelora.engine.graph import Node
from edgelora.engine.kernels import TILE
from edgelora.engine.low_rank import LowRank, problem_of, read_weights, tiled
from edgelora.engine.mixer import Parts, Runs
from edgelora.engine.mixing_rows import RowMixer
from edgelora.engine.mixing_stack import StackMixer
from edgelora.engine.runtime import Settings
from edgelora.engine.stream import Request
from edgelora.errors import ModelFileError, SettingsError
from edgelora.template import BUILTIN, ChatTemplate
from tests.edgelora.conftest import LINEARS, write_adapter
from tests.edgelora.engine.gguf_copies import read_tensors, write_copy
from tests.edgelora.engine.runtimes import runtime
from tests.edgelora.engine.traces import Traced, alone, assert_same_reply, largest_difference, together

needs_kernels = pytest.mark.skipif(bool(mixing.why_not()), reason=mixing.why_not() or "-")
QUESTION = "Tell me about Fennick."
GREEDY = {"temperature": 0, "max_tokens": 12}
RANDOM = {"temperature": 5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3}

# llama.cpp's kernels add up in another order where a batch has other rows, and KV is F16; with its own adapters it
# rounds x to the type of A. Seen: 0.016 on F32, and 0.27 on Q8_0, whose activations are quantized too: a sum that
# differs in its last bit goes to the next step of 127. Logits have a standard deviation of 2.2, other adapters' differ
# by 3 and more.
ROUNDING = {"f32": 0.05, "q8_0": 0.5}
ANOTHER_ADAPTER = 1.5
# A sum of 300 products in float32, of values near 1, against the same in float64.
FLOAT32 = 2e-5


@pytest.mark.skipif(find_compiler() is None or os.name != "posix", reason="needs a C compiler")
def test_where_there_is_a_compiler_adapters_are_mixed() -> None:
    """Or all of these tests would be skipped."""
    assert kernels.lowrank() is not None
    assert mixing.why_not() == "" or "llama.cpp computes on" in mixing.why_not()


# The kernels alone, on shapes of any width


TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
PairArrays = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_pairs(path: Path, pairs: PairArrays, type_name: str = "F32", alpha: float = 0.0) -> Path:
    """An adapter file with these A and B, of a type and with an alpha, for no base in particular."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, pair in pairs.items():
        for side, array in zip("ab", pair, strict=True):
            bits = gguf.quants.quantize(array, TYPES[type_name])
            writer.add_tensor(f"{name}.lora_{side}", bits, raw_dtype=TYPES[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Made:
    """An adapter on one matrix of any shape, read from its file, and the change that it stands for in float64."""

    def __init__(
        self, path: Path, seed: int, n_in: int, n_out: int, rank: int, type_name: str, alpha: float = 0.0
    ) -> None:
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((rank, n_in), dtype=np.float32) * np.float32(n_in**-0.5)
        b = rng.standard_normal((n_out, rank), dtype=np.float32)
        write_pairs(path, {"m": (a, b)}, type_name, alpha)
        header = read_header(path)
        assert not problem_of(header)
        self.weights = read_weights(header, path.read_bytes())
        kept = [gguf.quants.dequantize(gguf.quants.quantize(x, TYPES[type_name]), TYPES[type_name]) for x in (a, b)]
        self.change = kept[1].astype(float) @ kept[0].astype(float) * (alpha / rank if alpha else 1.0)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets that llama.cpp is not asked for: it knows no such matrices."""
    monkeypatch.setattr(mixing_rows, "make_adapter", lambda *_: SimpleNamespace(pointer=1, close=lambda: None))


def made_mixer(n_in: int, n_out: int, max_rows: int = 64) -> RowMixer:
    shapes = {"m": SimpleNamespace(shape=(n_out, n_in))}
    return RowMixer(SimpleNamespace(header=SimpleNamespace(tensors=shapes)), max_rows)  # type: ignore[arg-type]


def computed(
    mixer: RowMixer, x: np.ndarray, product: np.ndarray, rows: Sequence[Parts], threads: int = 1
) -> np.ndarray:
    """What the two operations make of the product W x (n_rows, n_out), in place: a row for each of x (n_rows, n_in)."""
    library = kernels.lowrank()
    assert library is not None
    runs = [(len(list(same)), parts) for parts, same in groups(rows)]
    mixer.fill(runs, runs)
    x, out = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(product, np.float32).copy()
    inputs, hidden, product_node, result = (Node() for _ in range(4))
    inputs.data, hidden.src[1] = x.ctypes.data, ctypes.addressof(inputs)
    product_node.data = result.data = out.ctypes.data
    result.src[0] = ctypes.addressof(product_node)
    for function, node in ((library.lowrank_down, hidden), (library.lowrank_up, result)):
        for thread in range(threads):
            matrix = ctypes.c_void_p(ctypes.addressof(mixer._matrices[0]))
            function(ctypes.c_void_p(ctypes.addressof(node)), thread, threads, matrix)
    return out


def groups(rows: Sequence[Parts]) -> Iterator[tuple[Parts, Iterator[Parts]]]:
    return itertools.groupby(rows)


@needs_kernels
@pytest.mark.parametrize("type_name", list(TYPES))
@pytest.mark.parametrize("rank", [1, 3, 4, 16, 64])
@pytest.mark.parametrize(("n_in", "n_out"), [(256, 128), (83, 40), (65, 7), (31, 33)])
def test_rows_among_others_are_the_same_bits_as_alone(
    type_name: str, rank: int, n_in: int, n_out: int, tmp_path: Path, sockets: None
) -> None:
    first = Made(tmp_path / "first.gguf", 1, n_in, n_out, rank, type_name, alpha=2.0 * rank)
    second = Made(tmp_path / "second.gguf", 2, n_in, n_out, 5, "F32")
    mixer = made_mixer(n_in, n_out)
    for made in (first, second):
        mixer.plug(made.weights)
    one, two = first.weights, second.weights
    rows: list[Parts] = [
        *[((one, 1.0),)] * 6,  # four at once, and two one by one
        (),
        ((two, -0.5),),
        ((one, 0.5), (two, 2.0)),
        ((one, -1.5),),
        ((one, 0.0),),
        *[((two, 1.0), (one, -0.25))] * 5,
        (),
    ]
    rng = np.random.default_rng(3)
    x = rng.standard_normal((len(rows), n_in), dtype=np.float32)
    product = rng.standard_normal((len(rows), n_out), dtype=np.float32)
    got = computed(mixer, x, product, rows)
    for threads in (2, 3, 7):
        assert np.array_equal(computed(mixer, x, product, rows, threads), got)
    order = rng.permutation(len(rows))
    shuffled = computed(mixer, x[order], product[order], [rows[i] for i in order])
    assert np.array_equal(shuffled, got[order])
    changes = {id(made.weights): made.change for made in (first, second)}
    for i, parts in enumerate(rows):
        by_itself = computed(mixer, x[i : i + 1], product[i : i + 1], [parts])
        assert np.array_equal(by_itself[0], got[i])
        exact = product[i] + sum((scale * (changes[id(w)] @ x[i]) for w, scale in parts), np.zeros(n_out))
        size = max(1.0, float(np.abs(exact).max()))
        assert np.abs(got[i] - exact).max() <= FLOAT32 * size * rank**0.5
    twin = computed(mixer, x, product, rows[::-1])
    assert np.abs(twin - got).max() > 0.1, "rows may have any adapter, so this test showed nothing"


@needs_kernels
def test_alpha_scales_what_its_file_says(tmp_path: Path, sockets: None) -> None:
    plain, halved = (Made(tmp_path / f"{alpha}.gguf", 1, 64, 32, 4, "F32", alpha) for alpha in (0.0, 2.0))
    assert (plain.weights.pairs["m"].factor, halved.weights.pairs["m"].factor) == (1.0, 0.5)
    mixer = made_mixer(64, 32)
    mixer.plug(plain.weights)
    mixer.plug(halved.weights)
    x, zeros = np.ones((2, 64), np.float32), np.zeros((2, 32), np.float32)
    whole, half = computed(mixer, x, zeros, [((plain.weights, 1.0),), ((halved.weights, 1.0),)])
    assert np.array_equal(whole * np.float32(0.5), half)
    assert np.abs(whole).max() > 0.1


@needs_kernels
def test_halves_below_the_normal_ones_are_exact(tmp_path: Path, sockets: None) -> None:
    """The smallest and the largest values of each type, in widths that are read lane by lane and one by one."""
    for type_name, extremes in (("F16", (6e-8, 6.1e-5, 65504.0)), ("BF16", (1e-38, 1e30)), ("F32", (1e-38, 1e30))):
        for value in extremes:
            a = np.zeros((1, 83), np.float32)
            a[0, [0, 82]] = value, -value
            path = write_pairs(tmp_path / "x.gguf", {"m": (a, np.ones((7, 1), np.float32))}, type_name)
            weights = read_weights(read_header(path), path.read_bytes())
            mixer = made_mixer(83, 7)
            mixer.plug(weights)
            x = np.zeros((2, 83), np.float32)
            x[0, 0], x[1, 82] = 1.0, 1.0
            got = computed(mixer, x, np.zeros((2, 7), np.float32), [((weights, 1.0),)] * 2)
            kind = TYPES[type_name]
            kept = gguf.quants.dequantize(gguf.quants.quantize(np.float32([[value]]), kind), kind).item()
            assert kept != 0
            assert got.tolist() == [[kept] * 7, [-kept] * 7], (type_name, value)


def test_tiles_hold_columns_rank_by_rank() -> None:
    b = np.arange(40 * 3, dtype=np.float32).reshape(40, 3)
    made = tiled(b)
    assert made.shape == (2, 3, TILE)
    assert made[1, 2, 7] == b[39, 2]
    assert not made[1, :, 8:].any()


# Rows beside rows, in a whole model


@pytest.fixture(params=[RowMixer, StackMixer])
def mixer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that is chosen for the CPU, and the one for any other backend, which the CPU can compute as well."""
    if request.param is StackMixer:
        monkeypatch.setattr(mixing, "backend_name", lambda: "another backend")
    return request.param


@pytest.fixture(scope="module")
def many(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of several ranks and types, one on some matrices only, one with an alpha."""
    folder = tmp_path_factory.mktemp("many")
    made = {
        f"r{rank}": write_adapter(folder / f"r{rank}.gguf", base, rank, rank=rank, strength=0.3 * rank**-0.5)
        for rank in (1, 3, 16, 64)
    }
    some = {name: None for name in lora_names(base, [each for each in LINEARS if each not in ("attn_v", "ffn_up")])}
    made["some"] = write_adapter(folder / "some.gguf", base, 5, strength=0.3, tensors=some)
    made["alpha"] = write_adapter(folder / "alpha.gguf", base, 6, metadata={"adapter.lora.alpha": 6.0})
    halves = {name: array.astype(np.float16) for name, array in read_tensors(made["r16"]).items()}
    made["halves"] = write_adapter(folder / "halves.gguf", base, 16, rank=16, tensors=halves)
    return made


def lora_names(base: Path, linears: Sequence[str], layers: Sequence[int] = (0, 1, 2, 3)) -> list[str]:
    return [f"blk.{layer}.{linear}.weight.lora_{side}" for layer in layers for linear in linears for side in "ab"]


REQUESTS = [
    Request(QUESTION, "red", sampling=GREEDY),
    Request("hello", "blue", sampling=GREEDY),
    Request("What is the river like? " * 12, "r64", sampling=GREEDY),
    Request(QUESTION, sampling=GREEDY),
    Request(QUESTION, {"r1": 0.7, "r16": -0.4}, sampling=GREEDY),
    Request("Who lives here?", "alpha", scale=-0.5, sampling=GREEDY),
    Request(QUESTION, "some", sampling=GREEDY),
    Request(QUESTION, "halves", scale=1.3, sampling=GREEDY),
]


@needs_kernels
@pytest.mark.parametrize("quant", ["f32", "q8_0"])
@pytest.mark.usefixtures("mixer")
def test_each_sequence_says_among_others_what_it_says_alone(
    quant: str, bases: dict[str, Path], adapters: dict[str, Path], many: dict[str, Path]
) -> None:
    settings = Settings(bases[quant], threads=2, parallel=len(REQUESTS))
    with runtime(settings, {**adapters, **many}) as made:
        assert all(made.adapters.get(name).is_mixable for name in made.adapters)
        mixed, lone = together(made, REQUESTS), alone(made, REQUESTS)
    for got, want in zip(mixed, lone, strict=True):
        assert_same_reply(got, want, ROUNDING[quant])
    if quant == "f32":  # whose kernels round otherwise where a batch has more rows
        differences = [largest_difference(got, want) for got, want in zip(mixed, lone, strict=True)]
        assert max(differences) > 0, "they were never decoded together"
    # the twin: each with its neighbour's
    for got, other in zip(mixed, lone[1:] + lone[:1], strict=True):
        assert np.abs(got.logits[0] - other.logits[0]).max() > ANOTHER_ADAPTER


@needs_kernels
def test_twin_rows_that_get_their_neighbours_adapters_are_found_out(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mixer: Any
) -> None:
    requests = [Request(QUESTION, name, sampling=GREEDY) for name in ("red", "blue")]
    fill = mixer.fill
    with runtime(Settings(base, threads=1, parallel=2), adapters) as made:
        lone = alone(made, requests)
        monkeypatch.setattr(mixer, "fill", lambda self, rows, outputs: fill(self, rows[::-1], outputs[::-1]))
        mixed = together(made, requests)
    assert max(largest_difference(got, want) for got, want in zip(mixed, lone, strict=True)) > ANOTHER_ADAPTER


@needs_kernels
@pytest.mark.parametrize("quant", ["f32", "q8_0"])
@pytest.mark.usefixtures("mixer")
def test_mixed_is_what_llama_cpp_computes_with_its_own_adapters(
    quant: str, bases: dict[str, Path], adapters: dict[str, Path], many: dict[str, Path]
) -> None:
    with runtime(Settings(bases[quant], threads=1, parallel=len(REQUESTS)), {**adapters, **many}) as made:
        mixed = together(made, REQUESTS)
    with runtime(Settings(bases[quant], threads=1, parallel=1, mode="switching"), {**adapters, **many}) as made:
        own = alone(made, REQUESTS)
    for got, want in zip(mixed, own, strict=True):
        assert_same_reply(got, want, ROUNDING[quant])
    assert np.abs(mixed[0].logits[0] - own[3].logits[0]).max() > ANOTHER_ADAPTER


@needs_kernels
@pytest.mark.usefixtures("mixer")
def test_texts_are_those_of_switching(base: Path, adapters: dict[str, Path]) -> None:
    said = {}
    for mode in ("mixed", "switching"):
        with Engine(base, adapters, threads=1, parallel=3, mode=mode) as engine:
            assert engine.mode == mode
            streams = [engine.stream(QUESTION, adapter=name, sampling=GREEDY) for name in ("red", "none", "blue")]
            said[mode] = [stream.completion.text for stream in streams]
    assert said["mixed"] == said["switching"]
    assert len(set(said["mixed"])) == 3


@needs_kernels
def test_the_socket_grows_while_streams_run(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """A second adapter brings matrices that the first had not; who writes goes on with the same text."""
    names = [name for name in lora_names(base, LINEARS) if "attn_v" not in name]
    little = write_adapter(tmp_path / "little.gguf", base, 8, strength=0.4, tensors=dict.fromkeys(names))
    sampling = {**RANDOM, "temperature": 0, "max_tokens": 30}
    requests = [Request(QUESTION, "little", sampling=sampling), Request(QUESTION, "red", sampling=sampling)]
    with runtime(Settings(base, threads=1, parallel=2), {"little": little, "red": adapters["red"]}) as made:
        lone = alone(made, requests)
    from edgelora.adapter_ref import AdapterRef

    with runtime(Settings(base, threads=1, parallel=2), {"little": little}) as made:
        assert made.mixer is not None
        traced = Traced(made)
        first = traced.submit(requests[0])
        traced.step(5)
        socket, matrices = made.mixer.socket, len(made.mixer._names)
        made.load_adapter(AdapterRef("red", adapters["red"]))
        assert len(made.mixer._names) > matrices
        assert made.mixer.socket is not socket
        second = traced.submit(requests[1])
        traced.finish()
    assert not first.error
    for got, want in zip((first, second), lone, strict=True):
        assert_same_reply(got, want, ROUNDING["f32"])


@needs_kernels
@pytest.mark.usefixtures("mixer")
def test_a_graph_without_adapters_is_the_bases_own(base: Path, adapters: dict[str, Path]) -> None:
    request = [Request(QUESTION, sampling=GREEDY)]
    with (
        runtime(Settings(base, threads=1, parallel=1), {}) as bare,
        runtime(Settings(base, threads=1, parallel=1), adapters) as made,
    ):
        want, got = alone(bare, request)[0], alone(made, request)[0]
        zero = alone(made, [Request(QUESTION, "red", scale=0.0, sampling=GREEDY)])[0]
    assert np.array_equal(got.logits, want.logits)
    assert np.array_equal(zero.logits, want.logits)


# The proof, and where mixing cannot be


def shifted(b: np.ndarray) -> np.ndarray:
    return tiled(np.roll(b, 1, axis=0))


def first_rows_get_the_others(rows: Runs) -> Runs:
    return [*rows[1:], rows[0]]


@needs_kernels
@pytest.mark.parametrize("broken", ["columns", "rows", "scale"])
def test_a_wrong_kernel_is_found_and_adapters_take_turns(
    broken: str, base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mixer: Any
) -> None:
    with Engine(base, adapters, threads=1, mode="switching") as engine:
        want = {name: engine.chat(QUESTION, adapter=name, sampling=GREEDY).text for name in ("red", "none", "blue")}
    fill = mixer.fill
    if broken == "columns":
        monkeypatch.setattr(mixing_proof, "tiled", shifted)
    elif broken == "rows":
        monkeypatch.setattr(
            mixer, "fill", lambda self, rows, outputs: fill(self, *map(first_rows_get_the_others, (rows, outputs)))
        )
    else:
        made = lambda a, b, kind, factor: LowRank(a, b, kind, 2 * factor)  # noqa: E731
        monkeypatch.setattr(mixing_proof, "LowRank", made)
    with Engine(base, adapters, threads=1, parallel=3) as engine:
        assert [f"{name}: it does not share decodes with other adapters" for name in ("red", "blue")] == [
            notice.split(": mixed logits differ")[0] for notice in engine.notices if "share" in notice
        ]
        streams = {name: engine.stream(QUESTION, adapter=name, sampling=GREEDY) for name in want}
        assert {name: stream.completion.text for name, stream in streams.items()} == want


@needs_kernels
def test_a_wrong_query_is_found(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [linear for linear in LINEARS if linear not in ("attn_q", "attn_k")]
    path = write_adapter(tmp_path / "qk.gguf", base, 3, tensors=dict.fromkeys(lora_names(base, others)))
    monkeypatch.setattr(mixing_proof, "tiled", shifted)
    with Engine(base, {"qk": path}, threads=1) as engine:
        assert any("does not share decodes" in notice for notice in engine.notices)


def test_without_kernels_adapters_take_turns(base: Path, adapters: dict[str, Path]) -> None:
    script = (
        "import sys\n"
        "from edgelora.engine.engine import Engine\n"
        "from edgelora.errors import SettingsError\n"
        "base, adapters = sys.argv[1], sys.argv[2:]\n"
        "with Engine(base, adapters, threads=1) as engine:\n"
        "    greedy = {'temperature': 0, 'max_tokens': 6}\n"
        "    print(engine.mode, engine.chat('hello', adapter='red', sampling=greedy).text)\n"
        "try:\n"
        "    Engine(base, adapters, threads=1, mode='mixed')\n"
        "except SettingsError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(base), *map(str, adapters.values())]
    done = subprocess.run(
        command, env={**os.environ, "EDGELORA_NATIVE": "0"}, capture_output=True, text=True, timeout=60
    )
    with Engine(base, adapters, threads=1, mode="switching") as engine:
        want = engine.chat("hello", adapter="red", sampling={"temperature": 0, "max_tokens": 6}).text
    said, refusal = done.stdout.splitlines()
    assert said == f"switching {want}"
    assert "adapters cannot be mixed here: there is no C compiler" in refusal
    assert done.stderr == ""


def test_a_mode_that_is_none_is_refused(base: Path) -> None:
    with pytest.raises(SettingsError, match="mode is 'mix', expected auto or mixed or switching"):
        Engine(base, mode="mix")


@pytest.fixture(scope="module")
def untied(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base whose output is its own, an adapter on it, one on the token embeddings, and one that can be mixed."""
    folder = tmp_path_factory.mktemp("untied")
    embeddings = read_tensors(base)["token_embd.weight"]
    path = write_copy(base, folder / "untied.gguf", {"output.weight": embeddings * 1.1})
    rng, nothing = np.random.default_rng(9), dict.fromkeys(lora_names(base, LINEARS))
    n_vocab, width = embeddings.shape
    pair = {
        "a": rng.standard_normal((4, width), dtype=np.float32) * np.float32(width**-0.5),
        "b": rng.standard_normal((n_vocab, 4), dtype=np.float32) * np.float32(0.5),
    }
    looked_up = {
        "token_embd.weight.lora_a": rng.standard_normal((n_vocab, 4), dtype=np.float32) * np.float32(0.1),
        "token_embd.weight.lora_b": rng.standard_normal((width, 4), dtype=np.float32) * np.float32(0.1),
    }
    output = {f"output.weight.lora_{side}": array for side, array in pair.items()}
    return path, {
        "embedding": write_adapter(folder / "embedding.gguf", path, 1, tensors={**nothing, **looked_up}),
        "output": write_adapter(folder / "output.gguf", path, 1, tensors={**nothing, **output}),
        "red": write_adapter(folder / "red.gguf", path, 1),
    }


@needs_kernels
@pytest.mark.usefixtures("mixer")
def test_embeddings_take_turns_beside_mixed_ones(untied: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = untied
    requests = [Request(QUESTION, name, sampling=GREEDY) for name in ("embedding", "red", "output", "none")]
    with runtime(Settings(base, threads=1, parallel=4), adapters) as made:
        mixable = {name: made.adapters.get(name).is_mixable for name in made.adapters}
        assert mixable == {"embedding": False, "output": True, "red": True}
        mixed = together(made, requests)
    with runtime(Settings(base, threads=1, parallel=1, mode="switching"), adapters) as made:
        own = alone(made, requests)
    for got, want in zip(mixed, own, strict=True):
        assert_same_reply(got, want, ROUNDING["f32"])
    first = [trace.logits[0] for trace in own]
    assert min(np.abs(a - b).max() for i, a in enumerate(first) for b in first[:i]) > 0.3


@needs_kernels
def test_infinite_logits_are_no_answer(untied: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = untied
    with runtime(Settings(base, threads=1, parallel=1), adapters) as made:
        (trace,) = together(made, [Request(QUESTION, "output", scale=3e38, sampling={"max_tokens": 3, "seed": 1})])
    assert np.isinf(trace.logits[0]).any()
    assert isinstance(trace.error, ModelFileError)


@needs_kernels
@pytest.mark.train
def test_experts_take_turns_beside_mixed_ones(tmp_path: Path) -> None:
    """Adapters on experts have three dimensions; router and attention of the same model can be mixed."""
    from tests.equivalence.tiny_models import build

    base = convert_base(build("qwen3-moe", tmp_path / "moe"), tmp_path / "moe.gguf", quant="f32").path
    experts, rng = dict[str, np.ndarray](), np.random.default_rng(5)
    for name, tensor in read_header(base).tensors.items():
        if name.endswith("_exps.weight"):
            n_experts, n_out, n_in = tensor.shape
            experts[f"{name}.lora_a"] = rng.standard_normal((n_experts, 4, n_in), dtype=np.float32) * n_in**-0.5
            experts[f"{name}.lora_b"] = rng.standard_normal((n_experts, n_out, 4), dtype=np.float32)
    assert experts
    adapters = {
        "experts": write_adapter(tmp_path / "experts.gguf", base, 1, tensors=experts),
        "red": write_adapter(tmp_path / "red.gguf", base, 2, strength=0.3),
        "blue": write_adapter(tmp_path / "blue.gguf", base, 3, strength=0.3),
    }
    asked = [Request("bread and boats", name, sampling=GREEDY) for name in ("experts", "red", "blue", "none")]
    template = ChatTemplate(BUILTIN["plain"])
    with runtime(Settings(base, threads=1, parallel=4, chat_template=template), adapters) as made:
        assert [made.adapters.get(name).is_mixable for name in adapters] == [False, True, True]
        mixed = together(made, asked)
    with runtime(Settings(base, threads=1, parallel=1, chat_template=template, mode="switching"), adapters) as made:
        own = alone(made, asked)
    for got, want in zip(mixed, own, strict=True):
        assert_same_reply(got, want, ROUNDING["f32"])
    first = [trace.logits[0] for trace in own]
    assert min(np.abs(a - b).max() for i, a in enumerate(first) for b in first[:i]) > 4 * ROUNDING["f32"]


@needs_kernels
@pytest.mark.train
def test_a_recurrent_state_that_was_no_number_is_good_again(tmp_path: Path) -> None:
    """A state is not masked as cells of KV are, and zero times NaN is NaN."""
    from tests.equivalence.tiny_models import build

    base = convert_base(build("qwen3.5", tmp_path / "recurrent"), tmp_path / "recurrent.gguf", quant="f32").path
    adapters = {
        "huge": write_adapter(tmp_path / "huge.gguf", base, 1, strength=1e30),
        "red": write_adapter(tmp_path / "red.gguf", base, 2, strength=0.3),
    }
    asked = [Request("bread and boats", name, sampling=GREEDY) for name in ("red", "none")]
    template = ChatTemplate(BUILTIN["plain"])
    with runtime(Settings(base, threads=1, parallel=1, chat_template=template), adapters) as made:
        before = alone(made, asked)
        broken = together(made, [Request("bread", "huge", sampling=GREEDY)] * 2)
        after = together(made, asked)
    assert all(isinstance(trace.error, ModelFileError) for trace in broken)
    for got, want in zip(after, before, strict=True):
        assert_same_reply(got, want, ROUNDING["f32"])


@pytest.fixture(scope="module")
def odd(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that only llama.cpp itself can apply: one of its A and B are of two types."""
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    half = np.random.default_rng(4).standard_normal((256, 4)).astype(np.float16) * np.float16(0.15)
    return write_adapter(path, base, 4, tensors={"blk.0.attn_q.weight.lora_b": half})


@needs_kernels
@pytest.mark.usefixtures("mixer")
def test_a_blend_of_one_that_mixes_and_one_that_does_not(base: Path, adapters: dict[str, Path], odd: Path) -> None:
    request = [Request(QUESTION, {"red": 0.5, "odd": 0.5}, sampling=GREEDY)]
    found = {}
    for mode in ("auto", "switching"):
        with runtime(Settings(base, threads=1, parallel=1, mode=mode), {**adapters, "odd": odd}) as made:
            (found[mode],) = alone(made, request)
    assert_same_reply(found["auto"], found["switching"], ROUNDING["f32"])


def test_a_blend_of_two_names_of_one_content_is_their_sum(base: Path, adapters: dict[str, Path]) -> None:
    named = {"red": adapters["red"], "twin": adapters["red"]}
    with runtime(Settings(base, threads=1, parallel=1, mode="switching"), named) as made:
        whole, blend = alone(
            made,
            [Request(QUESTION, "red", sampling=GREEDY), Request(QUESTION, {"red": 0.5, "twin": 0.5}, sampling=GREEDY)],
        )
    assert_same_reply(blend, whole, ROUNDING["f32"])


@needs_kernels
@pytest.mark.usefixtures("mixer")
def test_a_blend_of_two_names_of_one_content_is_their_sum_when_mixed(base: Path, adapters: dict[str, Path]) -> None:
    named = {"red": adapters["red"], "twin": adapters["red"]}
    with runtime(Settings(base, threads=1, parallel=1), named) as made:
        whole, blend, half = alone(
            made,
            [
                Request(QUESTION, "red", sampling=GREEDY),
                Request(QUESTION, {"red": 0.5, "twin": 0.5}, sampling=GREEDY),
                Request(QUESTION, "red", scale=0.5, sampling=GREEDY),
            ],
        )
    assert_same_reply(blend, whole, ROUNDING["f32"])
    assert np.abs(half.logits[0] - whole.logits[0]).max() > 0.3


@needs_kernels
def test_a_graph_that_is_odd_only_in_a_long_prompt_lets_adapters_take_turns(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mixer: Any
) -> None:
    """What the trial cannot show: nobody's reply is lost, or wrong, and the engine says so."""
    asked = [Request(f"{QUESTION} " * 8, name, sampling=GREEDY) for name in ("red", "none", "blue")]
    with runtime(Settings(base, threads=1, parallel=1, mode="switching"), adapters) as made:
        own = alone(made, asked)

    def odd(self: Any) -> str:
        if not self._native.names.count:
            return ""
        rows = self._native.tables[0].n_rows if mixer is RowMixer else self._native.n_rows[0]
        return "it is odd" if rows > 30 else ""

    monkeypatch.setattr(mixer, "problem", property(odd))
    with runtime(Settings(base, threads=1, parallel=3), adapters) as made:
        steps = Traced(made)
        first = steps.submit(Request(QUESTION, "blue", sampling=GREEDY))
        steps.until(lambda: len(first.logits) > 2)
        later = together(made, asked)
        for got, want in zip(later, own, strict=True):
            assert_same_reply(got, want, ROUNDING["f32"])
        assert first.read().completion is not None
        (want,) = alone(made, [first.task.request])
        assert_same_reply(first, want, ROUNDING["f32"])
        assert not made.adapters.get("red").is_mixable


@needs_kernels
def test_who_falls_back_says_so_and_frees_what_mixing_held(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mixer: Any
) -> None:
    monkeypatch.setattr(mixer, "problem", property(lambda self: ""))
    with Engine(base, adapters, threads=1) as engine:
        weights = engine._call(lambda runtime: weakref.ref(runtime.adapters.get("red").weights))
        monkeypatch.setattr(mixer, "problem", property(lambda self: "it is odd"))
        engine.chat(QUESTION, adapter="red", sampling=GREEDY)
        assert engine.mode == "switching"
        assert any("it is odd" in notice for notice in engine.notices)
        gc.collect()
        assert weights() is None
