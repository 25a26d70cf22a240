"""Adapters of experts, and of bases whose GGUF fuses what transformers splits, or splits what it fuses: as adapters and
merged they change the logits as PEFT does in torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from converters import placement
from converters.adapted_base import sizes_of
from converters.base_file import BaseFile
from converters.block_types import TYPES
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.methods import parameters
from converters.reader import read_header
from converters.writer import TensorSpec, create, header_bytes
from tests.converters.folders import safetensors_bytes, write_json
from tests.equivalence import reference, tiny_models
from tests.equivalence.effects import TOKENS, TOLERANCE, Adapted, adapt, logits_of, mostly_slow, strong
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case
from tests.equivalence.tiny_models import some_ids

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

SEEN = 20 * TOLERANCE
SCALE = 2.0
LORA = {"r": 2, "lora_alpha": 4}


# Experts one by one, as transformers 4 had them


@dataclass(frozen=True)
class Experts:
    """Names that a family's experts had as modules: the block, its router, and gate, up and down."""

    block: str = "mlp"
    router: str = "gate"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


ONE_BY_ONE: Mapping[str, Experts] = {
    "mixtral": Experts("block_sparse_moe", names=("w1", "w3", "w2")),
    "qwen2-moe": Experts(),
    "qwen3-moe": Experts(),
    "qwen3-next": Experts(),
    "olmoe": Experts(),
    "ernie-4.5-moe": Experts(),
}


def one_by_one(name: str, folder: Path, *, experts: tuple[int, ...] = (0, 1, 3), whole: bool = False) -> Adapted:
    """LoRA on some experts, each of a rank of its own, saved as older PEFT saved it and added up in torch.

    Args:
        experts: which of each layer's.
        whole: all three matrices of each; otherwise gate and down of one, up of the next.
    """
    base, kind = tiny_models.build(name, folder / "base"), ONE_BY_ONE[name]
    ids, model, rng = some_ids(base, TOKENS), load_model(base), np.random.default_rng(1)
    plain, arrays, ranks = logits_of(model, ids), {}, {}
    for number, layer in enumerate(model.model.layers):
        if not hasattr(layer.mlp, "experts"):
            continue  # Ernie's first
        prefix = f"model.layers.{number}.{kind.block}"
        changed = {f"{prefix}.{kind.router}": layer.mlp.gate.weight.data}
        for expert in experts:
            gate, up = layer.mlp.experts.gate_up_proj.data[expert].chunk(2)
            parts = (gate, up, layer.mlp.experts.down_proj.data[expert])
            chosen = range(3) if whole else ((0, 2) if expert % 2 else (1,))
            changed |= {f"{prefix}.experts.{expert}.{kind.names[part]}": parts[part] for part in chosen}
        for module, weight in changed.items():
            rank = 1 + len(ranks) % 3
            sizes = (rank, weight.shape[1]), (weight.shape[0], rank)
            a, b = (rng.standard_normal(size).astype(np.float32) * 0.2 for size in sizes)
            weight += SCALE * torch.from_numpy(b @ a)
            ranks[module] = rank
            arrays |= {f"base_model.model.{module}.lora_{key}.weight": value for key, value in (("A", a), ("B", b))}
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(safetensors_bytes(arrays))
    patterns = {"rank_pattern": ranks, "alpha_pattern": {module: SCALE * rank for module, rank in ranks.items()}}
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 1, "target_modules": [*kind.names, kind.router], **patterns}
    write_json(folder / "adapter" / "adapter_config.json", config)
    return Adapted(name, base, folder / "adapter", ids, strong(logits_of(model, ids) - plain))


@pytest.mark.parametrize("name", mostly_slow(ONE_BY_ONE, ("mixtral", "qwen3-moe", "ernie-4.5-moe")))
def test_experts_one_by_one(name: str, tmp_path: Path) -> None:
    adapted = one_by_one(name, tmp_path)
    assert adapted.adapter_error() < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


def test_another_expert_is_seen(tmp_path: Path) -> None:
    adapted = one_by_one("qwen3-moe", tmp_path, whole=True)
    assert adapted.adapter_error() < TOLERANCE
    file = adapted.folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b".experts.3.", b".experts.2."))
    config = adapted.folder / "adapter_config.json"
    config.write_text(config.read_text().replace(".experts.3.", ".experts.2."))
    assert adapted.adapter_error() > SEEN


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    adapted = one_by_one("qwen3-moe", tmp_path)
    file = adapted.folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b".experts.3.", b".experts.4."))
    config = adapted.folder / "adapter_config.json"
    config.write_text(config.read_text().replace(".experts.3.", ".experts.4."))
    with pytest.raises(BaseMismatchError, match=r"experts\.4\.gate_proj\.weight: the base has no such tensor"):
        adapted.adapter_error()


