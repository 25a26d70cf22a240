"""Adapters from strangers: whatever is in them, they are refused by name or converted, soon; nothing is left behind."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from converters.adapter import AdapterOptions, convert_adapter
from converters.base import convert_base
from converters.errors import ConversionError, FormatError
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from converters.peft_patterns import MATCH, MAX_EXPRESSIONS, Patterns
from tests.converters.folders import MODULES, Arrays, lora_weights, make_adapter, make_model, safetensors_bytes
from tests.converters.mutations import MUTATIONS, Folder, Stored, mutate

PREFIX = "base_model.model.model."
Q_PROJ = f"{PREFIX}layers.0.self_attn.q_proj"
MUTATED = 2  # of each case, and each is both converted and merged
SECONDS = 20  # of the processor, for what takes 1 to 4 here; what grows with the square takes many minutes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base")


def outcomes(adapter: Path, base: Path, out: Path, options: AdapterOptions | None = None) -> list[str]:
    """What was said of an adapter as it was converted and as it was merged; "" where nothing was wrong."""
    said = []
    out.mkdir(exist_ok=True)
    for is_merged in (False, True):
        try:
            if is_merged:
                merge(base, [Merged(adapter)], out / "m.gguf", QuantizeOptions("f32"), force=True)
            else:
                convert_adapter(adapter, base, out / "a.gguf", options, force=True)
            said.append("")
        except ConversionError as error:
            said.append(error.message or "nothing")
        written = {"m.gguf" if is_merged else "a.gguf"} if not said[-1] else set()
        assert {path.name for path in out.iterdir()} == written
        for path in out.iterdir():
            path.unlink()
    return said


# Random mutations


def saved_by_peft(root: Path, step: int) -> Iterator[tuple[Folder, Path, Path]]:
    """Adapters as PEFT saves them, every so many cases of its methods, with their bases as a folder and as a file."""
    from tests.equivalence import tiny_models
    from tests.equivalence.methods import CASES
    from tests.equivalence.peft_methods import make_peft

    for name, case in [*CASES.items()][::step]:
        folder, file = root / case.model, root / f"{case.model}.gguf"
        if not folder.exists():
            convert_base(tiny_models.build(case.model, folder), file, quant="f32")
        make_peft(case, folder, root / "adapters" / name)
        yield Folder.read(root / "adapters" / name), folder, file


@pytest.mark.train
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about its own methods
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("step", "seed"), [(8, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_mutated_adapters(step: int, seed: int, tmp_path: Path) -> None:
    random, said = Random(seed), []
    options = AdapterOptions(max_error=1.0, rank=4)
    for folder, *bases in saved_by_peft(tmp_path, step):
        for number in range(MUTATED):
            written = mutate(folder, random).write(tmp_path / f"adapter-{number}")
            said += outcomes(written, random.choice(bases), tmp_path / "out", options)
    refused = sum(map(bool, said))
    assert refused > len(said) // 2  # most of what is broken is seen
    assert len(said) - refused > len(said) // 20  # and some mutations are harmless


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_mutated_lora(number: int, base: Path, tmp_path: Path) -> None:
    """Each kind of mutation by itself."""
    folder, random = Folder.read(make_adapter(tmp_path / "plain")), Random(number)
    for _ in range(20):
        outcomes(MUTATIONS[number](folder, random).write(tmp_path / "adapter"), base, tmp_path / "out")


# One thing at a time


def with_tensor(path: Path, name: str, dtype: str, shape: tuple[int, ...], data: bytes, **config: Any) -> Path:
    folder = Folder.read(make_adapter(path, **config))
    return Folder(folder.config, {**folder.tensors, name: Stored(dtype, shape, data)}).write(path)


def both(adapter: Path, base: Path, tmp_path: Path, reason: str) -> None:
    for said in outcomes(adapter, base, tmp_path / "out"):
        assert re.search(reason, said), said


WHOLE_NUMBERS = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS)
def test_weights_that_are_no_floats(dtype: str, base: Path, tmp_path: Path) -> None:
    data = bytes(32 * 4 * WHOLE_NUMBERS[dtype])
    adapter = with_tensor(tmp_path / "a", f"{Q_PROJ}.lora_B.weight", dtype, (32, 4), data)
    both(adapter, base, tmp_path, rf"lora_B\.weight: is {dtype}")


def test_a_dtype_that_nobody_knows(base: Path, tmp_path: Path) -> None:
    adapter = with_tensor(tmp_path / "a", f"{Q_PROJ}.lora_B.weight", "Q4_K", (32, 4), bytes(512))
    both(adapter, base, tmp_path, "Q4_K")


@pytest.mark.parametrize("shape", [(0, 4), (32, 0), (), (32,), (1, 32, 4), (2**40, 0)])
def test_shapes(shape: tuple[int, ...], base: Path, tmp_path: Path) -> None:
    size = int(np.prod(shape)) if shape else 1
    adapter = with_tensor(tmp_path / "a", f"{Q_PROJ}.lora_B.weight", "F32", shape, bytes(4 * size))
    both(adapter, base, tmp_path, "do not fit together")


@pytest.mark.parametrize("name", ["\x1b[2Jx", "a\nb", "x\x00y", "\u202etxt", "\x9b31m"])
def test_names_that_steer_a_terminal_are_shown_as_they_are_written(name: str, base: Path, tmp_path: Path) -> None:
    adapter = with_tensor(tmp_path / "a", f"{PREFIX}{name}.lora_A.weight", "F32", (4, 4), bytes(64), **{name: 3})
    for said in outcomes(adapter, base, tmp_path / "out"):
        assert name not in said
        assert ascii(name)[1:-1] in said or repr(name)[1:-1] in said


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj.lora_A", "norm", "layers.1.mlp.down_proj.base_layer"])
def test_values_that_are_none(module: str, value: float, base: Path, tmp_path: Path) -> None:
    shapes = {"norm": (32,), "layers.1.mlp.down_proj.base_layer": (32,)}
    ending = "bias" if "base_layer" in module else "weight"
    wrong = np.full(shapes.get(module, (4, 32)), value, np.float32)
    arrays = {**lora_weights(MODULES), f"{PREFIX}{module}.{ending}": wrong}
    both(make_adapter(tmp_path / "a", arrays), base, tmp_path, "NaN or infinite|has no place|adds no bias")


def test_values_that_overflow_as_they_are_merged(base: Path, tmp_path: Path) -> None:
    arrays = {name: values * np.float32(1e25) for name, values in lora_weights(MODULES).items()}
    _, merged = outcomes(make_adapter(tmp_path / "a", arrays), base, tmp_path / "out")
    assert "holds NaN or infinite values with the adapters merged into it" in merged


@pytest.mark.parametrize("layer", [2, 511, 512, 99999, 10**9])
def test_layers_that_the_base_has_not(layer: int, base: Path, tmp_path: Path) -> None:
    weights = lora_weights({f"model.layers.{layer}.self_attn.q_proj": (32, 32)})
    both(
        make_adapter(tmp_path / "a", weights), base, tmp_path, "the base has no such tensor|no tensor of a llama model"
    )


def test_a_base_of_too_many_layers(base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for path in base.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    config = (base / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 513')
    (tmp_path / "base" / "config.json").write_text(config)
    both(make_adapter(tmp_path / "a"), tmp_path / "base", tmp_path, "is 513, expected 1 to 512, which llama.cpp holds")


@pytest.mark.parametrize("tokens", [[2**31 - 1, 5, 6], [300, 1, 2], [-1, 5, 6], [2**70, 5, 6], ["5", 5, 6]])
def test_tokens_that_are_none(tokens: list[Any], base: Path, tmp_path: Path) -> None:
    name = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = with_tensor(tmp_path / "a", name, "F32", (3, 32), bytes(384), trainable_token_indices=tokens)
    both(adapter, base, tmp_path, "trains token|does not say which tokens")


def test_more_ranks_than_a_matrix_has(base: Path, tmp_path: Path) -> None:
    """20,000 ranks of 32 rows: a matrix of their products would take 1.6 GB."""
    weights = lora_weights({"model.layers.0.self_attn.q_proj": (32, 32)}, rank=20_000)
    adapter = make_adapter(tmp_path / "a", weights, r=20_000, lora_alpha=1)
    assert outcomes(adapter, base, tmp_path / "out") == ["", ""]


# Much of it


def many(count: int) -> Mapping[str, tuple[Arrays, dict[str, Any]]]:
    """Name to tensors and settings, `count` of one kind each."""
    one, two = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    layers = [f"{PREFIX}layers.{number}" for number in range(count)]
    return {
        "unknown modules": ({f"{layer}.x.lora_A.weight": one for layer in layers}, {}),
        "layers": (
            {f"{layer}.self_attn.q_proj.lora_{part}.weight": two for layer in layers for part in "AB"}, {"r": 1},
        ),
        "biases": ({f"{layer}.self_attn.q_proj.base_layer.bias": one for layer in layers}, {}),
        "embeddings": (
            {f"{layer}.trainable_tokens_delta": one for layer in layers},
            {"trainable_token_indices": {f"m{number}": [1] for number in range(count)}},
        ),
        "patterns": (lora_weights(MODULES), {"rank_pattern": {f"p{number}": 4 for number in range(count)}}),
        "settings": (lora_weights(MODULES), {f"key{number}": 4 for number in range(count)}),
        "targets": (lora_weights(MODULES), {"target_modules": [f"q_proj{number}" for number in range(count)]}),
    }  # fmt: skip


@pytest.mark.parametrize("what", many(1))
def test_time_does_not_grow_with_the_square(what: str, base: Path, tmp_path: Path) -> None:
    arrays, config = many(10_000)[what]
    started = time.process_time()
    outcomes(make_adapter(tmp_path / "a", arrays, **config), base, tmp_path / "out")
    assert time.process_time() - started < SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("what", many(1))
def test_200_000_of_them(what: str, base: Path, tmp_path: Path) -> None:
    arrays, config = many(200_000)[what]
    started = time.process_time()
    outcomes(make_adapter(tmp_path / "a", arrays, **config), base, tmp_path / "out")
    assert time.process_time() - started < 10 * SECONDS


def test_a_configuration_of_50_megabytes(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", junk=["x" * 100] * 500_000)
    assert (adapter / "adapter_config.json").stat().st_size > 50_000_000
    for said in outcomes(adapter, base, tmp_path / "out"):
        assert "unknown setting junk" in said
        assert len(said) < 1000


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "", "{", "\ud800", "NaN"])
def test_configurations_that_are_none(text: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    both(adapter, base, tmp_path, r"adapter_config\.json")


def test_patterns_of_every_expert_are_found_as_peft_finds_them() -> None:
    """The first that matches; a dot of a name stands for any character."""
    random, parts = Random(0), ["model", "layers", "1", "11", "mlp", "experts", "q_proj", "gate_proj", "x.y"]
    expressions = [".*proj", "^model.*", r"layers\.1\..*", "(a|q_proj)", "[a-z]_proj"]
    for _ in range(1000):
        names = [".".join(random.choices(parts, k=random.randint(1, 3))) for _ in range(4)]
        patterns = dict.fromkeys(random.sample([*names, *random.choices(expressions, k=2)], 5))
        module = "".join(part + random.choice("..._") for part in random.choices(parts, k=5))[:-1]
        expected = next((key for key in patterns if re.match(MATCH.format(key), module)), module)
        assert Patterns(patterns).key(module) == expected


def test_too_many_expressions_are_refused(base: Path, tmp_path: Path) -> None:
    patterns = {f"x{number}.*": 4 for number in range(MAX_EXPRESSIONS + 1)}
    both(make_adapter(tmp_path / "a", rank_pattern=patterns), base, tmp_path, "too many regular expressions")


def test_a_file_that_lies_about_its_sizes(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    whole = safetensors_bytes(lora_weights(MODULES))
    for shape in ("[4, 33]", "[4, -32]", "[4, 4611686018427387904]", "[4, 32.5]", '["4", 32]', "4"):
        (adapter / "adapter_model.safetensors").write_bytes(resized_header(whole, shape))
        with pytest.raises(FormatError, match="safetensors"):
            convert_adapter(adapter, base, tmp_path / "out.gguf")


def resized_header(whole: bytes, shape: str) -> bytes:
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].replace(b"[4, 32]", shape.encode(), 1)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]
