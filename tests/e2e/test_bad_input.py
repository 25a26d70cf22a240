"""Bad input on the real command line: what is wrong and what to do is said, and the exit code tells the kind."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY_BASE
from tests.peft_folders import linear_shapes

EDGELORA = str(Path(sys.executable).with_name("edgelora"))


def run(*arguments: object, stdin: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = [EDGELORA, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=180, **options)  # type: ignore[call-overload, no-any-return]


def refused(result: subprocess.CompletedProcess[str], code: int, *told: str) -> None:
    """The command ended with `code`, said all of `told` on stderr, wrote nothing to stdout, and showed no traceback."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for text in told:
        assert text in result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled base that a test may damage."""
    return Path(shutil.copytree(TINY_BASE, tmp_path / "model"))


def test_missing_source() -> None:
    refused(run("convert", "nowhere"), 3, "nowhere")
    refused(run("chat", "--adapter", "nowhere.gguf", "hi"), 3, "nowhere.gguf")
    refused(run("chat", "--base", "nowhere.gguf", "hi"), 3, "nowhere.gguf")
    refused(run("train", "nowhere.jsonl", "--base", TINY_BASE, "-o", "x"), 4, "nowhere.jsonl")
    refused(run("batch", "nowhere.jsonl", "-o", "x.jsonl", "--base", "b.gguf"), 3, "b.gguf")


def test_not_a_model(tmp_path: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("these are not the weights you are looking for")
    refused(run("convert", text), 3, "notes.gguf")
    refused(run("chat", "--base", text, "hi"), 3, "notes.gguf")
    (tmp_path / "empty").mkdir()
    refused(run("convert", tmp_path / "empty"), 3, "empty", "config.json")


def test_truncated_safetensors(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    refused(run("convert", folder, "-o", tmp_path / "x.gguf"), 3, "model.safetensors")
    assert not list(tmp_path.glob("x.gguf*"))


def test_truncated_gguf(tiny_q8: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    data = tiny_q8.read_bytes()
    for size in (10, 2000, len(data) - 100):
        cut.write_bytes(data[:size])
        refused(run("chat", "--base", cut, "hi"), 3, "cut.gguf")


def test_pickle(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(run("convert", folder, "-o", tmp_path / "x.gguf"), 3, "pytorch_model.bin", "safetensors")
    pickle = tmp_path / "adapter.bin"
    pickle.write_bytes(b"\x80\x04.")
    refused(run("convert", pickle), 3, "adapter.bin")


def test_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["LlamoForCausalLM"], model_type="llamo")
    (folder / "config.json").write_text(json.dumps(config))
    refused(run("convert", folder), 3, "LlamoForCausalLM", "the nearest known one is LlamaForCausalLM")


def test_unknown_quantization_template_and_option(tiny_q8: Path) -> None:
    refused(run("convert", TINY_BASE, "--quant", "q9"), 2, "q9", "q8_0")
    refused(run("chat", "--base", tiny_q8, "--chat-template", "chatlm", "hi"), 2, "chatlm", "chatml")
    refused(run("chat", "--base", tiny_q8, "--temperature", "-1", "hi"), 2, "temperature")
    refused(run("chat", "--base", tiny_q8, ""), 2, "nothing was asked")
    refused(run("chat", "hi"), 2, "--base")


def test_adapter_as_base_and_base_as_adapter(tiny_q8: Path, adapter: Path) -> None:
    refused(run("chat", "--base", adapter, "hi"), 3, "is an adapter", "--adapter")
    refused(run("chat", "--adapter", tiny_q8, "hi"), 3, "is a base", "--base")
    refused(run("chat", "--base", TINY_BASE, "hi"), 3, "Hugging Face folder", "edgelora convert")


def test_adapter_for_another_base(other_base: Path, adapter: Path) -> None:
    refused(run("chat", "--base", other_base, "--adapter", adapter, "hi"), 3, "fingerprint")


def test_no_base_to_be_found(adapter: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(adapter, tmp_path / "alone.gguf"))
    refused(run("chat", "--adapter", alone, "hi"), 3, "alone.gguf", "--base", "looked at")


def test_output_exists(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    refused(run("convert", TINY_BASE, "-o", out), 3, "x.gguf", "--force")
    assert out.read_text() == "precious"


@pytest.mark.parametrize("text", ["", "not json\n", '{"title": "x"}\n'])
def test_bad_training_data(tmp_path: Path, text: str) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(text)
    refused(run("train", data, "--base", TINY_BASE, "-o", tmp_path / "out"), 4, "d.jsonl", "messages")
    assert not (tmp_path / "out").exists()


def test_context_overflow(tiny_q8: Path) -> None:
    refused(run("chat", "--base", tiny_q8, "--ctx-size", "64", "word " * 500), 4, "64")


def test_disk_full(tmp_path: Path) -> None:
    """A real ENOSPC: a file-size limit on the process, which the kernel enforces as a failed write."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    refused(run("convert", TINY_BASE, "--quant", "f32", "-o", tmp_path / "x.gguf", preexec_fn=limit), 3, "x.gguf")
    assert not list(tmp_path.iterdir())