# Stacked experts and routers as parameters

FUSED, DOWN = "experts.gate_up_proj", "experts.down_proj"
ROUTERS: Mapping[str, str] = {
    "mixtral": "mlp.gate.weight",
    "qwen2-moe": "mlp.gate.weight",
    "qwen3-moe": "mlp.gate.weight",
    "qwen3-next": "mlp.gate.weight",
    "qwen3.5-moe": "mlp.gate.weight",
    "granite-moe": "block_sparse_moe.router.weight",
    "olmoe": "mlp.gate.weight",
    "ernie-4.5-moe": "mlp.gate.weight",
    "gpt-oss": "mlp.router.weight",
    "gemma-4-moe": "router.proj.weight",
}
PARAMETERS: Mapping[str, dict[str, Any]] = {
    "ranks and alphas of their own": {
        "target_parameters": [FUSED, DOWN],
        "rank_pattern": {r".*\.experts\.gate_up_proj": 4, r"layers\.1\..*\.down_proj": 1},
        "alpha_pattern": {r".*\.down_proj": 7},
    },
    "rsLoRA": {"target_parameters": [FUSED, DOWN], "use_rslora": True, "r": 4},
    "bare names": {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj", "v_proj"]},
    "only the second": {"target_parameters": [DOWN]},
    "only the first": {"target_parameters": ["gate_up_proj"], "target_modules": ["o_proj"]},
    "full names": {"target_parameters": [f"model.layers.1.mlp.{FUSED}", f"model.layers.2.mlp.{DOWN}"]},
    "some layers": {"target_parameters": [f"1.mlp.{FUSED}", f"1.mlp.{DOWN}"]},
    # What PEFT makes of the names that transformers 4 had: parameters, gate and up as one of twice the rank
    "old names": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "old names with the router": {"target_modules": ["gate", "gate_proj", "up_proj", "down_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
}


def with_parameters(model: str, folder: Path, **settings: Any) -> Adapted:
    return adapt(Case("LoraConfig", {**LORA, "target_modules": [], **settings}, model=model), folder)


@pytest.mark.parametrize("name", mostly_slow(ROUTERS, ("mixtral", "granite-moe", "gpt-oss", "gemma-4-moe")))
def test_stacked_experts(name: str, tmp_path: Path) -> None:
    adapted = with_parameters(name, tmp_path, target_parameters=[FUSED, DOWN, ROUTERS[name]])
    assert adapted.adapter_error() < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


@pytest.mark.parametrize("settings", PARAMETERS)
def test_settings_of_parameters(settings: str, tmp_path: Path) -> None:
    adapted = with_parameters("qwen3-moe", tmp_path, **PARAMETERS[settings])
    assert adapted.adapter_error() < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


def test_old_names_of_mixtral(tmp_path: Path) -> None:
    adapted = with_parameters("mixtral", tmp_path, target_modules=["gate", "w1", "w2", "w3", "q_proj"])
    assert adapted.adapter_error() < TOLERANCE


def test_another_order_of_wrapping_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parameters of one shape, which nothing but the order in which PEFT wraps them tells apart."""
    square = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 8}
    case = Case("LoraConfig", {**LORA, "target_modules": [], "target_parameters": [FUSED, DOWN]}, model="gpt-oss")
    adapted = adapt(case, tmp_path, **square)
    assert adapted.adapter_error() < TOLERANCE
    monkeypatch.setattr(parameters, "ORDER", parameters.ORDER[::-1])
    with pytest.raises(BaseMismatchError, match=r"gate_up_proj: the adapter is for"):
        adapted.adapter_error()


def turn(folder: Path, experts: int, version: str | None) -> None:
    """Save a stack's adapter as older PEFT did, which took rows for columns."""
    path, arrays = folder / "adapter_model.safetensors", {}
    for name, values in load_file(path).items():
        if "lora_A" in name:
            b = load_file(path)[name.replace("lora_A", "lora_B")]  # (rows, rank * experts), rank by rank
            rank = values.shape[0] // experts
            arrays[name] = b.reshape(len(b), rank, experts).transpose(2, 1, 0).reshape(-1, len(b))
            of_a = values.reshape(experts, rank, -1).transpose(2, 1, 0)
            arrays[name.replace("lora_A", "lora_B")] = of_a.reshape(values.shape[1], -1)
    path.write_bytes(safetensors_bytes(arrays))
    set_version(folder, version)


def set_version(folder: Path, version: str | None) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "peft_version": version})


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0"])
def test_older_peft_laid_stacks_the_other_way_round(version: str | None, tmp_path: Path) -> None:
    case = Case("LoraConfig", {**LORA, "target_modules": [], "target_parameters": [FUSED, DOWN]}, model="qwen3-moe")
    adapted = adapt(case, tmp_path, moe_intermediate_size=48)
    turn(adapted.folder, 4, version)
    assert adapted.adapter_error() < TOLERANCE
    assert adapted.merged_error() < TOLERANCE
    set_version(adapted.folder, "0.21.0")
    with pytest.raises(BaseMismatchError, match=r"down_proj: has shape 4x48x64, blk\.0\.ffn_down_exps"):
        adapted.adapter_error()


def square(name: str, folder: Path) -> Adapted:
    """Of experts whose down is as wide as it is high: the sizes do not tell which way it lies."""
    sizes = {"intermediate_size": 64} if name == "gpt-oss" else {"moe_intermediate_size": 64}
    case = Case("LoraConfig", {**LORA, "target_modules": [], "target_parameters": [DOWN]}, model=name)
    return adapt(case, folder, **sizes)


@pytest.mark.parametrize(
    ("name", "version", "is_turned"),
    [
        ("qwen3-moe", "0.18.0", True),
        ("qwen3-moe", "0.19.0", True),
        ("qwen3-moe", "0.19.1", False),
        ("gpt-oss", None, False),
        ("gpt-oss", "0.18.0", False),
        ("gpt-oss", "0.19.0", True),
        ("gpt-oss", "0.19.1", False),
    ],
)
def test_square_stacks(name: str, version: str | None, is_turned: bool, tmp_path: Path) -> None:
    adapted = square(name, tmp_path)
    set_version(adapted.folder, version)
    if is_turned:
        assert adapted.adapter_error() > SEEN
        turn(adapted.folder, 4, version)
    assert adapted.adapter_error() < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


def test_square_stacks_of_nobody_knows_when_are_refused(tmp_path: Path) -> None:
    adapted = square("qwen3-moe", tmp_path)
    set_version(adapted.folder, None)
    with pytest.raises(BaseMismatchError, match=r'its matrices are square.*"peft_version"'):
        adapted.adapter_error()


# Bases that hold q, k and v in one tensor, or gate and up of experts

FUSABLE = (
    "llama", "llama-biases", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "qwen3-next", "qwen3.5-moe", "mixtral",
    "gemma-2", "gemma-4-moe", "phi-2", "smollm3", "granite-moe", "olmo2", "stablelm", "starcoder2", "command-r",
    "glm-4", "exaone-4-1.2b", "ernie-4.5", "gpt-oss", "ministral-3",
)  # fmt: skip
QUICK = ("llama", "qwen2", "qwen3-next", "gemma-4-moe", "stablelm", "gpt-oss")
WITH_DORA = ("llama", "qwen2", "qwen3.5-moe", "gemma-2", "starcoder2")
BIASES: Mapping[str, Case] = {
    "trained": Case("LoraConfig", {**LORA, "bias": "all", "target_modules": ["q_proj", "v_proj"]}, model="qwen2"),
    "of the changed layers": Case(
        "LoraConfig", {**LORA, "bias": "lora_only", "target_modules": ["v_proj"]}, model="starcoder2"
    ),
    "on B": Case("LoraConfig", {**LORA, "lora_bias": True, "target_modules": ["k_proj"]}, model="llama-biases"),
    "on B of a base without": Case("LoraConfig", {**LORA, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]}),
}


