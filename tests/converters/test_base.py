"""Converting a base: what is written, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters import base as base_module
from converters.base import convert_base
from converters.checkpoint import Checkpoint
from converters.errors import (
    ConversionError,
    DiskFullError,
    FormatError,
    MissingFileError,
    OutputExistsError,
    UnsupportedArchitectureError,
    UnsupportedError,
    WriteError,
)
from converters.model import understand
from converters.quant_types import RECIPES
from converters.reader import read_header
from tests.conftest import ROOT
from tests.converters.folders import CONFIG, make_model, safetensors_bytes, weights, write_json


def permuted(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of q and k rows, written as its converter does."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_f32_holds_the_weights_under_llama_cpps_names(tmp_path: Path) -> None:
    out = tmp_path / "base.gguf"
    report = convert_base(make_model(tmp_path / "model"), out, quant="F32")
    read = {tensor.name: tensor.data.reshape(tensor.shape[::-1]) for tensor in gguf.GGUFReader(out).tensors}
    given = weights(CONFIG)
    assert len(read) == report.n_tensors == len(given)
    layer = "model.layers.1."
    np.testing.assert_array_equal(read["token_embd.weight"], given["model.embed_tokens.weight"])
    np.testing.assert_array_equal(read["output.weight"], given["lm_head.weight"])
    np.testing.assert_array_equal(read["blk.1.ffn_down.weight"], given[layer + "mlp.down_proj.weight"])
    np.testing.assert_array_equal(read["blk.1.attn_q.weight"], permuted(given[layer + "self_attn.q_proj.weight"], 4))
    np.testing.assert_array_equal(read["blk.1.attn_k.weight"], permuted(given[layer + "self_attn.k_proj.weight"], 2))
    assert not np.array_equal(read["blk.1.attn_q.weight"], given[layer + "self_attn.q_proj.weight"])


WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "head_dim": 32,
}  # fills Q1_0's blocks, which nothing stands in for


@pytest.mark.parametrize("quant", RECIPES)
def test_the_report_and_the_header_say_what_is_in_the_file(quant: str, tmp_path: Path) -> None:
    out, steps = tmp_path / "base.gguf", []
    progress = lambda done, total, what: steps.append((done, total, what))  # noqa: E731
    folder = make_model(tmp_path / "my-model", **WIDE)
    report = convert_base(folder, out, quant=quant, progress=progress, metadata={"x.y": "z"})
    header = read_header(out)
    assert report.size_bytes == out.stat().st_size == steps[-1][0] == steps[-1][1]
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert sum(report.types.values()) == report.n_tensors == len(header.tensors)
    assert header.metadata["general.file_type"] == RECIPES[quant].file_type
    assert header.metadata["edgelora.fingerprint"] == report.fingerprint
    assert header.metadata["general.name"] == report.name == "My Model"
    assert header.metadata["x.y"] == "z"
    assert header.kind == "base"


def test_chunks_and_threads_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, one, many = make_model(tmp_path / "model"), tmp_path / "one.gguf", tmp_path / "many.gguf"
    convert_base(folder, one, quant="q8_0", threads=1)
    monkeypatch.setattr(base_module, "CHUNK_BYTES", 1000)  # cuts heads in the middle
    convert_base(folder, many, quant="q8_0", threads=5)
    assert one.read_bytes() == many.read_bytes()


def test_dry_run_plans_exactly_and_writes_nothing(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    planned = convert_base(folder, out, quant="q4_k_m", dry_run=True)
    assert list(tmp_path.iterdir()) == [folder]
    written = convert_base(folder, out, quant="q4_k_m")
    assert planned.size_bytes == written.size_bytes == out.stat().st_size
    assert planned.types == written.types


def test_overwriting_needs_force(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    out.write_text("precious")
    with pytest.raises(OutputExistsError, match="already exists") as caught:
        convert_base(folder, out)
    assert "--force" in caught.value.hint
    assert out.read_text() == "precious"
    convert_base(folder, out, force=True)
    assert read_header(out).tensors


def test_a_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    out.write_text("precious")

    def fail(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_base(folder, out, force=True, progress=fail)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "model"]


CHILD = """
    import resource, sys
    from pathlib import Path
    from converters.base import convert_base
    from converters.errors import ConversionError
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    try:
        convert_base(Path(sys.argv[1]), Path(sys.argv[2]), quant="f32")
    except ConversionError as error:
        print(type(error).__name__, error.message)
"""


@pytest.mark.parametrize("limit", [100, 20_000, 100_000])
def test_a_full_disk_is_named_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as it does on a full disk; header, tensors and padding each meet it."""
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(out / "base.gguf"), str(limit)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert child.stdout.startswith("DiskFullError"), child.stderr
    assert "nothing was left behind" in child.stdout
    assert list(out.iterdir()) == []
    command[-1] = str(resource.RLIM_INFINITY)
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == ""
    assert [path.name for path in out.iterdir()] == ["base.gguf"]


