"""Every adapter that does not fit is refused by name before llama.cpp sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.reader import read_header
from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from edgelora.engine.preflight import base_fingerprint, check_adapter, content_hash, read_checked
from edgelora.errors import BaseMismatchError, ModelFileError
from tests.conftest import TINY_BASE
from tests.edgelora.conftest import MakeAdapter

Q = "blk.0.attn_q.weight"


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


BROKEN: dict[str, tuple[dict[str, Any], type[ModelFileError], str]] = {
    "another architecture": (
        {"metadata": {"general.architecture": "qwen2"}},
        BaseMismatchError,
        "adapter qwen2, base llama",
    ),
    "not a LoRA": ({"metadata": {"adapter.type": "cvec"}}, ModelFileError, "'cvec', expected 'lora'"),
    "no kind of adapter": ({"metadata": {"adapter.type": None}}, ModelFileError, "adapter.type is missing"),
    "alpha is an integer": (
        {"metadata": {"adapter.lora.alpha": 16}},
        ModelFileError,
        "adapter.lora.alpha has GGUF type 4",
    ),
    "an invocation without tokens": (
        {"metadata": {"adapter.alora.invocation_tokens": ["a", "b"]}},
        ModelFileError,
        "expected the numbers of tokens",
    ),
    "half a pair": ({"tensors": {f"{Q}.lora_b": None}}, ModelFileError, f"{Q}: lora_b is missing"),
    "two ranks": ({"tensors": {f"{Q}.lora_a": zeros(8, 256)}}, ModelFileError, "do not share a rank"),
    "too narrow": (
        {"tensors": {f"{Q}.lora_a": zeros(4, 128)}},
        BaseMismatchError,
        f"{Q}: adapter 256x128, base 256x256",
    ),
    "too tall": ({"tensors": {f"{Q}.lora_b": zeros(512, 4)}}, BaseMismatchError, f"{Q}: adapter 512x256, base 256x256"),
    "a layer too many": (
        {"tensors": {"blk.99.attn_q.weight.lora_a": zeros(4, 256), "blk.99.attn_q.weight.lora_b": zeros(256, 4)}},
        BaseMismatchError,
        "blk.99.attn_q.weight: the base has no such tensor",
    ),
    "a head on a tied base": (
        {"tensors": {"output.weight.lora_a": zeros(4, 256), "output.weight.lora_b": zeros(4096, 4)}},
        BaseMismatchError,
        "output.weight: the base has no such tensor (its output is tied)",
    ),
    "an embedding on a tied base": (
        {"tensors": {"token_embd.weight.lora_a": zeros(4096, 4), "token_embd.weight.lora_b": zeros(256, 4)}},
        BaseMismatchError,
        "embedding is tied",
    ),
    "a trained norm": ({"tensors": {"blk.0.attn_norm.weight": zeros(256)}}, ModelFileError, "a trained norm"),
    "a stray tensor": (
        {"tensors": {"blk.0.attn_q.bias": zeros(256)}},
        ModelFileError,
        "blk.0.attn_q.bias: not a LoRA tensor",
    ),
    "experts on a dense base": (
        {"tensors": {f"{Q}.lora_a": zeros(2, 4, 256), f"{Q}.lora_b": zeros(2, 256, 4)}},
        BaseMismatchError,
        f"{Q}: adapter 2x256x256, base 256x256",
    ),
    "alpha is infinite": (
        {"metadata": {"adapter.lora.alpha": float("inf")}},
        ModelFileError,
        "adapter.lora.alpha is inf, expected a finite number",
    ),
    "integers": ({"tensors": {f"{Q}.lora_a": np.zeros((4, 256), np.int32)}}, ModelFileError, "has type I32"),
    "doubles": ({"tensors": {f"{Q}.lora_b": np.zeros((256, 4), np.float64)}}, ModelFileError, "has type F64"),
    "no numbers": (
        {"tensors": {f"{Q}.lora_a": zeros(4, 256) + np.nan}},
        ModelFileError,
        f"not finite numbers (1 problem): {Q}",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_by_name(case: str, engine: Engine, make_adapter: MakeAdapter) -> None:
    options, kind, message = BROKEN[case]
    with pytest.raises(kind) as caught:
        engine.load_adapter("broken", make_adapter(**options))
    assert type(caught.value) is kind
    assert message in caught.value.message
    assert "broken" not in engine.adapters


def test_twin_the_same_adapter_unbroken_loads(engine: Engine, make_adapter: MakeAdapter) -> None:
    assert engine.load_adapter("whole", make_adapter()).content_hash
    assert engine.chat("hello", adapter="whole", sampling={"max_tokens": 2}).adapter == "whole"
    engine.unload_adapter("whole")


def test_all_problems_are_in_one_message(base: Path, make_adapter: MakeAdapter) -> None:
    tensors = {f"blk.{i}.attn_q.weight.lora_b": zeros(512, 4) for i in range(3)}
    with pytest.raises(BaseMismatchError) as caught:
        check_adapter(read_header(make_adapter(tensors=tensors)), read_header(base))
    assert all(f"blk.{i}.attn_q.weight" in caught.value.message for i in range(3))
    assert "3 problems" in caught.value.message


def test_llama_cpp_itself_would_end_the_process(base: Path, make_adapter: MakeAdapter) -> None:
    """The reason for all of this: an alpha of another type is an assertion in llama.cpp."""
    path = make_adapter(metadata={"adapter.lora.alpha": 16})
    script = (
        "import sys; from llama_cpp import llama_cpp as c; c.llama_backend_init();"
        "model = c.llama_model_load_from_file(sys.argv[1].encode(), c.llama_model_default_params());"
        "c.llama_adapter_lora_init(model, sys.argv[2].encode())"
    )
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # it would look for a debugger
    run = subprocess.run([sys.executable, "-c", script, base, path], capture_output=True, env=environment, check=False)
    assert run.returncode < 0


def test_an_adapter_for_another_base_is_refused_unless_forced(base: Path, make_adapter: MakeAdapter) -> None:
    path = make_adapter(contract=Contract(base_name="mistral-7b", base_fingerprint="f" * 64))
    with pytest.raises(BaseMismatchError) as caught:
        Engine(base, {"other": path})
    assert "mistral-7b (fingerprint ffffffffffff)" in caught.value.message
    assert base_fingerprint(base)[:12] in caught.value.message
    with Engine(base, {"other": path}, force=True) as engine:
        assert "mistral-7b" in engine.notices[0]
        assert "force" in engine.notices[0]


def test_an_adapter_for_this_base_gives_no_notice(bases: dict[str, Path], make_adapter: MakeAdapter) -> None:
    path = make_adapter(contract=Contract(base_fingerprint=base_fingerprint(bases["f32"])))
    for base in bases.values():
        with Engine(base, {"mine": path}) as engine:
            assert engine.notices == []


def test_an_adapter_without_a_contract_works_and_says_what_was_not_checked(engine: Engine) -> None:
    assert any("red" in notice and "no contract" in notice for notice in engine.notices)


def test_golden_tokens_must_come_out_as_in_training(base: Path, make_adapter: MakeAdapter) -> None:
    from tokenizers import Tokenizer

    template = (TINY_BASE / "chat_template.jinja").read_text()
    text = "<|im_start|>user\nWho keeps the inn?<|im_end|>\n<|im_start|>assistant\n"
    golden = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    contract = Contract(
        base_fingerprint=base_fingerprint(base),
        chat_template=template,
        golden_messages=({"role": "user", "content": "Who keeps the inn?"},),
        golden_tokens=tuple(golden),
    )
    with Engine(base, {"good": make_adapter("good", contract=contract)}) as engine:
        assert engine.notices == []
    wrong = contract.with_changes(golden_tokens=(*golden[:3], 99, *golden[4:]))
    with pytest.raises(ModelFileError, match="they part at token 3"):
        Engine(base, {"bad": make_adapter("bad", contract=wrong)})
    with Engine(base, {"bad": make_adapter("bad", contract=wrong)}, force=True) as engine:
        assert "they part at token 3" in engine.notices[0]


def test_sampling_defaults_that_are_none_are_refused(base: Path, make_adapter: MakeAdapter) -> None:
    with pytest.raises(ModelFileError, match=r"contract is damaged.*temperature"):
        Engine(base, {"x": make_adapter(contract=Contract(sampling={"temperature": -1}))})


def test_each_kind_in_the_place_of_the_other(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="expected a GGUF base, this is a GGUF adapter"):
        Engine(adapters["red"])
    with pytest.raises(ModelFileError, match="expected a GGUF adapter, this is a GGUF base"):
        Engine(base, {"x": base})
    with pytest.raises(ModelFileError, match="a folder"):
        Engine(tmp_path)
    with pytest.raises(ModelFileError, match="No such file"):
        Engine(tmp_path / "missing.gguf")


@pytest.mark.parametrize("kept", [0, 3, 30, 1000, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept: float, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for path, kind in ((base, "base"), (adapters["red"], "adapter")):
        data = path.read_bytes()
        short = tmp_path / f"{kind}.gguf"
        short.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
        with pytest.raises(ModelFileError):
            read_checked(short, kind)
        assert read_checked(path, kind).kind == kind


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    one = content_hash(path)
    path.write_bytes(b"four")
    assert content_hash(path) != one
    path.write_bytes(b"one")
    assert content_hash(path) == one