@pytest.fixture(scope="module")
def fused_bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What llama.cpp's converter makes of the families with --fuse-qkv and --fuse-gate-up-exps."""
    folder = tmp_path_factory.mktemp("fused")
    return reference.convert({name: tiny_models.build(name, folder / name) for name in FUSABLE}, folder, fused=True)


def linear_and_experts(name: str, folder: Path) -> Adapted:
    experts = {"target_parameters": [FUSED, DOWN]} if name in ROUTERS else {}
    return adapt(Case("LoraConfig", {**LORA, "target_modules": "all-linear", **experts}, model=name), folder)


@pytest.mark.parametrize("name", mostly_slow(FUSABLE, QUICK))
def test_fused_bases(name: str, fused_bases: Mapping[str, Path], tmp_path: Path) -> None:
    assert any("attn_qkv" in tensor for tensor in read_header(fused_bases[name]).tensors)
    adapted = linear_and_experts(name, tmp_path)
    assert adapted.adapter_error(fused_bases[name]) < TOLERANCE
    assert adapted.merged_error(fused_bases[name]) < TOLERANCE


@pytest.mark.parametrize("name", mostly_slow(WITH_DORA, QUICK))
def test_dora_of_fused_bases(name: str, fused_bases: Mapping[str, Path], tmp_path: Path) -> None:
    """The norm of a row is that of the weight there, which lies among others."""
    case = Case("LoraConfig", {**LORA, "target_modules": "all-linear", "use_dora": True}, model=name)
    assert adapt(case, tmp_path).merged_error(fused_bases[name]) < TOLERANCE