def test_too_little_space_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("converters.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match="1,000 are free"):
        convert_base(make_model(tmp_path / "model"), tmp_path / "base.gguf")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    with pytest.raises(WriteError, match="there is no folder"):
        convert_base(folder, tmp_path / "none" / "base.gguf")
    with pytest.raises(WriteError, match="is a folder"):
        convert_base(folder, folder)
    for length in (300, 240):  # by itself, and with the ending of a file that is not whole yet
        with pytest.raises(WriteError, match="too long"):
            convert_base(folder, tmp_path / ("a" * (length - 5) + ".gguf"), dry_run=True)


def test_what_was_made_inside_the_model_folder_can_be_made_again(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    convert_base(folder, folder / "base.gguf", quant="f32")
    assert convert_base(folder, folder / "base.gguf", quant="f16", force=True).types["F16"] > 0


def test_layers_share_the_order_of_their_rows(tmp_path: Path) -> None:
    """Those of 128 experts take megabytes a layer."""
    with Checkpoint(make_model(tmp_path / "model")) as checkpoint:
        views = understand(checkpoint).views
        q, other_q, k = (views[f"blk.{name}.weight"].order for name in ("0.attn_q", "1.attn_q", "0.attn_k"))
        assert q is not None
        assert q is other_q
        assert q is not k


LLAMA3_UPSIDE_DOWN = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_two_ways_to_write_one_rope_are_no_contradiction(tmp_path: Path) -> None:
    folder, linear = make_model(tmp_path / "model"), {"factor": 4.0}
    two = {"rope_scaling": {**linear, "type": "linear"}, "rope_parameters": {**linear, "rope_type": "linear"}}
    write_json(folder / "config.json", {**CONFIG, **two})
    convert_base(folder, tmp_path / "base.gguf")
    assert read_header(tmp_path / "base.gguf").metadata["llama.rope.scaling.factor"] == 4.0


def test_inputs_and_devices_are_not_written_over(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    data, link, pipe = (folder / "model.safetensors").read_bytes(), tmp_path / "link.gguf", tmp_path / "pipe"
    link.symlink_to(folder / "model.safetensors")
    for out in (folder / "model.safetensors", folder / "config.json", link):
        with pytest.raises(WriteError, match="which is read for it"):
            convert_base(folder, out, force=True)
    os.mkfifo(pipe)
    for out in (pipe, Path("/dev/null")):
        with pytest.raises(WriteError, match="not a file"):
            convert_base(folder, out, force=True)
    assert (folder / "model.safetensors").read_bytes() == data


def test_a_link_stays_one_and_its_target_is_written(tmp_path: Path) -> None:
    folder, disk, link = make_model(tmp_path / "model"), tmp_path / "disk", tmp_path / "link.gguf"
    disk.mkdir()
    link.symlink_to(disk / "base.gguf")
    convert_base(folder, link)
    assert link.is_symlink()
    assert read_header(disk / "base.gguf").tensors
    assert [path.name for path in disk.iterdir()] == ["base.gguf"]


def test_another_runs_partial_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = make_model(tmp_path / "model"), tmp_path / "base.gguf.abc.partial"
    other.write_text("of another run")
    monkeypatch.setattr("converters.writer.secrets.token_hex", lambda size: "abc")
    with pytest.raises(WriteError):
        convert_base(folder, tmp_path / "base.gguf")
    assert other.read_text() == "of another run"


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr("converters.writer.os.fsync", sync)
    convert_base(make_model(tmp_path / "model"), tmp_path / "base.gguf")
    assert read_header(tmp_path / "base.gguf").tensors


CONFIGS: dict[str, tuple[dict[str, Any], type[ConversionError], str]] = {
    "family": (
        {"architectures": ["LlamaForCausalLm"]},
        UnsupportedArchitectureError,
        "the nearest known one is LlamaForCausalLM",
    ),
    "no family": ({"architectures": None}, FormatError, "architectures is None"),
    "size": ({"hidden_size": "big"}, UnsupportedError, "hidden_size is 'big'"),
    "negative": ({"num_hidden_layers": -1}, UnsupportedError, "num_hidden_layers is -1"),
    "layers": ({"num_hidden_layers": 10**9}, UnsupportedError, "expected 1 to 512"),
    "activation": ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act is 'gelu'"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "gptq"),
    "remote code": ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, UnsupportedError, r"x\.Y"),
    "yarn without its context": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        UnsupportedError,
        "rope_type 'yarn' lacks original_max",
    ),
    "llama3 without factors": ({"rope_scaling": {"rope_type": "llama3"}}, UnsupportedError, "lacks factor"),
    "llama3 upside down": ({"rope_scaling": LLAMA3_UPSIDE_DOWN}, UnsupportedError, "low_freq_factor 4.0 is not below"),
    "two ropes": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}},
        UnsupportedError,
        "rope_scaling .* and rope_parameters .* differ",
    ),
    "two families": ({"model_type": "mistral"}, FormatError, "architectures says LlamaForCausalLM .* is 'mistral'"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
    "heads": ({"num_key_value_heads": 3}, UnsupportedError, "not a multiple"),
    "odd head": ({"head_dim": 7}, UnsupportedError, "head_dim is 7"),
    "shape": ({"intermediate_size": 64}, FormatError, r"mlp\.down_proj\.weight: has shape \(32, 48\)"),
    "more layers": ({"num_hidden_layers": 3}, FormatError, r"model\.layers\.2\..*is missing"),
    "fewer layers": ({"num_hidden_layers": 1}, FormatError, "layers.1"),
    "vocabulary": ({"vocab_size": 310}, FormatError, r"embed_tokens\.weight: has shape"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_cannot_be_converted(what: str, tmp_path: Path) -> None:
    change, error, message = CONFIGS[what]
    folder = make_model(tmp_path / "model")
    write_json(folder / "config.json", {**CONFIG, **change})
    with pytest.raises(error, match=message):
        convert_base(folder, tmp_path / "base.gguf")
    assert list(tmp_path.iterdir()) == [folder]


STRANGE = [
    None,
    True,
    0,
    -1,
    1.5,
    2**40,
    10**400,
    1e300,
    "\ud800",
    "text",
    [],
    {},
    [1, 2],
    {"a": 1},
    {"rope_type": 7},
    float("nan"),
]
OTHER_KEYS = {"rope_scaling", "rope_parameters", "quantization_config", "auto_map", "partial_rotary_factor"}


def refused_or_whole(folder: Path, out: Path) -> str:
    """The message of a refusal, or "" for a file that was written and can be read."""
    try:
        convert_base(folder, out, quant="f32", force=True)
    except ConversionError as error:
        return error.message
    return "" if read_header(out).tensors else "no tensors"


@pytest.mark.parametrize("key", sorted({*CONFIG, *OTHER_KEYS}))
def test_no_value_in_a_configuration_is_a_crash(key: str, tmp_path: Path) -> None:
    """A strange value is refused by its folder's name, or changes nothing that matters."""
    folder = make_model(tmp_path / "model")
    for value in STRANGE:
        write_json(folder / "config.json", {**CONFIG, key: value})
        message = refused_or_whole(folder, tmp_path / "base.gguf")
        assert not message or str(folder) in message


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("tokenizer_config.json", key) for key in ("bos_token", "chat_template", "add_bos_token")),
        *(("tokenizer_config.json", key) for key in ("added_tokens_decoder", "additional_special_tokens")),
        *(("generation_config.json", key) for key in ("top_k", "temperature", "min_p")),
    ],
)
def test_no_value_in_another_file_is_a_crash(name: str, key: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    for value in STRANGE:
        write_json(folder / name, {key: value})
        message = refused_or_whole(folder, tmp_path / "base.gguf")
        assert not message or str(folder) in message


def test_a_broken_model_card_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: [apache\n  bad: : yes\n---\n")
    with pytest.raises(FormatError, match=r"README\.md"):
        convert_base(folder, tmp_path / "base.gguf")


@pytest.mark.parametrize("card", ["tags: [chat, 2024]", "tags: [[chat]]", r'model_name: "\ud800"', "license: 2"])
def test_values_of_a_model_card_that_no_file_can_hold(card: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "README.md").write_text("---\ntags: [chat, '2024']\n---\n")
    convert_base(folder, tmp_path / "base.gguf")
    (folder / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(FormatError, match=r"general\.\w+ is .* in its README\.md"):
        convert_base(folder, tmp_path / "base.gguf", force=True)


@pytest.mark.parametrize("repository", ["models--owner--tiny-chat", "models--tiny-chat"])
def test_a_snapshot_of_the_hub_has_its_repositorys_name(repository: str, tmp_path: Path) -> None:
    folder = tmp_path / repository / "snapshots" / ("0123456789abcdef" * 3)[:40]
    assert convert_base(make_model(folder), tmp_path / "base.gguf").name == "tiny-chat"
    other = tmp_path / "snapshots" / "0123456789abcdef"
    assert convert_base(make_model(other), tmp_path / "other.gguf").name != "tiny-chat"


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    write_json(folder / "config.json", {**CONFIG, "hidden_act": "gelu", "rope_scaling": {"type": "dynamic"}})
    with pytest.raises(UnsupportedError) as caught:
        convert_base(folder, tmp_path / "base.gguf")
    assert "hidden_act" in caught.value.message
    assert "'dynamic'" in caught.value.message


def replace_weights(folder: Path, **changes: np.ndarray[Any, Any] | None) -> None:
    arrays = {**weights(CONFIG), **{name.replace("__", "."): array for name, array in changes.items()}}
    kept = {name: array for name, array in arrays.items() if array is not None}
    (folder / "model.safetensors").write_bytes(safetensors_bytes(kept))


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    replace_weights(folder, model__mystery__weight=np.zeros(3, np.float32), lm_head__weight=None)
    with pytest.raises(FormatError) as caught:
        convert_base(folder, tmp_path / "base.gguf")
    assert "model.mystery.weight: no tensor of a llama model with this config.json" in caught.value.message
    assert "lm_head.weight: is missing" in caught.value.message


def test_biases_must_be_what_the_configuration_says(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    replace_weights(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(32, np.float32))
    with pytest.raises(FormatError, match=r"q_proj\.bias: no tensor of a llama model with this config\.json"):
        convert_base(folder, tmp_path / "base.gguf")
    write_json(folder / "config.json", {**CONFIG, "attention_bias": True})
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.k_proj\.bias: is missing"):
        convert_base(folder, tmp_path / "base.gguf")


def test_a_copy_of_tied_embeddings_is_left_out(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    write_json(folder / "config.json", {**CONFIG, "tie_word_embeddings": True})
    replace_weights(folder, lm_head__weight=weights(CONFIG)["model.embed_tokens.weight"])
    report = convert_base(folder, tmp_path / "base.gguf", quant="f32")
    assert "output.weight" not in read_header(tmp_path / "base.gguf").tensors
    assert report.notices == ()


@pytest.mark.parametrize("chunk", [1 << 20, 128])
def test_an_output_that_differs_from_tied_embeddings_is_kept(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.model.COMPARED_BYTES", chunk)
    folder, output = make_model(tmp_path / "model"), weights(CONFIG)["model.embed_tokens.weight"]
    write_json(folder / "config.json", {**CONFIG, "tie_word_embeddings": True})
    output[299, 31] += np.float32(1e-6)
    replace_weights(folder, lm_head__weight=output)
    report = convert_base(folder, tmp_path / "base.gguf", quant="f32")
    read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    np.testing.assert_array_equal(read["output.weight"], output)
    assert "the output's weights differ" in report.notices[0]


def test_an_output_without_its_embeddings_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    write_json(folder / "config.json", {**CONFIG, "tie_word_embeddings": True})
    replace_weights(folder, model__embed_tokens__weight=None)
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.weight: is missing"):
        convert_base(folder, tmp_path / "base.gguf")


@pytest.mark.parametrize(("value", "quant", "message"), [(np.nan, "f32", "NaN"), (1e6, "f16", "too large for F16")])
def test_values_that_are_not_finite_are_noticed(value: float, quant: str, message: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    bad = weights(CONFIG)["lm_head.weight"]
    bad[7, 7] = value
    replace_weights(folder, lm_head__weight=bad)
    if np.isnan(value):
        with pytest.raises(FormatError, match=r"output\.weight: holds values that are NaN"):
            convert_base(folder, tmp_path / "base.gguf", quant=quant, strict=True)
        assert list(tmp_path.iterdir()) == [folder]
    report = convert_base(folder, tmp_path / "base.gguf", quant=quant)
    assert len(report.notices) == 1
    assert report.notices[0].startswith("output.weight")
    assert message in report.notices[0]


def test_padding_of_the_vocabulary(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", vocab_size=320)
    convert_base(folder, tmp_path / "base.gguf")
    metadata = read_header(tmp_path / "base.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][-20:] == [f"[PAD{number}]" for number in range(300, 320)]
    assert metadata["tokenizer.ggml.token_type"][-20:] == [gguf.TokenType.UNUSED] * 20


def test_unknown_quantization(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="unknown quantization 'q9'") as caught:
        convert_base(make_model(tmp_path / "model"), tmp_path / "base.gguf", quant="q9")
    assert "q4_k_m" in caught.value.hint


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        convert_base(tmp_path / "none", tmp_path / "base.gguf")


def test_it_needs_neither_torch_nor_llama_cpp(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    code = (
        "import sys; from pathlib import Path; from converters.base import convert_base; "
        f"convert_base(Path({str(folder)!r}), Path({str(out)!r}), quant='q4_k_m'); "
        "print({'torch', 'transformers', 'llama_cpp', 'edgelora'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"
