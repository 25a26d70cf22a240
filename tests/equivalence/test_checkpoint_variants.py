"""The same model stored another way: multimodal, bare, fused, in blocks, under the names of older files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from converters.base import BaseReport, convert_base
from converters.checkpoint import read_json
from converters.errors import ConversionError
from converters.reader import read_header
from tests.equivalence import reference, tiny_models
from tests.equivalence.test_families import assert_equal, difference, tensor_bytes
from tests.equivalence.tiny_models import some_ids

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")
Tensors = dict[str, Any]
Change = Callable[[Tensors], Tensors]


def rewritten(folder: Path, change: Change, config: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A folder whose tensors, and perhaps configuration, are stored another way."""
    from safetensors.torch import load_file, save_file

    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config:
        values = read_json(folder / "config.json")
        config(values)
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def converted(folder: Path, out: Path) -> tuple[BaseReport, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    report = convert_base(folder, out, quant="f32", force=True)
    return report, tensor_bytes(read_header(out))


def same_as_plain(
    name: str, tmp_path: Path, change: Change, config: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Stored another way, the file is the same."""
    _, plain = converted(tiny_models.build(name, tmp_path / "plain"), tmp_path / "plain.gguf")
    folder = rewritten(tiny_models.build(name, tmp_path / "other"), change, config)
    _, other = converted(folder, tmp_path / "other.gguf")
    assert plain == other


def renamed(replace: Mapping[str, str]) -> Change:
    def change(tensors: Tensors) -> Tensors:
        def new(name: str) -> str:
            for old, other in replace.items():
                name = name.replace(old, other, 1)
            return name

        return {new(name): tensor for name, tensor in tensors.items()}

    return change


@pytest.mark.parametrize("name", ["qwen2-moe", "qwen3-moe", "qwen3-next", "qwen3.5-moe"])
def test_experts_in_two_tensors_a_layer(name: str, tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        kept = {key: tensor for key, tensor in tensors.items() if ".experts." not in key}
        for prefix in sorted({key.partition(".experts.")[0] for key in tensors if ".experts." in key}):
            each = [
                [tensors[f"{prefix}.experts.{n}.{part}_proj.weight"] for n in range(4)]
                for part in ("gate", "up", "down")
            ]
            gate, up, down = (torch.stack(part) for part in each)
            kept[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            kept[f"{prefix}.experts.down_proj"] = down
        return kept

    same_as_plain(name, tmp_path, fuse)


def test_ernie_as_first_published(tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        kept = {key: tensor for key, tensor in tensors.items() if not any(part in key for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))}  # noqa: E501  # fmt: skip
        for layer in range(3):
            prefix = f"model.layers.{layer}"
            qkv = [tensors[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]
            kept[f"{prefix}.self_attn.qkv_proj.weight"] = torch.cat(qkv)
            gate_up = [tensors[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            kept[f"{prefix}.mlp.up_gate_proj.weight"] = torch.cat(gate_up)
        return {key.replace("model.", "ernie.", 1): tensor for key, tensor in kept.items()}

    same_as_plain("ernie-4.5", tmp_path, fuse)


def test_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    """Without the prefix, and with the masks that it keeps beside its weights."""

    def change(tensors: Tensors) -> Tensors:
        masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 512, 512) for n in range(3)}
        return {**{key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}, **masks}

    def config(values: dict[str, Any]) -> None:
        values["n_ctx"] = values["n_positions"]

    same_as_plain("gpt2", tmp_path, change, config)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_without_its_prefix(name: str, tmp_path: Path) -> None:
    same_as_plain(name, tmp_path, lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})


def test_falcon_under_its_older_names(tmp_path: Path) -> None:
    def config(values: dict[str, Any]) -> None:
        values["architectures"], values["model_type"] = ["RWForCausalLM"], "RefinedWebModel"
        values["n_head"], values["n_layer"] = values.pop("num_attention_heads"), values.pop("num_hidden_layers")
        for key in ("num_kv_heads", "ffn_hidden_size", "rope_parameters", "activation", "num_ln_in_parallel_attn"):
            values.pop(key)

    same_as_plain("falcon", tmp_path, lambda tensors: tensors, config)


def test_rotary_settings_of_older_files(tmp_path: Path) -> None:
    def config(values: dict[str, Any]) -> None:
        rope = values.pop("rope_parameters")
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}

    same_as_plain("llama-3", tmp_path, lambda tensors: tensors, config)


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5", "qwen3.5-moe"])
def test_layers_that_predict_further_tokens(name: str, tmp_path: Path) -> None:
    """transformers does not load them, so the reference is llama.cpp's converter."""

    def add(tensors: Tensors) -> Tensors:
        full = {key: value for key, value in tensors.items() if key.startswith("model.layers.3.")}
        layer = {
            key.replace("model.layers.3.", "mtp.layers.0."): torch.randn_like(value) for key, value in full.items()
        }
        norms = {
            f"mtp.{norm}.weight": torch.randn(64) for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        }
        return {**tensors, **layer, **norms, "mtp.fc.weight": torch.randn(64, 128)}

    folder = rewritten(tiny_models.build(name, tmp_path / "model"), add)
    theirs = reference.convert({"theirs": folder}, tmp_path)["theirs"]
    report = convert_base(folder, tmp_path / "ours.gguf", quant="f32")
    assert_equal(report.path, theirs)
    assert read_header(report.path).metadata[f"{report.architecture}.nextn_predict_layers"] == 1


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MULTIMODAL: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "gemma-3": ("Gemma3Config", "Gemma3ForConditionalGeneration", "gemma-3",
                {"vision_config": {**VISION, "image_size": 32, "patch_size": 16}, "mm_tokens_per_image": 4}),
    "qwen3.5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "qwen3.5",
                {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2,
                                   "out_hidden_size": 64}}),
    "qwen2-vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "qwen2",
                 {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}}),
    "qwen2.5-vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", "qwen2",
                   {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                                      "out_hidden_size": 64}}),
    "qwen3-vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "qwen3",
                 {"vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                                    "out_hidden_size": 64, "deepstack_visual_indexes": [0]}}),
    "mistral-small-3.1": ("Mistral3Config", "Mistral3ForConditionalGeneration", "mistral",
                          {"vision_config": {"model_type": "pixtral", **VISION, "image_size": 32, "patch_size": 16}}),
    "gemma-4": ("Gemma4Config", "Gemma4ForConditionalGeneration", "gemma-4-dense",
                {"vision_config": {**VISION, "head_dim": 16, "num_key_value_heads": 2, "image_size": 32,
                                   "patch_size": 16}}),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", "llama",
              {"vision_config": {"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 16,
                                 "projection_dim": 32}}),
}  # fmt: skip


