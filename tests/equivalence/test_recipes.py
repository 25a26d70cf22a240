"""Every recipe chooses the types and makes the bytes that llama-quantize does, whatever the architecture.

Two seams of the installed llama.cpp: `llama_model_quantize` on small files (types, bytes, metadata), and the functions
behind it that choose types alone (src/llama-ext.h), which are fast enough for every architecture and random shapes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import quant_types
from converters.dequantize import dequantize_rows
from converters.errors import FormatError, UnsupportedError
from converters.imatrix import Importance, ImportanceMatrix
from converters.quant_types import (
    RECIPES,
    TYPE_BY_NUMBER,
    TYPES,
    ModelShape,
    Overrides,
    Recipe,
    choose_types,
    needs_imatrix,
    plan_types,
    tensor_order,
)
from converters.quantize import quantize_rows
from converters.reader import read_header
from edgelora.engine.native import reason
from tests.equivalence import llamacpp
from tests.equivalence.gguf_models import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    SHARED_EXPERT,
    Floats,
    GGUFModel,
    random_imatrix,
    random_weights,
    stored,
    write_gguf,
)

Stored = dict[str, tuple[str, bytes]]
Writer = Callable[[GGUFModel], Path]

# Filling the tables of these takes llama.cpp seconds, once a process.
SLOW_TYPES = {"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"}
SWA = {"attention.sliding_window_pattern": [True, False, True, True]}

MODELS: dict[str, GGUFModel] = {
    "llama, tied, one layer": GGUFModel(n_layer=1, tied=True),
    "llama, grouped queries, 9 layers": GGUFModel(n_head=8, n_head_kv=2),
    "llama, 17 layers, one value head, tied": GGUFModel(n_layer=17, n_head_kv=1, tied=True),
    "llama, the 70B": GGUFModel(n_layer=80, n_head=64, n_head_kv=8, parts=("attn_v", "attn_output", "ffn_down")),
    "llama, 80 layers that share no heads": GGUFModel(n_layer=80, parts=("attn_v", "ffn_down")),
    "mixtral": GGUFModel(n_layer=9, n_head_kv=1, n_expert=8, parts=(*ATTENTION, *EXPERTS)),
    "qwen2, 80 layers": GGUFModel("qwen2", n_layer=80, n_head_kv=2, parts=("attn_v", "attn_k", "ffn_down")),
    "deci, 80 layers, heads by layer": GGUFModel(
        "deci", n_layer=80, n_head=(4,) * 80, n_head_kv=(0, *(2,) * 79), parts=("attn_v", "ffn_down")
    ),
    "olmo, 80 layers": GGUFModel("olmo", n_layer=80, parts=("attn_v", "ffn_down")),
    "jais2, 68 layers": GGUFModel("jais2", n_layer=68, parts=("attn_v", "ffn_down")),
    "qwen2moe": GGUFModel("qwen2moe", n_layer=8, n_expert=4, parts=(*ATTENTION, *EXPERTS, *SHARED_EXPERT)),
    "qwen3moe": GGUFModel("qwen3moe", n_layer=9, n_head_kv=2, n_expert=16, parts=(*ATTENTION, *EXPERTS)),
    "gpt-oss": GGUFModel("gpt-oss", n_layer=4, n_head=8, n_head_kv=1, n_expert=4, parts=(*ATTENTION, *EXPERTS)),
    "falcon": GGUFModel("falcon", n_layer=17, n_head_kv=1, parts=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    "gemma2": GGUFModel("gemma2", n_head_kv=2, tied=True),
    "gemma4": GGUFModel(
        "gemma4",
        n_layer=4,
        tied=True,
        parts=(*ATTENTION, *FEED_FORWARD, "inp_gate", "proj", "per_layer_model_proj"),
        others={"per_layer_token_embd.weight": (3, 256)},
        keys=SWA,
    ),
    "gemma3n": GGUFModel(
        "gemma3n",
        n_layer=4,
        tied=True,
        parts=("attn_v", "ffn_down", "laurel_l", "laurel_r", "altup_correct_coef", "altup_router"),
        others={"per_layer_token_embd.weight": (3, 256), "per_layer_model_proj.weight": (4, 256)},
    ),
    "phi3": GGUFModel("phi3", n_layer=8, parts=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    "gptneox": GGUFModel("gptneox", n_layer=8, parts=("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    "gpt2": GGUFModel(
        "gpt2",
        n_layer=8,
        parts=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        others={"position_embd.weight": (4, 256)},
    ),
    "command-r": GGUFModel("command-r", n_layer=16, n_head=8, n_head_kv=1, tied=True),
    "starcoder2": GGUFModel("starcoder2", n_layer=10, n_head=8, n_head_kv=2, tied=True),
    "deepseek2": GGUFModel(
        "deepseek2", n_layer=3, n_expert=4, parts=("attn_q", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", *EXPERTS)
    ),
    "bert": GGUFModel("bert", n_layer=3, tied=True, others={"token_types.weight": (2, 256)}),
    "qwen3next": GGUFModel(
        "qwen3next",
        n_layer=8,
        n_head_kv=2,
        n_expert=8,
        parts=(*ATTENTION, *EXPERTS, *SHARED_EXPERT, "ssm_conv1d", "ssm_in", "ssm_out", "attn_gate"),
    ),
    "qwen35": GGUFModel("qwen35", n_layer=8, n_head_kv=1, parts=(*ATTENTION, *FEED_FORWARD, "ssm_conv1d", "ssm_out")),
    "mamba": GGUFModel("mamba", n_layer=3, n_head=0, n_head_kv=0, tied=True, parts=("ssm_conv1d", "ssm_in", "ssm_x")),
    "rwkv6": GGUFModel("rwkv6", n_layer=3, parts=("time_mix_first", "time_mix_w1", "time_mix_key", "channel_mix_key")),
    "nanbeige, layers used twice": GGUFModel("nanbeige", n_layer=9, keys={"num_loops": 2}),
    "rows of 288": GGUFModel(n_layer=3, n_head_kv=1, width=288),
    "rows of 300": GGUFModel(n_layer=3, width=300, tied=True),
    "one kind's rows are odd": GGUFModel(columns={"ffn_down": 300, "attn_v": 288, "attn_k": 384}),
}
# Enough to meet most rules; the others are slow.
FEW = (
    "llama, tied, one layer", "llama, grouped queries, 9 layers", "mixtral", "falcon", "gpt-oss", "rows of 288",
    "rows of 300", "gpt2", "nanbeige, layers used twice",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    """The F32 file of a model, made once."""
    folder, paths = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def write(model: GGUFModel) -> Path:
        key = repr(model)
        if key not in paths:
            paths[key] = write_gguf(folder / f"{len(paths)}.gguf", model.metadata, random_weights(model.shapes))
        return paths[key]

    return write


def ours(
    path: Path,
    recipe: Recipe,
    imatrix: Mapping[str, Floats] | None = None,
    overrides: Overrides | None = None,
) -> Stored:
    """Type and bytes of each tensor by our own code, from a GGUF file of any types."""
    header, data = read_header(path), path.read_bytes()
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    sources = {name: TYPES[tensor.type_name] for name, tensor in header.tensors.items()}
    model = ModelShape.from_metadata(header.metadata)
    plan = plan_types(shapes, recipe, model, overrides=overrides, has_imatrix=imatrix is not None, source_types=sources)
    entries = {name: Importance(values, np.array([1])) for name, values in (imatrix or {}).items()}
    matrix, made = ImportanceMatrix(entries, (), 0, 0), Stored()
    for name, kind in plan.types.items():
        tensor, shape = header.tensors[name], shapes[name]
        raw = np.frombuffer(data, np.uint8, tensor.size_bytes, tensor.offset)
        if kind == sources[name]:
            made[name] = kind.name, raw.tobytes()
            continue
        rows = dequantize_rows(raw.reshape(-1, sources[name].row_bytes(shape[-1])), sources[name], shape[-1])
        n_expert = shape[-3] if len(shape) > 2 else 1
        weights = matrix.means_for(name, shape[-1], n_expert)
        if weights is None:
            made[name] = kind.name, quantize_rows(rows, kind).tobytes()
            continue
        experts = zip(np.split(rows, n_expert), weights, strict=True)
        made[name] = kind.name, b"".join(quantize_rows(each, kind, row).tobytes() for each, row in experts)
    return made


def theirs(path: Path, out: Path, recipe: Recipe, **options: Any) -> Stored:
    llamacpp.quantize(path, out, recipe.file_type, **options)
    return stored(out)


def is_slow(model: str, recipe: Recipe, model_shape: GGUFModel) -> bool:
    types = (
        choose_types(model_shape.shapes, recipe, model_shape.shape, has_imatrix=True) if recipe.name != "q1_0" else {}
    )
    return model not in FEW or any(kind.name in SLOW_TYPES for kind in types.values())


def cases() -> list[Any]:
    return [
        pytest.param(
            name, quant, id=f"{name}-{quant}", marks=[pytest.mark.slow] if is_slow(name, recipe, model) else []
        )
        for name, model in MODELS.items()
        for quant, recipe in RECIPES.items()
        if quant != "q1_0" or not name.startswith(("rows", "one kind"))  # nothing stands in for its blocks of 128
    ]


@pytest.mark.parametrize(("name", "quant"), cases())
def test_equal_to_llama_quantize(name: str, quant: str, written: Writer, tmp_path: Path) -> None:
    """Types, bytes and file type of every tensor: with an importance matrix, and without one where that can be."""
    model, recipe = MODELS[name], RECIPES[quant]
    source, imatrix = written(model), random_imatrix(model.shapes)
    out = tmp_path / "theirs.gguf"
    with_matrix = ours(source, recipe, imatrix)
    assert with_matrix == theirs(source, out, recipe, imatrix=imatrix)
    assert list(with_matrix) == list(read_header(out).tensors), "not in the same order"
    assert read_header(out).metadata["general.file_type"] == recipe.file_type
    if needing := needs_imatrix(choose_types(model.shapes, recipe, ModelShape.from_metadata(model.metadata)), recipe):
        assert recipe.needs_imatrix
        with pytest.raises(RuntimeError, match="requires an imatrix"):
            theirs(source, out, recipe)
        assert needing[0] in reason()
    else:
        assert ours(source, recipe) == theirs(source, out, recipe)


@pytest.mark.slow
def test_recipes_that_need_an_imatrix_are_those_that_llama_quantize_refuses(written: Writer, tmp_path: Path) -> None:
    source = written(MODELS["llama, tied, one layer"])
    refused = set()
    for name, recipe in RECIPES.items():
        try:
            theirs(source, tmp_path / "out.gguf", recipe)
        except RuntimeError:
            refused.add(name)
    assert refused == {name for name, recipe in RECIPES.items() if recipe.needs_imatrix}


OVERRIDES: dict[str, tuple[str, Overrides]] = {
    "one part": ("q4_k_m", Overrides((("ffn_down", "q6_k"),))),
    "the first that matches": ("q4_k_m", Overrides(((r"blk\.[01]\.ffn", "q8_0"), ("ffn_down", "q4_0")))),
    "counters skip what was chosen by hand": ("q4_k_m", Overrides(((r"blk\.0\.", "f16"),))),
    "the output": ("q4_k_m", Overrides(output="q8_0")),
    "the output by name": ("q4_k_m", Overrides((("output", "q5_0"),))),
    "the embeddings": ("q3_k_m", Overrides(token_embedding="f16")),
    "both": ("q2_k", Overrides(output="f16", token_embedding="q4_0")),
    "everything": ("iq4_xs", Overrides((("attn", "bf16"),), "q6_k", "q8_0")),
    "pure": ("q4_k_m", Overrides(pure=True)),
    "pure, and a part": ("q3_k_l", Overrides((("attn_v", "q8_0"),), pure=True)),
    "pure, and the embeddings": ("q4_0", Overrides(output="q8_0", token_embedding="q8_0", pure=True)),
    "no quantization": ("f16", Overrides((("ffn_down", "q6_k"),), "q8_0", "q4_0", pure=True)),
    "mxfp4": ("mxfp4_moe", Overrides((("attn_q", "q4_k"),), token_embedding="q6_k")),
    "full precision": ("q4_k_m", Overrides((("attn_k", "f32"),))),
    "rarer types": ("q8_0", Overrides((("attn_q", "nvfp4"), ("attn_k", "tq2_0"), ("attn_v", "mxfp4")))),
    "rows that do not fit": ("q4_k_m", Overrides((("attn_v", "q6_k"), ("ffn_down", "iq3_s")))),
}
OVERRIDDEN = (
    "llama, grouped queries, 9 layers", "llama, tied, one layer", "gemma4", "mixtral", "one kind's rows are odd"
)  # fmt: skip


def as_options(overrides: Overrides) -> dict[str, Any]:
    number = {name.lower(): kind.number for name, kind in TYPES.items()}
    return {
        "tensor_types": [(pattern, number[kind.lower()]) for pattern, kind in overrides.tensor_types],
        "output": number[overrides.output.lower()] if overrides.output else None,
        "token_embedding": number[overrides.token_embedding.lower()] if overrides.token_embedding else None,
        "pure": overrides.pure,
    }


@pytest.mark.parametrize("case", OVERRIDES)
@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overrides_equal_to_llama_quantize(name: str, case: str, written: Writer, tmp_path: Path) -> None:
    quant, overrides = OVERRIDES[case]
    source, recipe = written(MODELS[name]), RECIPES[quant]
    expected = theirs(source, tmp_path / "theirs.gguf", recipe, **as_options(overrides))
    assert ours(source, recipe, overrides=overrides) == expected


def test_per_layer_embeddings_follow_the_embeddings_unless_named(written: Writer, tmp_path: Path) -> None:
    source, recipe, out = written(MODELS["gemma4"]), RECIPES["q4_k_m"], tmp_path / "theirs.gguf"
    for named in ((), (("per_layer_token_embd", "q4_0"),)):
        overrides = Overrides(named, token_embedding="q8_0")
        found = ours(source, recipe, overrides=overrides)
        assert found == theirs(source, out, recipe, **as_options(overrides))
        assert found["per_layer_token_embd.weight"][0] == ("Q4_0" if named else "Q8_0")


@pytest.mark.parametrize("source_type", ["F16", "BF16", "Q8_0", "Q4_K", "Q6_K", "Q5_1", "Q3_K", "IQ4_XS", "TQ2_0"])
@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0", "q5_0"])
def test_equal_from_other_types(source_type: str, quant: str, tmp_path: Path) -> None:
    """A file that is quantized, or half precision, to another quantization, with `--allow-requantize`."""
    model = replace(MODELS["llama, grouped queries, 9 layers"], n_layer=2)
    kinds = {name: source_type for name, shape in model.shapes.items() if len(shape) > 1}
    source = write_gguf(tmp_path / "source.gguf", model.metadata, random_weights(model.shapes), kinds)
    out = tmp_path / "theirs.gguf"
    assert ours(source, RECIPES[quant]) == theirs(source, out, RECIPES[quant], allow_requantize=True)


def test_requantizing_needs_to_be_allowed(tmp_path: Path) -> None:
    model = GGUFModel(n_layer=1)
    kinds = {name: "Q8_0" for name, shape in model.shapes.items() if len(shape) > 1}
    source = write_gguf(tmp_path / "source.gguf", model.metadata, random_weights(model.shapes), kinds)
    with pytest.raises(RuntimeError, match="requantizing from type q8_0 is disabled"):
        theirs(source, tmp_path / "theirs.gguf", RECIPES["q4_0"])


def test_an_imatrix_of_another_model(written: Writer, tmp_path: Path) -> None:
    """Both do without it for token embeddings, and refuse it for anything else."""
    model, recipe = MODELS["llama, tied, one layer"], RECIPES["q4_k_m"]
    source, out, imatrix = written(model), tmp_path / "theirs.gguf", random_imatrix(model.shapes)
    right = ours(source, recipe, imatrix)
    imatrix["token_embd.weight"] = imatrix["token_embd.weight"][:-1].copy()
    found = ours(source, recipe, imatrix)
    assert found == theirs(source, out, recipe, imatrix=imatrix)
    assert found["token_embd.weight"] != right["token_embd.weight"]
    imatrix["blk.0.attn_q.weight"] = np.ones(512, np.float32)
    with pytest.raises(RuntimeError, match="imatrix size 512 is different from tensor size 256"):
        theirs(source, out, recipe, imatrix=imatrix)
    with pytest.raises(FormatError, match=r"has 512 values for blk\.0\.attn_q\.weight, the tensor has 256 columns"):
        ours(source, recipe, imatrix)


def test_an_imatrix_that_lacks_a_tensor(written: Writer, tmp_path: Path) -> None:
    model, out = MODELS["llama, tied, one layer"], tmp_path / "theirs.gguf"
    imatrix = random_imatrix(model.shapes)
    del imatrix["blk.0.attn_q.weight"]
    source = written(model)
    assert ours(source, RECIPES["q4_k_m"], imatrix) == theirs(source, out, RECIPES["q4_k_m"], imatrix=imatrix)
    with pytest.raises(RuntimeError, match="Missing importance matrix for tensor"):
        theirs(source, out, RECIPES["iq3_xs"], imatrix=imatrix)
    types = choose_types(model.shapes, RECIPES["iq3_xs"], model.shape, has_imatrix=True)
    assert "blk.0.attn_q.weight" in set(needs_imatrix(types, RECIPES["iq3_xs"])) - set(imatrix)


def test_llama_quantize_refuses_what_is_not_finite(tmp_path: Path) -> None:
    """In the source, and where a value is too large for half precision: callers of our quantizer have to look."""
    model, recipe = GGUFModel(n_layer=1), RECIPES["f16"]
    for value, message in ((np.nan, "has invalid data"), (np.inf, "has invalid data"), (1e6, "validation failed")):
        weights = random_weights(model.shapes)
        weights["blk.0.ffn_up.weight"][1, 7] = value
        source = write_gguf(tmp_path / "source.gguf", model.metadata, weights)
        with pytest.raises(RuntimeError, match=message):
            theirs(source, tmp_path / "theirs.gguf", recipe)


# The twins: what is compared above, broken.


def test_another_weight_is_seen(written: Writer, tmp_path: Path) -> None:
    model = MODELS["llama, tied, one layer"]
    weights = random_weights(model.shapes)
    weights["blk.0.ffn_up.weight"][1, 7] *= 1.5
    changed = write_gguf(tmp_path / "changed.gguf", model.metadata, weights)
    expected = theirs(written(model), tmp_path / "theirs.gguf", RECIPES["q4_k_m"])
    found = ours(changed, RECIPES["q4_k_m"])
    assert [name for name in expected if found[name] != expected[name]] == ["blk.0.ffn_up.weight"]


def test_another_importance_is_seen(written: Writer, tmp_path: Path) -> None:
    """Of one expert: the slices of the others stay."""
    model = MODELS["mixtral"]
    imatrix = random_imatrix(model.shapes)
    expected = theirs(written(model), tmp_path / "theirs.gguf", RECIPES["q4_k_m"], imatrix=imatrix)
    name, kept = "blk.4.ffn_up_exps.weight", 3
    imatrix[name][kept * 256 : (kept + 1) * 256] *= np.linspace(1, 100, 256, dtype=np.float32)
    found = ours(written(model), RECIPES["q4_k_m"], imatrix)
    assert [each for each in expected if found[each] != expected[each]] == [name]
    mine, other = (np.frombuffer(each[name][1], np.uint8).reshape(8, -1) for each in (found, expected))
    assert [row for row in range(8) if (mine[row] != other[row]).any()] == [kept]


def test_another_rule_is_seen(written: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(MODELS["llama, grouped queries, 9 layers"])
    expected = theirs(source, tmp_path / "theirs.gguf", RECIPES["q5_k_m"])
    monkeypatch.setattr(quant_types, "_more_bits", lambda layer, n_layer: layer % 2 == 0)
    assert ours(source, RECIPES["q5_k_m"]) != expected


@pytest.mark.parametrize(
    ("name", "quant", "wrong"),
    [
        ("llama, the 70B", "q3_k_s", {"n_head_kv": 64}),
        ("falcon", "q4_k_m", {"architecture": "llama"}),
        ("mixtral", "q4_0", {"n_expert": 4}),
        ("llama, grouped queries, 9 layers", "q2_k", {"n_head_kv": 8}),
        ("nanbeige, layers used twice", "q4_k_m", {"n_layer": 9}),
        ("deci, 80 layers, heads by layer", "iq3_s", {"n_head_kv": 1}),
    ],
)
def test_another_model_is_seen(name: str, quant: str, wrong: dict[str, Any], written: Writer, tmp_path: Path) -> None:
    model, recipe = MODELS[name], RECIPES[quant]
    expected = {each: kind for each, (kind, _) in theirs(written(model), tmp_path / "out.gguf", recipe).items()}
    shape = ModelShape.from_metadata(model.metadata)
    right = choose_types(model.shapes, recipe, shape)
    assert {each: kind.name for each, kind in right.items()} == expected
    assert choose_types(model.shapes, recipe, replace(shape, **wrong)) != right


# Types alone: every architecture, and random models.

# All that llama.cpp can make a model of (`LLM_ARCH_NAMES`, src/llama-arch.cpp).
ARCHITECTURES = (
    "llama", "llama4", "deci", "falcon", "grok", "gpt2", "gptneox", "mpt", "baichuan", "starcoder", "refact", "bert",
    "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert", "bloom",
    "stablelm", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe",
    "qwen35", "qwen35moe", "qwen4exp", "phi2", "phi3", "phimoe", "plamo", "plamo2", "plamo3", "codeshell", "orion",
    "internlm2", "minicpm", "minicpm3", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4-assistant",
    "gemma-embedding", "starcoder2", "mamba", "mamba2", "maple", "jamba", "falcon-h1", "xverse", "command-r", "cohere2",
    "cohere2moe", "dbrx", "olmo", "olmo2", "olmoe", "muse-glimmer", "openelm", "arctic", "deepseek", "deepseek2",
    "deepseek2-ocr", "deepseek32", "deepseek4", "chatglm", "glm4", "glm4moe", "glm-dsa", "bitnet", "t5", "t5encoder",
    "jais", "jais2", "nemotron", "nemotron_h", "nemotron_h_moe", "exaone", "exaone4", "exaone-moe", "rwkv6",
    "rwkv6qwen2", "rwkv7", "arwkv7", "granite", "granitemoe", "granitehybrid", "graniteswitch", "granite_swa",
    "chameleon", "wavtokenizer-dec", "plm", "bailingmoe", "bailingmoe2", "bailingmoe3", "dots1", "dots3note", "arcee",
    "afmoe", "laguna", "ernie4_5", "ernie4_5-moe", "hunyuan-moe", "hunyuan-dense", "hunyuan_vl", "hy_v3", "hy_v4",
    "smollm3", "gpt-oss", "lfm2", "lfm2moe", "dream", "smallthinker", "llada", "llada-moe", "seed_oss", "grovemoe",
    "apertus", "minimax-01", "hrm_text", "minimax-m2", "minimax-m3", "cogvlm", "rnd1", "pangu-embedded", "mistral3",
    "eagle3", "dflash", "mistral4", "paddleocr", "mimo2", "step35", "spark2_5", "llama-embed", "maincoder",
    "kimi-linear", "kimi-k3", "glm5-next", "talkie", "mellum", "nanbeige", "qwen3tts", "pockettts",
)  # fmt: skip
PARTS = (
    *ATTENTION, *FEED_FORWARD, *EXPERTS, *SHARED_EXPERT, "attn_qkv", "attn_kv_b", "attn_q_a", "attn_q_b",
    "attn_kv_a_mqa", "attn_k_b", "attn_v_b", "attn_norm", "attn_q_norm", "attn_gate", "attn_rel_b", "cross_attn_v",
    "ffn_gate_up_exps", "ffn_gate_tid2eid", "ssm_conv1d", "ssm_in", "ssm_f_a", "ssm_beta", "shortconv.conv",
    "shortconv.in_proj", "indexer.k_proj", "indexer.attn_q_b", "indexer.proj", "hc_fn", "time_mix_first",
    "time_mix_w1", "time_mix_key", "altup_proj", "laurel_l", "inp_gate", "nextn.eh_proj", "mm.a.code_embd",
)  # fmt: skip
WITH_EMBEDDINGS = {
    "position_embd.weight": (4, 256),
    "token_types.weight": (2, 256),
    "per_layer_token_embd.weight": (3, 256),
    "per_layer_model_proj.weight": (3, 256),
    "v.position_embd.weight": (3, 256),
}
choosing = pytest.mark.skipif(not llamacpp.can_choose_types(), reason="this compiler names C++ functions otherwise")


def chosen(model: GGUFModel, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, **options: Any) -> dict[str, str]:
    sizes = {key: getattr(model, key) for key in ("architecture", "n_layer", "n_head", "n_head_kv", "n_expert")}
    numbers = llamacpp.choose_types(shapes, recipe.file_type, **sizes, **options)
    return {name: TYPE_BY_NUMBER[number].name for name, number in numbers.items()}


def names_of(types: Mapping[str, quant_types.BlockType]) -> dict[str, str]:
    return {name: kind.name for name, kind in types.items()}


@choosing
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    for n_expert, tied in ((0, True), (8, False)):
        model = GGUFModel(architecture, n_layer=1, n_expert=n_expert, tied=tied, parts=PARTS, others=WITH_EMBEDDINGS)
        shapes, shape = model.shapes, model.shape
        for recipe in RECIPES.values():
            assert names_of(choose_types(shapes, recipe, shape)) == chosen(model, shapes, recipe), recipe.name


@pytest.mark.slow
def test_hyperparameters_are_those_that_llama_cpp_reads(tmp_path: Path) -> None:
    """Of every architecture that reads a file with the keys of `GGUFModel.metadata`, which are not all there are."""
    parts = ("attn_q", "attn_v", "attn_qkv", "ffn_down", "ffn_up", "attn_output")
    variants = [(0, {}), (8, {}), (0, SWA), (8, SWA)]
    models = [
        GGUFModel(name, 4, 8, 2, count, parts=parts, keys=keys) for name in ARCHITECTURES for count, keys in variants
    ]
    read = {model.architecture for model in models if equal_types_if_readable(model, tmp_path)}
    assert len(read) == 133, sorted(set(ARCHITECTURES) - read)


def equal_types_if_readable(model: GGUFModel, folder: Path) -> bool:
    source = write_gguf(folder / "source.gguf", model.metadata, random_weights(model.shapes))
    shape = ModelShape.from_metadata(read_header(source).metadata)
    for recipe in (RECIPES["q2_k"], RECIPES["q4_k_m"], RECIPES["q3_k_m"]):
        try:
            found = theirs(source, folder / "out.gguf", recipe)
        except RuntimeError as error:
            if re.search("key not found|requires '", str(error)):
                return False
            raise
        expected = {each: kind for each, (kind, _) in found.items()}
        assert names_of(choose_types(model.shapes, recipe, shape)) == expected, (model, recipe.name)
    return True


def random_shapes(model: GGUFModel, pick: random.Random) -> dict[str, tuple[int, ...]]:
    """Some tensors missing, some with other rows, one row, or three dimensions."""
    shapes = {}
    for name, shape in model.shapes.items():
        columns = pick.choice((*[shape[-1]] * 5, 256, 288, 300, 1))
        outer = pick.choice((*[shape[:-1]] * 12, (1,), (3, 2), (2, 1, 1), ()))
        if pick.random() < 0.9:
            shapes[name] = (*outer, columns)
    return {name: shapes[name] for name in sorted(shapes, key=tensor_order)}


def random_overrides(pick: random.Random) -> Overrides:
    patterns = ("ffn_down", "attn", r"blk\.[0-3]\.", "per_layer", "token_embd", "output", r"\.0\.")
    kinds = ("q6_k", "q4_0", "f16", "iq4_xs")
    pairs = tuple((pick.choice(patterns), pick.choice(kinds)) for _ in range(pick.choice((0, 1, 2))))
    return Overrides(pairs, pick.choice((None, "f16")), pick.choice((None, "f32")), pick.random() < 0.3)


def check_random_model(seed: int) -> None:
    pick = random.Random(seed)
    heads, heads_kv = pick.choice(((1, 1), (4, 4), (4, 2), (4, 1), (64, 8), (4, 0)))
    model = GGUFModel(
        pick.choice(("llama", "llama", "falcon", "glm5-next", "bailingmoe3", "gemma3", "gpt2")),
        n_layer=pick.choice((1, 2, 3, 4, 8, 9, 16, 17, 32, 80)),
        n_head=heads,
        n_head_kv=heads_kv,
        n_expert=pick.choice((0, 0, 1, 4, 8, 8, 16)),
        width=pick.choice((256, 512, 288, 300)),
        tied=pick.random() < 0.5,
        parts=pick.sample(PARTS, 12),
        others=WITH_EMBEDDINGS,
    )
    shapes, overrides = random_shapes(model, pick), random_overrides(pick)
    for recipe in pick.sample([recipe for recipe in RECIPES.values() if recipe.name != "q1_0"], 4):
        found = names_of(choose_types(shapes, recipe, model.shape, overrides=overrides))
        assert found == chosen(model, shapes, recipe, **as_options(overrides)), (model, recipe.name, overrides)


def check_random_models(seeds: range) -> None:
    for seed in seeds:
        check_random_model(seed)


@choosing
def test_random_models() -> None:
    check_random_models(range(60))


@choosing
@pytest.mark.slow
def test_more_random_models() -> None:
    check_random_models(range(1000, 3000))


@choosing
def test_random_models_would_see_another_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_types, "_FALLBACK", {**quant_types._FALLBACK, "Q4_K": "Q5_1"})
    with pytest.raises(AssertionError):
        check_random_models(range(60))


def test_an_expert_without_a_layer_is_refused_by_both(tmp_path: Path) -> None:
    model = GGUFModel(n_layer=2, n_expert=8, parts=EXPERTS, others={"blk.2.ffn_down_exps.weight": (8, 2, 256)})
    source = write_gguf(tmp_path / "source.gguf", model.metadata, random_weights(model.shapes))
    with pytest.raises(RuntimeError, match=r"Bad layer 2 for tensor blk\.2\.ffn_down_exps"):
        theirs(source, tmp_path / "theirs.gguf", RECIPES["q4_k_m"])
    with pytest.raises(UnsupportedError, match=r"blk\.2\.ffn_down_exps\.weight: is in none of the model's 2 layers"):
        ours(source, RECIPES["q4_k_m"])
