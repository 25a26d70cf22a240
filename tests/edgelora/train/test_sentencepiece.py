"""A base with a bare tokenizer.model is trained on the ids that it is served with."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from converters.base import convert_base
from edgelora import Engine
from edgelora.contract import Contract
from edgelora.conversion import ConvertOptions, convert
from edgelora.errors import ModelFileError
from edgelora.train import Recipe, train
from edgelora.train.base import find_base, load_tokenizer
from tests.conftest import SHARED
from tests.equivalence import llamacpp

from .conftest import chat, write_rows

STORIES = SHARED / "models" / "stories-260k"
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/models/stories-260k"),
    # PEFT 0.21 asks transformers 5.23 for it by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
WORDS = (
    "Once",
    " upon",
    " a",
    "time",
    "<s>",
    "</s>",
    "<unk>",
    " ",
    "  ",
    "\n",
    "Lily",
    "aaaa",
    "é",
    "你",
    "🙂",
    "\u2581",
    "<s",
)


def with_added_tokens(folder: Path) -> Path:
    """The model with a control token and a user-defined one in place of its last two pieces."""
    shutil.copytree(STORIES, folder)
    folder.chmod(0o755)
    path = folder / "tokenizer_config.json"
    path.chmod(0o644)
    added = {"510": {"content": "<|im_end|>", "special": True}, "511": {"content": "[tool]", "special": False}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))
    return folder


@pytest.mark.parametrize("added", [False, True])
def test_ids_are_those_of_llama_cpp(added: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = with_added_tokens(tmp_path / "model") if added else STORIES
    words = [*WORDS, "<|im_end|>", "[tool]"] if added else WORDS
    dice = random.Random(0)
    texts = ["".join(dice.choices(words, k=dice.randrange(1, 30))) for _ in range(400)]
    convert_base(folder, tmp_path / "base.gguf", quant="f32")
    expected = llamacpp.tokenize(tmp_path / "base.gguf", texts, special=False)

    def ids(tokenizer: Any) -> list[list[int]]:
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    assert ids(load_tokenizer(find_base(str(folder)))) == expected
    assert ids(AutoTokenizer.from_pretrained(folder)) != expected


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
