"""Bases whose header would end the process are refused by name before llama.cpp sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from converters.base_file import read_base_header
from converters.options import QuantizeOptions
from converters.reader import read_header
from converters.requantize import requantize
from edgelora.engine.base_check import check_base
from edgelora.engine.engine import Engine
from edgelora.errors import ModelFileError, SettingsError

KINDS = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}


def copy(source: Path, path: Path, changes: dict[str, Any]) -> Path:
    """The base with other metadata; None leaves a key out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or changes.get(key, "") is None:
            continue
        item_kind = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, changes.get(key, field.contents()), field.types[0], sub_type=item_kind)
    for key in set(changes) - set(reader.fields):
        writer.add_key_value(key, changes[key], KINDS[type(changes[key])])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(base: Path) -> list[str]:
    found: list[str] = gguf.GGUFReader(base).fields["tokenizer.ggml.tokens"].contents()
    return found


FATAL: dict[str, tuple[dict[str, Any], str]] = {
    "a layer less": ({"llama.block_count": 3}, "llama.block_count is 3, and the file has the tensors of 4 layers"),
    "no context": ({"llama.context_length": 0}, "llama.context_length is 0"),
    "a context too long": ({"llama.context_length": 2**32 - 1}, "below 2**31"),
    "a negative epsilon": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon is -1.0"),
    "an epsilon that is no number": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
    "too many experts": ({"llama.expert_count": 10**6}, "llama.expert_count is 1000000, expected at most 1024"),
    "an unknown rope scaling": ({"llama.rope.scaling.type": "none such"}, "expected one of none, linear"),
    "another kind of vocabulary": ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges is missing"),
    "too few token types": ({"tokenizer.ggml.token_type": [1] * 10}, "token_type has 10 values for 4096 tokens"),
}


@pytest.mark.parametrize("case", FATAL)
def test_a_base_that_would_end_the_process_is_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    changes, message = FATAL[case]
    with pytest.raises(ModelFileError) as caught:
        Engine(copy(base, tmp_path / "broken.gguf", changes))
    assert message in caught.value.message


def test_tokens_that_are_twice_there_or_too_few(base: Path, tmp_path: Path) -> None:
    for changed, message in ((["same", "same", *tokens(base)[2:]], "1 tokens twice"), (tokens(base)[:9], "4096 rows")):
        with pytest.raises(ModelFileError, match=message):
            Engine(copy(base, tmp_path / "broken.gguf", {"tokenizer.ggml.tokens": changed}))


def test_twin_the_same_base_unbroken_loads(base: Path, tmp_path: Path) -> None:
    changes = {"llama.rope.scaling.type": "none", "general.name": "copied"}
    with Engine(copy(base, tmp_path / "whole.gguf", changes), threads=1) as engine:
        assert engine.base_name == "copied"
        assert engine.chat("hello", sampling={"max_tokens": 2}).completion_tokens > 0


def test_llama_cpp_itself_would_end_the_process(base: Path, tmp_path: Path) -> None:
    path = copy(base, tmp_path / "broken.gguf", {"llama.rope.scaling.type": "none such"})
    script = (
        "import sys; from llama_cpp import llama_cpp as c; c.llama_backend_init();"
        "c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params())"
    )
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # it would look for a debugger
    run = subprocess.run([sys.executable, "-c", script, path], capture_output=True, env=environment, check=False)
    assert run.returncode < 0


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "too many threads": ({"threads": 100000}, "threads is 100000, expected a whole number from 1 to 512"),
    "threads as text": ({"threads": "2"}, "threads is '2'"),
    "n_ctx as a fraction": ({"n_ctx": 10.5}, "n_ctx is 10.5"),
    "n_ctx as a truth": ({"n_ctx": True}, "n_ctx is True"),
    "n_ctx beyond counting": ({"n_ctx": 2**31}, "n_ctx is 2147483648"),
    "more context than memory": ({"n_ctx": 2**31 - 1}, "GiB of KV cache"),
    "adapters as text": ({"adapters": "support.gguf"}, "expected a mapping or a list"),
    "a template that is none": ({"chat_template": 7}, "chat_template is 7"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_out_of_range_are_refused(case: str, base: Path) -> None:
    options, message = BAD_SETTINGS[case]
    with pytest.raises(SettingsError) as caught:
        Engine(base, **options)
    assert message in caught.value.message


def test_requests_of_the_wrong_type_are_refused(engine: Engine, adapters: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="messages are None"):
        engine.chat(None)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"adapter is \['red'\]"):
        engine.chat("x", adapter=["red"])  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="sampling is 7"):
        engine.chat("x", sampling=7)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="scale is nan"):
        engine.load_adapter("again", adapters["red"], float("nan"))
    with pytest.raises(SettingsError, match="name is None"):
        engine.load_adapter(None, adapters["red"])  # type: ignore[arg-type]
    assert engine.chat("x", adapter="red", sampling={"max_tokens": 1}).adapter == "red"


def test_all_parts_of_a_split_base_are_looked_at(base: Path, tmp_path: Path) -> None:
    """A layer that lies in another part counts; a part alone is not judged by its layers."""
    whole = copy(base, tmp_path / "whole.gguf", {"llama.block_count": 3})
    files = requantize(
        whole, tmp_path / "split.gguf", QuantizeOptions("f32", allow_requantize=True, split_max_tensors=9)
    )
    good = requantize(base, tmp_path / "good.gguf", QuantizeOptions("f32", allow_requantize=True, split_max_tensors=9))
    check_base(read_base_header(good.files[1]))
    check_base(read_header(good.files[0]))
    check_base(read_header(files.files[0]))
    with pytest.raises(ModelFileError, match="block_count is 3, and the file has the tensors of 4 layers"):
        check_base(read_base_header(files.files[1]))