MROPE = {"qwen2": [2, 3, 3], "qwen3": [6, 5, 5]}  # halves of a head, for time, height and width


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_model_of_a_multimodal_checkpoint(name: str, tmp_path: Path) -> None:
    import transformers

    config_class, model_class, text, settings = MULTIMODAL[name]
    tiny = tiny_models.TINY[text]
    text_config = getattr(transformers, tiny.config)(**{**tiny_models.COMMON, **tiny.settings}).to_dict()
    if "qwen2" in name or "qwen3-" in name:
        text_config["rope_parameters"]["mrope_section"] = MROPE[text]
    config = getattr(transformers, config_class)(text_config=text_config, **settings)
    torch.manual_seed(0)
    folder = tmp_path / "model"
    getattr(transformers, model_class)(config).save_pretrained(folder)
    tiny_models.TOKENIZERS[tiny.tokenizer](folder)
    theirs = reference.convert({"theirs": folder}, tmp_path)["theirs"]
    report = convert_base(folder, tmp_path / "ours.gguf", quant="f32")
    assert_equal(report.path, theirs)
    [left_out] = [notice for notice in report.notices if "left out" in notice]
    assert "vision" in left_out or "visual" in left_out


def mxfp4(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Random blocks (..., groups, 16) and exponents (..., groups), as gpt-oss checkpoints hold them."""
    rng = np.random.default_rng(int(values.size))
    groups = (*values.shape[:-1], values.shape[-1] // 32)
    return rng.integers(0, 256, (*groups, 16), np.uint8), rng.integers(118, 124, groups, np.uint8)


def in_blocks(tensors: Tensors) -> Tensors:
    kept = {key: value for key, value in tensors.items() if not key.endswith(("gate_up_proj", "down_proj"))}
    for key in tensors.keys() - kept.keys():
        blocks, scales = mxfp4(tensors[key].transpose(-1, -2).numpy())
        kept |= {f"{key}_blocks": torch.from_numpy(blocks), f"{key}_scales": torch.from_numpy(scales)}
    return kept


def says_mxfp4(values: dict[str, Any]) -> None:
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def test_gpt_oss_in_blocks_of_mxfp4(tmp_path: Path) -> None:
    folder = rewritten(tiny_models.build("gpt-oss", tmp_path / "model"), in_blocks, says_mxfp4)
    theirs = reference.convert({"theirs": folder}, tmp_path, outtype="f16")["theirs"]
    report = convert_base(folder, tmp_path / "ours.gguf", quant="f16")
    assert report.types["MXFP4"] == 12
    assert_equal(report.path, theirs)
    other = convert_base(folder, tmp_path / "q8.gguf", quant="q8_0")
    assert other.types["MXFP4"] == 12
    assert any("MXFP4" in notice for notice in other.notices)


def test_blocks_of_mxfp4_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = rewritten(tiny_models.build("gpt-oss", tmp_path / "model"), in_blocks, says_mxfp4)
    convert_base(folder, tmp_path / "blocks.gguf", quant="f32")

    def unpacked(tensors: Tensors) -> Tensors:
        kept = {key: value for key, value in tensors.items() if not key.endswith(("_blocks", "_scales"))}
        for key in tensors:
            if key.endswith("_blocks"):
                scales = tensors[key.replace("_blocks", "_scales")]
                kept[key.removesuffix("_blocks")] = convert_moe_packed_tensors(
                    tensors[key], scales, dtype=torch.float32
                )
        return kept

    plain = rewritten(folder, unpacked, lambda values: values.pop("quantization_config"))
    convert_base(plain, tmp_path / "plain.gguf", quant="f32")
    blocks, values = (tensor_bytes(read_header(tmp_path / f"{name}.gguf")) for name in ("blocks", "plain"))
    stacks = [name for name in blocks if name.endswith("_exps.weight")]
    assert len(stacks) == 12
    for name in stacks:
        kind, shape, data = blocks[name]
        rows = np.frombuffer(data, np.uint8).reshape(-1, shape[-1] // 32 * 17)
        made = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).reshape(shape)
        np.testing.assert_array_equal(made, np.frombuffer(values[name][2], np.float32).reshape(shape))
    assert difference("gpt-oss", plain, tmp_path / "plain.gguf") < 1e-3


def test_a_gemma_with_an_output_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = rewritten(
        tiny_models.build("gemma", tmp_path / "model"),
        lambda tensors: {**tensors, "lm_head.weight": torch.randn(400, 64)},
    )
    with pytest.raises(ConversionError, match=r"lm_head\.weight: differs"):
        convert_base(folder, tmp_path / "ours.gguf", quant="f32")


def test_gemma_4_without_a_cap_on_its_logits(tmp_path: Path) -> None:
    """llama.cpp caps them at 30 where the file does not say otherwise."""
    folder = tiny_models.build("gemma-4-dense", tmp_path / "model", final_logit_softcapping=None)
    assert difference("gemma-4-dense", folder, tmp_path / "base.gguf") < tiny_models.GELU_TOLERANCE


@pytest.mark.parametrize("name", ["llama-3", "qwen3"])
def test_an_untied_output_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    from tests.equivalence import llamacpp

    folder = tiny_models.build(name, tmp_path / "model")
    tied = convert_base(folder, tmp_path / "tied.gguf", quant="f32")
    untied = convert_base(folder, tmp_path / "untied.gguf", quant="f32", untie=True)
    assert untied.n_tensors == tied.n_tensors + 1
    ids = some_ids(folder, 50)
    np.testing.assert_array_equal(llamacpp.logits(tied.path, ids), llamacpp.logits(untied.path, ids))
    assert tied.fingerprint == untied.fingerprint