def test_config_file(tmp_path: Path, tiny_q8: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("temprature = 1\n")
    refused(run("chat", "--config", config, "--base", tiny_q8, "hi"), 2, "temprature", "temperature")
    config.write_text("temperature = ")
    refused(run("chat", "--config", config, "--base", tiny_q8, "hi"), 2, "not TOML")
    for text, told in (
        ("temperature = -3", "temperature"),
        ("[temperature]", "temperature is {}, expected one value"),
        ("base = true", "base is True"),
        ("stats = 1", "stats is 1, expected true or false"),
        ("stop = [[1]]", "expected a list of values"),
        ("b = 1", "unknown settings: b"),
    ):
        config.write_text(text)
        refused(run("chat", "--config", config, "--base", tiny_q8, "hi"), 2, told)
    config.write_text(f'base = "{tiny_q8}"\nstop = "e"\ntemperature = 0\nstats = true\n')
    result = run("chat", "--config", config, "Hello!")
    assert result.returncode == 0
    assert "e" not in result.stdout
    assert "tokens/s" in result.stderr


def shell(command: str, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGELORA": EDGELORA, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, env=environment)


def test_streams_that_are_closed_or_full(tiny_q8: Path) -> None:
    full = shell('"$EDGELORA" chat --base "$BASE" Hello! > /dev/full', BASE=tiny_q8)
    refused(full, 1, "standard output cannot be written: No space left")
    refused(shell('"$EDGELORA" chat --base "$BASE" <&-', BASE=tiny_q8), 2, "stdin is closed")
    closed = shell('"$EDGELORA" chat --base "$BASE" Hello! >&-', BASE=tiny_q8)
    assert (closed.returncode, "Traceback" in closed.stderr) == (0, False)
    broken = shell('"$EDGELORA" chat --base "$BASE" Hello! | true', BASE=tiny_q8)
    assert "Traceback" not in broken.stderr


def test_input_that_is_no_text_is_read_as_far_as_it_goes(tiny_q8: Path) -> None:
    result = shell(
        'printf \'Hello\\377!\' | PYTHONIOENCODING=utf-8:strict "$EDGELORA" chat --base "$BASE"', BASE=tiny_q8
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)


def test_sigterm_ends_as_an_exception_does(tiny_q8: Path, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"id": n, "prompt": "Hello!"}) + "\n" for n in range(20_000)))
    process = subprocess.Popen(
        [EDGELORA, "batch", str(rows), "-o", str(out), "--base", str(tiny_q8)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not out.exists() or not out.stat().st_size:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
    assert out.read_bytes().endswith(b"\n")


def test_ctrl_c_in_convert_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of writing: a model of 300 MB of zeros, so that there is a middle."""
    make_large(folder)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [EDGELORA, "convert", str(folder), "-o", str(out / "x.gguf")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.iterdir()):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Interrupted" in stderr
    assert "Traceback" not in stderr
    assert not list(out.iterdir())


def make_large(folder: Path, *, hidden: int = 1024, wide: int = 4096, layers: int = 12) -> None:
    """Turn a model folder into one of these sizes whose weights are a hole in the disk: all zero."""
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, tie_word_embeddings=True)
    config.update(head_dim=64, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        for module, shape in linear_shapes(config).items():
            shapes[f"model.layers.{layer}.{module}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
