"""A base and adapters in one file: what llama.cpp computes with it, what is kept bit for bit, what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.base_file import BaseFile
from converters.bundle import BundleOptions, BundleReport, Member, bundle
from converters.bundle_layout import MATRICES
from converters.bundle_stacks import _rows
from converters.errors import (
    BaseMismatchError,
    ConversionError,
    FormatError,
    OutputExistsError,
    UnsupportedAdapterError,
    UnsupportedError,
    WriteError,
)
from converters.gguf_adapter import open_gguf_adapter
from converters.options import QuantizeOptions
from converters.reader import GGUFHeader, read_header
from converters.requantize import requantize
from tests.conftest import TINY_BASE
from tests.converters.bundle_files import copy_of, write_adapter
from tests.converters.folders import make_model
from tests.equivalence.llamacpp import logits, tokenize

START = 1  # <|im_start|>, which conversations of the tiny base begin with
PROMPT = (START, 44, 300, 2000, 17, 555, 9, 8, 1000, 31)
EXACT = 1e-4
"""Of logits around 10 in float32: the sum of base and change is added up in another order, and no more (1e-5)."""
FLIPPED = 0.3
"""On a quantized base: what differs by float32's rounding (a scale that is in B, or comes after) now and then falls on
the other side where the next product's input is rounded to 8 bits. 0.15 was measured; without a scale, nothing."""
OTHER_TYPE = 0.5
"""Where queries, keys and values are held in F32 for what was Q4_K and Q6_K: their input is no longer rounded to 8 bits
before it is multiplied. Another adapter's logits are 5 and more away."""
QUANTIZED = 1.5
"""Of weights in 8 bits against those in 32: two models, of which the same adapter makes nearly the same."""
ROUNDED = 0.5
"""Of adapters in 8 or 16 bits: llama.cpp rounds what they are multiplied by to their type, and a bundle to its own."""
APART = 2.0
"""What another adapter, or none, changes at least."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        quant: convert_base(TINY_BASE, folder / f"{quant}.gguf", quant=quant).path
        for quant in ("f32", "q8_0", "q4_k_m")
    }


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["f32"]


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of different ranks, scales and matrices."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "red": write_adapter(folder / "red.gguf", base, 1),
        "blue": write_adapter(folder / "blue.gguf", base, 2, rank=7, metadata={"adapter.lora.alpha": 14.0}),
        "thin": write_adapter(folder / "thin.gguf", base, 3, rank=1, matrices=("attn_q", "attn_v"), strength=0.9),
    }


def members(adapters: Mapping[str, Path], substitute: int = START, scale: float = 1.0) -> list[Member]:
    return [Member(name, path, scale, substitute) for name, path in adapters.items()]


def switched(report: BundleReport, name: str) -> list[int]:
    """The prompt with an adapter's control token in the place of its first."""
    token = next(token for token in report.tokens if token.name == name)
    return [token.id, *PROMPT[1:]]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest between two sets of logits, of the tokens that both have."""
    shared = min(one.shape[1], other.shape[1])
    return float(abs(one[:, :shared] - other[:, :shared]).max())


def assert_computes_the_same(
    base: Path, adapters: Mapping[str, Path], report: BundleReport, tolerance: float, names: Sequence[str] = ()
) -> None:
    plain = logits(base, PROMPT)
    assert distance(logits(report.path, PROMPT), plain) < tolerance
    own = {name: logits(base, PROMPT, adapters[name]) for name in names or adapters}
    for name, wanted in own.items():
        found = logits(report.path, switched(report, name))
        assert distance(found, wanted) < tolerance, name
        others = [plain, *(other for key, other in own.items() if key != name)]
        assert all(distance(found, other) > APART for other in others), name


# What llama.cpp computes


def test_every_adapter_is_what_it_is_alone(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    assert (report.rank, report.dtype, report.rounding) == (8, "f32", 0.0)
    assert_computes_the_same(base, adapters, report, EXACT)


def test_behind_another_token_it_would_not_be(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Why the control token takes the first token's place: behind it, that one's keys and values are the base's."""
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    token = report.tokens[0].id
    behind = logits(report.path, [START, token, *PROMPT[1:]])[-1:]
    wanted = logits(base, [START, *PROMPT], adapters["red"])[-1:]
    assert distance(behind, wanted) > 100 * EXACT
    assert distance(logits(report.path, [token, token, *PROMPT[1:]])[-1:], wanted) < EXACT


