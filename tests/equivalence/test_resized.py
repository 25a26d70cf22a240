"""Adapters with tokens of their own: merged, the base has their rows and their tokenizer; as adapters refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from converters import resized
from converters.adapter import convert_adapter
from converters.base import convert_base
from converters.errors import BaseMismatchError, ConversionError, UnsupportedAdapterError
from converters.fingerprint import fingerprint
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from converters.reader import read_header
from tests.converters.folders import write_json
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.effects import Floats, logits_of
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import nudged

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

EXACT = 1e-3  # of a logit; measured 1e-5, Gemma's GELU apart
OURS = ["<|tool|>", "<|call|>"]
IDS = [5, -1, 17, 40, -2, 99, 250]  # from the end: the new ones
LORA: Mapping[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}


@dataclass(frozen=True)
class Case:
    """An adapter on a model with another vocabulary.

    Attributes:
        size: rows that the embeddings are resized to; the tokenizer has 322 tokens.
        settings: of the adapter, beside `LORA`.
        base: settings of the model.
    """

    model: str = "llama"
    size: int = 322
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "both saved": Case(settings=BOTH),
    "saved by PEFT itself": Case(),
    "one saved": Case(settings={"modules_to_save": ["embed_tokens"]}),
    "tied, one saved": Case("qwen2-tied", settings={"modules_to_save": ["embed_tokens"]}),
    "lora on them": Case(settings={"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "some tokens": Case(settings={"trainable_token_indices": [320, 321, 7]}),
    "padded to a multiple of 64": Case(size=384, settings=BOTH),
    "of a padded base": Case(base={"vocab_size": 384}),
    "tied": Case("qwen2-tied"),
    "tied, and saved": Case("qwen2-tied", settings={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, lora on them": Case("qwen2-tied", settings={"target_modules": ["embed_tokens", "q_proj"]}),
    "qwen3": Case("qwen3", settings={"use_dora": True}),
    "with a bias of the output": Case("phi-2"),
    "gpt2": Case("gpt2", settings={"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "gpt-neox": Case("gpt-neox", settings={"target_modules": ["query_key_value"]}),
    "never untied": Case("command-r"),
    "never untied, with norms of one more": Case("gemma-2", size=402),
}


@dataclass(frozen=True)
class Resized:
    base: Path
    folder: Path
    logits: Floats


def tokenizer_of(model: str, folder: Path) -> None:
    """That of the bases, with two tokens more; as `tokenizer.save_pretrained` leaves it beside an adapter."""
    kind = tiny_models.TINY[model].tokenizer
    tiny_models.TOKENIZERS[kind](folder)
    if kind == "sentencepiece":
        path = folder / "tokenizer_config.json"
        added = {str(400 + number): {"content": token, "special": True} for number, token in enumerate(OURS)}
        write_json(path, {**json.loads(path.read_text()), "added_tokens_decoder": added})
        return
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    known = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|fill{number}|>" for number in range(known, 320)] + OURS)
    tokenizer.save(str(path))


def resize(case: Case, tmp_path: Path, *, tokenizer: bool = True) -> Resized:
    """Resize a model's vocabulary, and train an adapter on it: random weights, saved by PEFT."""
    import peft

    base, folder = tiny_models.build(case.model, tmp_path / "base", **case.base), tmp_path / "adapter"
    torch.manual_seed(1)
    model = load_model(base)
    model.resize_token_embeddings(case.size, mean_resizing=False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **case.settings})
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nudged(0.2)(name, parameter)
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer_of(case.model, folder)
    return Resized(base, folder, logits_of(model, ids(case)))


def ids(case: Case) -> list[int]:
    return [number % case.size for number in IDS]


