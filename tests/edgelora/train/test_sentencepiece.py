"""A base with a bare tokenizer.model is trained on the ids that it is served with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from converters.base import convert_base
from converters.reader import read_header
from edgelora import Engine
from edgelora.contract import Contract
from edgelora.conversion import ConvertOptions, convert
from edgelora.errors import ModelFileError
from edgelora.train import Recipe, train
from edgelora.train.base import find_base
from tests.conftest import SHARED

from .conftest import chat, write_rows

STORIES = SHARED / "models" / "stories-260k"
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/models/stories-260k"),
    # PEFT 0.21 asks transformers 5.23 for it by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
WORDS = ("Once", " upon", " a", "time", " ", "  ", "\n", "Lily", "aaaa", "é", "你", "🙂", "\u2581")


def test_ids_are_those_of_serving(tmp_path: Path) -> None:
    dice = random.Random(0)
    texts = ["".join(dice.choices(WORDS, k=dice.randrange(1, 30))) for _ in range(400)]
    convert_base(STORIES, tmp_path / "base.gguf", quant="f32")
    with Engine(tmp_path / "base.gguf", n_ctx=64, threads=1, chat_template="plain") as engine:
        served = [engine.count_tokens(text) for text in texts]
    tokenizer = find_base(str(STORIES)).load_tokenizer()
    ids = [tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"] for text in texts]
    carried = Tokenizer.from_str(str(read_header(tmp_path / "base.gguf").metadata["tokenizer.huggingface.json"]))
    assert ids == [carried.encode(f"<s>{text}", add_special_tokens=False).ids for text in texts]
    assert [len(row) for row in ids] == served
    names = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token
    assert names == ("<s>", "</s>", "<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert [tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"] for text in texts] != ids


@pytest.mark.parametrize("template", ["chatml", "llama2", "plain"])
def test_from_training_to_an_answer(template: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat(f"Lily has {n} cats?", "Yes.")} for n in range(4)])
    recipe = Recipe(rank=4, max_steps=2, batch_size=2, gradient_accumulation=1, chat_template=template)
    train(rows, str(STORIES), tmp_path / "peft", recipe)
    convert_base(STORIES, tmp_path / "base.gguf", quant="f32")
    convert(tmp_path / "peft", tmp_path / "adapter.gguf", ConvertOptions(base=tmp_path / "base.gguf"))
    with Engine(tmp_path / "base.gguf", {"it": tmp_path / "adapter.gguf"}, n_ctx=256, threads=1) as engine:
        completion = engine.chat("Lily has 2 cats?", adapter="it", sampling={"max_tokens": 4})
    assert completion.adapter == "it"

    contract = Contract.load(tmp_path / "peft")
    assert contract is not None
    other = contract.with_changes(golden_tokens=(*contract.golden_tokens[:-1], 3))
    other.save(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "other.gguf", ConvertOptions(base=tmp_path / "base.gguf"))
    with pytest.raises(ModelFileError, match="test conversation"):
        Engine(tmp_path / "base.gguf", {"it": tmp_path / "other.gguf"}, n_ctx=256, threads=1)