@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_stay_as_they_are(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, tied: bool
) -> None:
    base = bases["q8_0"]
    if not tied:
        output = np.random.default_rng(0).standard_normal((4096, 256)) * 0.3
        base = copy_of(base, tmp_path / "untied.gguf", {"output.weight": output})
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    assert not report.notices
    with BaseFile(base) as before, BaseFile(report.path) as after:
        for name, tensor in before.header.tensors.items():
            if name.split(".")[-2] not in ("attn_q", "attn_k", "attn_v"):
                assert after.header.tensors[name].type_name == tensor.type_name
                rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
                assert np.array_equal(after.blocks(name, 0, rows), before.blocks(name))
        for layer in range(4):
            parts = [before.blocks(f"blk.{layer}.attn_{part}.weight") for part in "qkv"]
            assert np.array_equal(after.blocks(f"blk.{layer}.attn_qkv.weight"), np.concatenate(parts))
            assert after.header.tensors[f"blk.{layer}.attn_qkv.weight"].type_name == "Q8_0"
    assert_computes_the_same(base, adapters, report, FLIPPED)


def test_a_mixture_of_types_keeps_every_value(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["q4_k_m"]
    types = {name: tensor.type_name for name, tensor in read_header(base).tensors.items()}
    mixed = [layer for layer in range(4) if types[f"blk.{layer}.attn_q.weight"] != types[f"blk.{layer}.attn_v.weight"]]
    assert 0 < len(mixed) < 4, "the recipe gives both kinds of layers"
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    assert len(report.notices) == 1
    assert f"{len(mixed)} of 4 layers" in report.notices[0]
    assert "Q4_K" in report.notices[0]
    assert "Q6_K" in report.notices[0]
    with BaseFile(base) as before, BaseFile(report.path) as after:
        for layer in range(4):
            name = f"blk.{layer}.attn_qkv.weight"
            parts = [before.rows(f"blk.{layer}.attn_{part}.weight") for part in "qkv"]
            assert np.array_equal(after.rows(name), np.concatenate(parts))
            assert (after.header.tensors[name].type_name == "F32") == (layer in mixed)
    assert_computes_the_same(base, adapters, report, OTHER_TYPE)


def test_a_bundle_is_quantized_as_any_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """So a mixture of types needs no float32: bundle first, and quantize then."""
    report = bundle(base, members(adapters), tmp_path / "f32.gguf")
    small = requantize(report.path, tmp_path / "q8_0.gguf", QuantizeOptions("q8_0")).path
    with BaseFile(report.path) as before, BaseFile(small) as after:
        for name, tensor in after.header.tensors.items():
            if ".lora_" in name:
                assert np.array_equal(after.blocks(name), before.blocks(name))
            else:
                assert tensor.type_name == ("F32" if "norm" in name else "Q8_0")
    assert_computes_the_same(base, adapters, replace(report, path=small), QUANTIZED)


def test_a_smaller_type_for_mixtures_is_asked_for_and_said(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["q4_k_m"]
    exact = bundle(base, members(adapters), tmp_path / "exact.gguf")
    small = bundle(base, members(adapters), tmp_path / "small.gguf", BundleOptions(fused_type="q8_0"))
    assert small.size_bytes < exact.size_bytes
    assert "values rounded" in small.notices[0]
    assert "every value as it was" in exact.notices[0]
    assert_computes_the_same(base, adapters, small, OTHER_TYPE)


def test_scale_and_alpha_are_in_b(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = bundle(base, members(adapters, scale=-0.3), tmp_path / "out.gguf")
    stacks = {name: tensor for name, tensor in read_header(report.path).tensors.items() if ".lora_" in name}
    assert len(stacks) == 4 * 2 * len(MATRICES)
    with open_gguf_adapter(adapters["blue"]) as file, BaseFile(report.path) as made:
        pair = next(pair for pair in file.pairs if pair.tensor == "blk.2.ffn_down.weight")
        b, a = pair.load()
        stack = made.rows("blk.2.ffn_down.lora_b").reshape(4, 256, 8)
        assert np.array_equal(stack[2, :, :7], b * np.float32(-0.3))
        assert not stack[0].any()
        assert not stack[:, :, 7].any()
        assert np.array_equal(made.rows("blk.2.ffn_down.lora_a").reshape(4, 8, 256)[2, :7], a)
    other = write_adapter(tmp_path / "scaled.gguf", base, 2, rank=7, metadata={"adapter.lora.alpha": -0.3 * 14.0})
    found, wanted = logits(report.path, switched(report, "blue")), logits(base, PROMPT, other)
    assert distance(found, wanted) < EXACT
    assert distance(found, logits(base, PROMPT, adapters["blue"])) > APART


@pytest.mark.parametrize(
    ("kinds", "dtype", "wanted"),
    [(("F16", "F16"), None, "f16"), (("F16", "BF16"), None, "f32"), (("Q8_0", "Q8_0"), None, "f32"),
     (("F32", "F32"), "f16", "f16")],
)  # fmt: skip
def test_types_of_adapters(base: Path, tmp_path: Path, kinds: Sequence[str], dtype: str | None, wanted: str) -> None:
    made = {
        kind + str(n): write_adapter(tmp_path / f"{n}.gguf", base, n, rank=32, kind=kind)
        for n, kind in enumerate(kinds)
    }
    report = bundle(base, members(made), tmp_path / "out.gguf", BundleOptions(dtype))
    assert report.dtype == wanted
    assert {t.type_name for n, t in read_header(report.path).tensors.items() if ".lora_" in n} == {wanted.upper()}
    loses = dtype is not None
    assert (report.rounding > 0) == loses
    assert_computes_the_same(base, made, report, ROUNDED)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_stacks_are_the_same_however_they_are_read(base: Path, adapters: dict[str, Path], chunk: int) -> None:
    with open_gguf_adapter(adapters["red"]) as red, open_gguf_adapter(adapters["blue"]) as blue:
        slots = [red.pairs[0], None, blue.pairs[0]]
        for shape, side in (((8, 256), 1), ((256, 8), 0)):
            n_rows = 4 * shape[0]
            whole = _rows(slots, shape, side, 0, n_rows)
            parts = [_rows(slots, shape, side, at, min(at + chunk, n_rows)) for at in range(0, n_rows, chunk)]
            assert np.array_equal(np.concatenate(parts), whole)
            assert whole.any()
            assert not whole[: shape[0]].any()


SHAPES: Mapping[str, dict[str, Any]] = {
    "no two sizes alike": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 32,
                           "num_key_value_heads": 2},
    "every head has its keys": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "stretched linearly": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "stretched by YaRN": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                              "original_max_position_embeddings": 32}},
}  # fmt: skip