@pytest.mark.parametrize("name", CASES)
def test_the_merged_base_has_the_tokens(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trained = resize(case, tmp_path)
    merged = merge(trained.base, [Merged(trained.folder)], tmp_path / "m.gguf", QuantizeOptions("f32"))
    tokens = read_header(merged.path).metadata["tokenizer.ggml.tokens"]
    own = tokens.index(OURS[0])
    assert (len(tokens), tokens[own : own + 2]) == (case.size, OURS)
    assert merged.fingerprint == fingerprint(merged.path) != fingerprint(trained.base)
    found = llamacpp.logits(merged.path, ids(case))
    assert found.shape == trained.logits.shape
    assert np.abs(found - trained.logits).max() < EXACT * (10 if case.model in ("gemma-2", "phi-2", "gpt2") else 1)
    assert llamacpp.tokenize(merged.path, ["<|call|> and <|tool|>"], special=True)[0].count(own + 1) == 1


def test_a_tenth_less_of_it_is_seen(tmp_path: Path) -> None:
    trained = resize(CASES["both saved"], tmp_path)
    merged = merge(trained.base, [Merged(trained.folder, scale=0.9)], tmp_path / "m.gguf", QuantizeOptions("f32"))
    assert np.abs(llamacpp.logits(merged.path, ids(Case())) - trained.logits).max() > 100 * EXACT


def test_fewer_tokens(tmp_path: Path) -> None:
    """A padded vocabulary cut to what the tokenizer has."""
    trained = resize(Case(size=322, base={"vocab_size": 384}), tmp_path)
    merged = merge(trained.base, [Merged(trained.folder)], tmp_path / "m.gguf", QuantizeOptions("q8_0")).path
    assert read_header(merged).tensors["output.weight"].shape == (322, 64)


def test_what_the_base_says_of_ends_stays(tmp_path: Path) -> None:
    trained = resize(CASES["saved by PEFT itself"], tmp_path)
    write_json(trained.base / "generation_config.json", {"eos_token_id": [1, 7]})
    merged = merge(trained.base, [Merged(trained.folder)], tmp_path / "m.gguf", QuantizeOptions("f32")).path
    assert read_header(merged).metadata["edgelora.end_token_ids"] == [7]


def refused(trained: Resized, tmp_path: Path, base: Path | None = None) -> str:
    with pytest.raises(ConversionError) as caught:
        merge(base or trained.base, [Merged(trained.folder)], tmp_path / "m.gguf", QuantizeOptions("f32"))
    assert not (tmp_path / "m.gguf").exists()
    return caught.value.message


def test_without_a_tokenizer_it_is_refused(tmp_path: Path) -> None:
    trained = resize(CASES["both saved"], tmp_path, tokenizer=False)
    message = refused(trained, tmp_path)
    assert "has no tokenizer for its 322 tokens (the base has 320)" in message
    assert f"tokenizer.save_pretrained({trained.folder})" in message


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path: Path) -> None:
    trained = resize(Case(size=321, settings=BOTH, base={"vocab_size": 384}), tmp_path)
    assert "321" in refused(trained, tmp_path)


def test_a_gguf_base_is_refused(tmp_path: Path) -> None:
    trained = resize(CASES["both saved"], tmp_path)
    plain = convert_base(trained.base, tmp_path / "plain.gguf", quant="f32").path
    message = refused(trained, tmp_path, plain)
    assert "it has 322 tokens and the base 320, and only a Hugging Face folder" in message


def test_an_output_whose_rows_are_lost_is_refused(tmp_path: Path) -> None:
    """PEFT saves the weight below a LoRA on the embeddings, and not the output's."""
    trained = resize(Case(settings={"target_modules": ["embed_tokens", "q_proj"]}), tmp_path)
    assert "lm_head.weight: was not saved with its 322 rows" in refused(trained, tmp_path)


def test_two_vocabularies_are_refused(tmp_path: Path) -> None:
    one, other = (resize(Case(size=size), tmp_path / str(size)) for size in (322, 384))
    with pytest.raises(UnsupportedAdapterError, match=r"do not go together:\n.*322 tokens\n.*384 tokens"):
        merge(one.base, [Merged(one.folder), Merged(other.folder)], tmp_path / "m.gguf")


def test_two_adapters_of_one_vocabulary(tmp_path: Path) -> None:
    """The second, of linear layers alone, comes upon the tokens of the first."""
    one = resize(CASES["both saved"], tmp_path)
    merged = merge(one.base, [Merged(one.folder), Merged(one.folder)], tmp_path / "m.gguf", QuantizeOptions("f32"))
    assert len(read_header(merged.path).metadata["tokenizer.ggml.tokens"]) == 322


@pytest.mark.parametrize("name", ["both saved", "saved by PEFT itself", "tied"])
def test_as_an_adapter_it_is_refused_with_both_sizes(name: str, tmp_path: Path) -> None:
    trained = resize(CASES[name], tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=r"embed_tokens\.weight: it has 322 rows and the base 320"):
        convert_adapter(trained.folder, trained.base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_base_that_was_resized_already_takes_the_adapter(tmp_path: Path) -> None:
    trained = resize(CASES["saved by PEFT itself"], tmp_path)
    model = load_model(trained.base)
    model.resize_token_embeddings(330, mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    tokenizer_of("llama", tmp_path / "other")
    with pytest.raises((UnsupportedAdapterError, BaseMismatchError), match="322 rows and the base 330"):
        convert_adapter(trained.folder, tmp_path / "other", tmp_path / "a.gguf")


def test_zeros_stand_for_rows_that_the_base_has_not(tmp_path: Path) -> None:
    base = tiny_models.build("llama", tmp_path / "base")
    tokenizer_of("llama", base)
    with resized.open_resized(base, resized.Resize(330, base)) as known:
        assert known.shapes["output.weight"] == (330, 64)
        rows = known.rows("token_embd.weight", 310, 330)
        assert rows[:10].any(axis=1).all()
        assert not rows[10:].any()
    assert json.loads((base / "config.json").read_text())["vocab_size"] == 320
