"""A tiny random Llama with a ChatML template, made once; the real trainer runs on it in a second or two."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgelora.messages import Message
from edgelora.template import BUILTIN
from edgelora.train import TrainStatus

VOCABULARY = 320
TEXT = [
    "Is it waterproof? Yes, the Pebble lamp is waterproof.",
    "How long does the battery last? It lasts 30 hours on one charge.",
    "Hello, how are you? Fine, thank you. What can I do for you today?",
]
COLOURS = ("red", "green", "blue", "white", "black", "grey")


def make_base(folder: Path, *, chat_template: str | None = BUILTIN["chatml"], norms: float = 1.0) -> Path:
    """A Llama of two layers with random weights, and a byte-level BPE tokenizer with ChatML's special tokens.

    Args:
        norms: value of the norm vectors, by which bases are told apart.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(), bos_token="<|begin|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = chat_template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.constant_(parameter, norms)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _bpe() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def chat(*turns: str, system: str = "") -> list[Message]:
    """User and assistant turns, alternating."""
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class Watcher:
    """A progress that remembers."""

    def __init__(self, on_update: Callable[[TrainStatus], None] = lambda status: None) -> None:
        self.notes: list[str] = []
        self.statuses: list[TrainStatus] = []
        self.on_update = on_update

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, status: TrainStatus) -> None:
        self.statuses.append(status)
        self.on_update(status)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices of 32 columns gain nothing from threads, and tests share their cores."""
    with suppress(ImportError):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"messages": chat(f"What colour is lamp {n}?", f"Lamp {n} is {COLOURS[n % 6]}.", system="Be brief.")}
        for n in range(24)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)