@pytest.mark.parametrize("what", BIASES)
def test_biases_of_fused_bases(what: str, fused_bases: Mapping[str, Path], tmp_path: Path) -> None:
    """llama.cpp takes one bias of q, k and v, or all three, and leaves one or two of them out without a word."""
    adapted = adapt(BIASES[what], tmp_path)
    assert adapted.merged_error(fused_bases[BIASES[what].model]) < TOLERANCE
    assert adapted.merged_error() < TOLERANCE


def test_one_adapter_for_fused_and_split_experts(fused_bases: Mapping[str, Path], tmp_path: Path) -> None:
    """gate and up in one tensor in transformers, and in one or two in the file."""
    adapted = with_parameters("qwen3-next", tmp_path, target_parameters=[FUSED])
    assert adapted.adapter_error(fused_bases["qwen3-next"]) < TOLERANCE
    assert adapted.adapter_error() < TOLERANCE


@pytest.mark.parametrize("kind", ["fused", "split"])
def test_an_attention_that_a_layer_has_not_is_refused(
    kind: str, fused_bases: Mapping[str, Path], tmp_path: Path
) -> None:
    """Linear attention has a tensor of the same name, which is no q, k and v."""
    adapted = adapt(Case("LoraConfig", {**LORA, "target_modules": ["v_proj", "o_proj"]}, model="qwen3-next"), tmp_path)
    for file in adapted.folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"layers.3.self_attn.v_proj", b"layers.0.self_attn.v_proj"))
    with pytest.raises((BaseMismatchError, UnsupportedAdapterError), match=r"layers\.0\.self_attn\.v_proj"):
        adapted.adapter_error(fused_bases["qwen3-next"] if kind == "fused" else adapted.plain)


def test_half_of_a_fused_tensor_is_seen(
    fused_bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = with_parameters("qwen3-next", tmp_path, target_parameters=[FUSED])
    monkeypatch.setattr(placement, "_joined", lambda one, other: one)
    assert adapted.adapter_error(fused_bases["qwen3-next"]) > SEEN


# Bases that hold apart what transformers fuses


def split_qkv(source: Path, out: Path) -> Path:
    """An F32 base once more, q, k and v in tensors of their own."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    with BaseFile(source) as base:
        header = base.header
        sizes = sizes_of(header)
        ends = np.cumsum([sizes["q_rows"], sizes["kv_rows"]])
        for name, tensor in header.tensors.items():
            rows = base.rows(name)
            if "attn_qkv" in name:
                parts = zip("qkv", np.split(rows, ends), strict=True)
                tensors |= {name.replace("qkv", part): values for part, values in parts}
            else:
                tensors[name] = rows.reshape(tensor.shape)
    specs = [TensorSpec(name, values.shape, TYPES["F32"]) for name, values in tensors.items()]
    keys = {key: header.metadata.raw(key) for key in header.metadata}
    with create(out, header_bytes(keys, specs)) as file:
        for spec in specs:
            file.write(tensors[spec.name].tobytes())
            file.end_tensor(spec)
    return out


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["phi-3", "phi-3.5"])
def test_split_bases(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = Case("LoraConfig", {**LORA, "target_modules": "all-linear", **settings}, model=name)
    adapted = adapt(case, tmp_path)
    split = split_qkv(adapted.plain, tmp_path / "split.gguf")
    assert "blk.0.attn_k.weight" in read_header(split).tensors
    assert adapted.merged_error(split) < TOLERANCE
    if not settings:
        assert adapted.adapter_error(split) < TOLERANCE