@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_other_shapes_and_rope(settings: dict[str, Any], tmp_path: Path) -> None:
    base = convert_base(make_model(tmp_path / "model", **settings), tmp_path / "base.gguf", quant="f32").path
    made = {name: write_adapter(tmp_path / f"{name}.gguf", base, n, strength=0.6) for n, name in enumerate("ab")}
    report = bundle(base, members(made, substitute=3), tmp_path / "out.gguf")
    prompt = [3, 5, 60, 17, 42, 9, 33, 21]
    own = {name: logits(base, prompt, path) for name, path in made.items()}
    for token in report.tokens:
        found = logits(report.path, [token.id, *prompt[1:]])
        assert distance(found, own[token.name]) < EXACT
        assert all(distance(found, own[other]) > 100 * EXACT for other in own if other != token.name)
    assert distance(logits(report.path, prompt), logits(base, prompt)) < EXACT


# Control tokens


def test_new_tokens_stand_behind_the_vocabulary(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    assert [(token.id, token.is_added) for token in report.tokens] == [(4096, True), (4097, True), (4098, True)]
    header = read_header(report.path)
    assert header.metadata["tokenizer.ggml.tokens"][-3:] == ["<|red|>", "<|blue|>", "<|thin|>"]
    assert header.metadata["tokenizer.ggml.token_type"][-3:] == [3, 3, 3]
    assert header.metadata["tokenizer.ggml.suppress_tokens"] == [4096, 4097, 4098]
    assert header.metadata["graniteswitch.vocab_size"] == 4099
    found = logits(report.path, PROMPT)
    assert np.array_equal(found[:, 4096], found[:, START])
    ((first, *others),) = tokenize(report.path, ["<|blue|>user\nhello"], special=True)
    assert first == 4097
    assert others == tokenize(base, ["<|im_start|>user\nhello"], special=True)[0][1:]
    assert 4097 not in tokenize(base, ["<|blue|>user\nhello"], special=True)[0]


def reserved(base: Path, path: Path, texts: Mapping[int, str], kind: int = 3) -> Path:
    """The base with some tokens that are kept for later."""
    metadata = read_header(base).metadata
    tokens, kinds = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    for id, text in texts.items():
        tokens[id], kinds[id] = text, kind
    return copy_of(base, path, metadata={"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        ({4000: "<|reserved_special_token_1|>", 4001: "<|reserved_special_token_2|>"}, 3),
        ({4000: "<unused7>", 4001: "<unused8>"}, 1),
        ({4000: "[PAD4000]", 4001: "[PAD4001]"}, 5),
    ],
)
def test_tokens_kept_for_later_are_taken_first(
    base: Path, adapters: dict[str, Path], tmp_path: Path, texts: dict[int, str], kind: int
) -> None:
    kept = reserved(base, tmp_path / "kept.gguf", texts, kind)
    report = bundle(kept, members(adapters), tmp_path / "out.gguf")
    assert [(token.id, token.is_added) for token in report.tokens] == [(4000, False), (4001, False), (4096, True)]
    assert read_header(report.path).metadata["tokenizer.ggml.tokens"][4000] == "<|red|>"
    assert tokenize(report.path, ["<|red|>"], special=True) == [[4000]]
    assert_computes_the_same(kept, adapters, report, EXACT)


def test_a_kept_token_that_something_uses_is_left_alone(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    texts = {4000: "<|reserved_special_token_0|>", 4001: "<|reserved_special_token_1|>", 4002: "<unused1>"}
    kept = copy_of(
        reserved(base, tmp_path / "kept.gguf", texts),
        tmp_path / "used.gguf",
        metadata={"tokenizer.ggml.padding_token_id": 4000, "tokenizer.chat_template": "{{ '<unused1>' }}"},
    )
    report = bundle(kept, members(adapters), tmp_path / "out.gguf")
    assert [token.id for token in report.tokens] == [4001, 4096, 4097]


def test_llama_cpp_puts_no_bos_in_front(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with_bos = copy_of(base, tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    report = bundle(with_bos, members(adapters), tmp_path / "out.gguf")
    assert tokenize(with_bos, ["hello"], special=True)[0][0] == 0
    assert tokenize(report.path, ["<|red|>hello"], special=True)[0][0] == report.tokens[0].id


# Keys


def test_keys_go_over(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    strange = {"llama.logit_scale": 7.0, "llama.rope.scaling.finetuned": False, "llama.attention.scale": 3.0}
    source = copy_of(base, tmp_path / "strange.gguf", metadata=strange)
    report = bundle(source, members(adapters), tmp_path / "out.gguf", metadata={"my.key": 3})
    metadata = read_header(report.path).metadata
    assert not [key for key in metadata if key.startswith("llama.")]
    assert metadata["graniteswitch.rope.freq_base"] == 10000.0
    assert metadata["graniteswitch.logit_scale"] == 1.0
    assert metadata["my.key"] == 3
    assert "edgelora.fingerprint" not in metadata
    assert_computes_the_same(source, adapters, report, EXACT)


def test_templates_that_know_no_control_tokens_are_said(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    source = copy_of(base, tmp_path / "tools.gguf", metadata={"tokenizer.chat_template.tool_use": "{{ 1 }}"})
    report = bundle(source, members(adapters), tmp_path / "out.gguf", template="{{ 2 }}")
    assert any("tool_use" in notice for notice in report.notices)
    metadata = read_header(report.path).metadata
    assert metadata["tokenizer.chat_template"] == "{{ 2 }}"
    assert "tokenizer.chat_template.tool_use" not in metadata


# Refusals


WIDE = np.ones((256, 256))
BASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({f"blk.{n}.attn_q.bias": np.ones(256) for n in range(4)}, {}, r"blk.\*.attn_q.bias \(4 layers\): a bias"),
    ({"blk.0.attn_k_norm.weight": np.ones(32)}, {}, "attn_k_norm.weight .*a norm of queries or keys"),
    ({"rope_freqs.weight": np.ones(16)}, {}, "rope_freqs.weight: rope factors"),
    ({"blk.1.ffn_gate_exps.weight": np.ones((2, 256, 256))}, {}, "experts"),
    ({"blk.1.ffn_gate.scale": np.ones(1)}, {}, "ffn_gate.scale .*a scale"),
    ({"strange.weight": WIDE}, {}, "strange.weight"),
    ({"blk.3.ffn_up.weight": None}, {}, "without blk.3.ffn_up.weight"),
    ({"blk.3.ffn_up.weight": np.ones((128, 256))}, {}, r"blk.3.ffn_up.weight of shape \(128, 256\)"),
    ({}, {"llama.expert_count": 8}, "llama.expert_count 8"),
    ({}, {"llama.attention.value_length": 16}, "value_length 16, where heads are 32 wide"),
    ({}, {"llama.rope.dimension_count": 16}, "rope.dimension_count 16"),
    ({}, {"llama.feed_forward_length": [256, 256, 256, 128]}, "feed_forward_length is"),
    ({}, {"llama.block_count": None}, "block_count is None"),
    ({}, {"edgelora.tokenizer": "huggingface"}, "its tokenizer"),
    ({}, {"tokenizer.ggml.model": "no_vocab"}, "without a vocabulary"),
    ({}, {"general.architecture": "qwen2"}, "its architecture is qwen2"),
]


@pytest.mark.parametrize(("tensors", "metadata", "message"), BASES, ids=[row[2][:30] for row in BASES])
def test_bases_are_refused_by_name(
    base: Path, adapters: dict[str, Path], tmp_path: Path, tensors: Any, metadata: Any, message: str
) -> None:
    broken = copy_of(base, tmp_path / "broken.gguf", tensors, metadata)
    with pytest.raises(UnsupportedError, match=message):
        bundle(broken, members(adapters), tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf"]


def test_all_problems_of_a_base_at_once(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.ones(16), "blk.0.attn_output.bias": np.ones(256)}
    broken = copy_of(base, tmp_path / "broken.gguf", tensors)
    with pytest.raises(UnsupportedError, match=r"(?s)rope_freqs.*attn_output\.bias"):
        bundle(broken, members(adapters), tmp_path / "out.gguf")


PAIR = (np.ones((2, 256)), np.ones((256, 2)))
ADAPTERS: list[tuple[dict[str, Any], type[ConversionError], str]] = [
    ({"tensors": {"token_embd.weight.lora_a": np.ones((4096, 2)), "token_embd.weight.lora_b": PAIR[1]}},
     UnsupportedAdapterError, "an adapter of the embeddings"),
    ({"tensors": {"output.weight.lora_a": PAIR[0], "output.weight.lora_b": np.ones((4096, 2))}},
     UnsupportedAdapterError, "an adapter of the output"),
    ({"tensors": {"blk.0.ffn_up_exps.weight.lora_a": np.ones((2, 2, 256)),
                  "blk.0.ffn_up_exps.weight.lora_b": np.ones((2, 256, 2))}},
     UnsupportedAdapterError, "an adapter of experts"),
    ({"tensors": {"blk.0.ffn_gate_inp.weight.lora_a": PAIR[0], "blk.0.ffn_gate_inp.weight.lora_b": PAIR[1]}},
     UnsupportedAdapterError, "no matrix that a bundle switches"),
    ({"tensors": {"blk.0.attn_norm.weight": np.ones(256)}}, UnsupportedAdapterError, "attn_norm.weight"),
    ({"metadata": {"adapter.alora.invocation_tokens": [3, 4]}}, UnsupportedAdapterError, "aLoRA"),
    ({"tensors": {"blk.9.attn_q.weight.lora_a": PAIR[0], "blk.9.attn_q.weight.lora_b": PAIR[1]}},
     BaseMismatchError, "the base has 4 layers"),
    ({"tensors": {"blk.0.attn_q.weight.lora_b": np.ones((128, 4))}}, BaseMismatchError, "adapter 128x256"),
    ({"metadata": {"general.architecture": "qwen2"}}, BaseMismatchError, "its architecture is qwen2"),
    ({"tensors": {"blk.0.attn_q.weight.lora_b": np.full((256, 4), np.nan)}}, UnsupportedAdapterError, "NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ADAPTERS, ids=[row[2][:30] for row in ADAPTERS])
def test_adapters_are_refused_by_name(
    base: Path, tmp_path: Path, changes: Any, error: type[ConversionError], message: str
) -> None:
    good, bad = write_adapter(tmp_path / "good.gguf", base, 1), write_adapter(tmp_path / "bad.gguf", base, 2, **changes)
    with pytest.raises(error, match=message):
        bundle(base, members({"good": good, "bad": bad}), tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "good.gguf"]
    assert bundle(base, members({"good": good}), tmp_path / "out.gguf").path.is_file()


def test_values_too_large_for_the_type(base: Path, tmp_path: Path) -> None:
    large = write_adapter(
        tmp_path / "large.gguf", base, 1, tensors={"blk.0.attn_q.weight.lora_b": np.full((256, 4), 1e5)}
    )
    with pytest.raises(UnsupportedAdapterError, match="too large for f16"):
        bundle(base, members({"large": large}), tmp_path / "out.gguf", BundleOptions("f16"))
    assert bundle(base, members({"large": large}), tmp_path / "out.gguf").dtype == "f32"


@pytest.mark.parametrize(
    ("name", "message"),
    [("im_start", r"the base has a token <\|im_start\|>"), ("end", "means something else"), ("eot_id", "means")],
)
def test_names_that_are_tokens_already(base: Path, tmp_path: Path, name: str, message: str) -> None:
    path = write_adapter(tmp_path / "a.gguf", base, 1)
    with pytest.raises(UnsupportedError, match=message):
        bundle(base, members({name: path}), tmp_path / "out.gguf")
    assert bundle(base, members({f"{name}2": path}), tmp_path / "out.gguf").path.is_file()


def test_other_refusals(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    report = bundle(base, members(adapters), tmp_path / "out.gguf")
    before = report.path.read_bytes()
    again: list[tuple[type[ConversionError], Callable[[], object], str]] = [
        (UnsupportedError, lambda: bundle(report.path, members(adapters), tmp_path / "two.gguf"), "a bundle already"),
        (FormatError, lambda: bundle(adapters["red"], members(adapters), tmp_path / "two.gguf"), "is an adapter"),
        (FormatError, lambda: bundle(base, members({"base": base}), tmp_path / "two.gguf"), "is a base"),
        (UnsupportedError, lambda: bundle(base, [], tmp_path / "two.gguf"), "0 adapters"),
        (UnsupportedError, lambda: bundle(base, [*members(adapters), *members(adapters)], tmp_path / "two.gguf"),
         "2 adapters are called so"),
        (UnsupportedError, lambda: bundle(base, members(adapters, 5000), tmp_path / "two.gguf"), "there are 4096"),
        (UnsupportedError, lambda: BundleOptions("q4_0"), "unknown dtype"),
        (UnsupportedError, lambda: BundleOptions(fused_type="q4_k"), "unknown fused type"),
        (OutputExistsError, lambda: bundle(base, members(adapters), report.path), "already exists"),
        (WriteError, lambda: bundle(base, members(adapters), base, force=True), "which is read for it"),
        (WriteError, lambda: bundle(base, members(adapters), adapters["red"], force=True), "which is read for it"),
    ]  # fmt: skip
    for error, refused, message in again:
        with pytest.raises(error, match=message):
            refused()
    assert report.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert bundle(base, members(adapters), report.path, force=True).size_bytes == len(before)


def test_nothing_is_left_of_a_failure(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def fail(done: int, total: int, what: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle(base, members(adapters), tmp_path / "out.gguf", progress=fail)
    assert not [*tmp_path.iterdir()]


def test_a_split_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    options = QuantizeOptions("f32", split_max_tensors=10)
    split = convert_base(TINY_BASE, folder / "base.gguf", options=options).path
    report = bundle(split, members(adapters), tmp_path / "split.gguf")
    whole = bundle(base, members(adapters), tmp_path / "whole.gguf")
    assert tensors_of(read_header(report.path)) == tensors_of(read_header(whole.path))
    assert not [key for key in read_header(report.path).metadata if key.startswith("split.")]


def tensors_of(header: GGUFHeader) -> dict[str, tuple[Any, ...]]:
    return {name: (tensor.shape, tensor.type_name) for name, tensor in header.tensors.items()}


def test_memory_does_not_grow_with_the_adapters(base: Path, tmp_path: Path) -> None:
    many = {f"a{n}": write_adapter(tmp_path / f"a{n}.gguf", base, n, rank=256) for n in range(5)}
    one = {"a0": many["a0"]}
    peaks = [peak_bytes(lambda made=made: bundle(base, members(made), tmp_path / "out.gguf", force=True))  # type: ignore[misc]
             for made in (one, one, many)]  # fmt: skip
    assert peaks[2] < peaks[1] + many["a0"].stat().st_size / 2


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
