"""llama.cpp cuts text into the ids that the model was trained with, or the file says that it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from converters.base import convert_base
from converters.pretokenizers import GPT2, LLAMA3, NAMES, QWEN2
from converters.reader import read_header
from tests.converters.folders import SPECIAL, byte_level_tokenizer, make_model, split
from tests.equivalence import llamacpp

NASTY = [
    "",
    " ",
    "Hello world",
    " leading and trailing  ",
    "a  b   c    d     e" + " " * 40 + "f",
    "line\nline\n\n\nline\r\n\ttab\t\ttab \n \n  x",
    "It's she'll we'd I'M YOU'RE they've 'tis o'clock 'S 'LL",
    "1 12 123 1234 12345 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥",
    "def f(x):\n    return x**2 + {'a': [1, 2]}  # comment != ok\n",
    '<div class="a">&nbsp;</div> https://example.org/?q=a%20b&c=d#e',
    "日本語のテキスト 中文字符,标点。한국어 텍스트",
    "Привет мир, Ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "e\u0301 o\u0308 \u00e9 \u00f6 n\u0303 a\u0323\u0302",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ✊🏽 🌫️ ☃",
    "\u00a0non\u00a0breaking\u2003em\u200bzero\u2028line\u3000ideographic",
    "!!!???...---___***///\\\\\\ ~`@#$%^&*()[]{}<>|;:'\"",
    "ǅ ŉ ß İ ı ſ Å",
    "\x00\x01\x1f\x7f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎 \U0001f9d1\u200d\U0001f4bb",
    "naïve café résumé Zürich Ångström",
]


@pytest.mark.parametrize("special", [True, False])
def test_bundled_base(special: bool, real_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder, out = real_model("tiny-base"), tmp_path / "base.gguf"
    convert_base(folder, out, quant="q8_0")
    assert read_header(out).metadata["edgelora.tokenizer"] == "llama.cpp"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [*NASTY, "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|><|endoftext|>b <|im_end|> c"]
    expected = [tokenizer.encode(text, add_special_tokens=special).ids for text in texts]
    assert llamacpp.tokenize(out, texts, special=special) == expected


@pytest.mark.parametrize("name", NAMES.values())
def test_every_pretokenizer_in_the_table(name: str, tmp_path: Path) -> None:
    tokenizer = pretokenizer(name)
    folder, out = make_model(tmp_path / "model", tokenizer=tokenizer, vocab_size=600), tmp_path / "base.gguf"
    convert_base(folder, out, quant="f32")
    metadata = read_header(out).metadata
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["edgelora.tokenizer"] == "llama.cpp"
    texts = [*NASTY, f"a{SPECIAL[1]}b"]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert llamacpp.tokenize(out, texts, special=False) == expected


def pretokenizer(name: str) -> Tokenizer:
    """A tokenizer trained on the corpus itself, so that every rule meets merges that it must stop."""
    steps, ignore_merges = next(key for key, value in NAMES.items() if value == name)
    parts = {
        (GPT2,): [],
        (LLAMA3,): split(LLAMA3),
        (QWEN2,): split(QWEN2),
    }.get(steps, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer = byte_level_tokenizer(*parts, ignore_merges=ignore_merges)
    other = byte_level_tokenizer(*parts, ignore_merges=ignore_merges, vocab_size=600, texts=NASTY * 3)
    assert other.get_vocab_size() > tokenizer.get_vocab_size()
    return other


def test_another_pretokenizer_is_seen(tmp_path: Path) -> None:
    tokenizer, other = pretokenizer("gpt-2"), pretokenizer("qwen2")
    out = tmp_path / "base.gguf"
    convert_base(make_model(tmp_path / "model", tokenizer=tokenizer, vocab_size=600), out, quant="f32")
    expected = [other.encode(text, add_special_tokens=False).ids for text in NASTY]
    assert llamacpp.tokenize(out, NASTY, special=False) != expected


SPECIAL_TEXTS = ["<s>Once upon</s>a time <s> there", "</s>a", "</s> a", "<s>\nOnce", "a</s>"]


def test_sentencepiece(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    folder, out = real_model("stories-260k"), tmp_path / "base.gguf"
    processor.Load(str(folder / "tokenizer.model"))
    convert_base(folder, out, quant="f32")
    # The model says remove_extra_whitespaces, which neither transformers nor llama.cpp does: compared without.
    texts = [text for text in NASTY if "  " not in text and text == text.strip()]
    expected = [[1, *processor.EncodeAsIds(text)] for text in texts]
    assert llamacpp.tokenize(out, texts, special=True) == expected
    carried = Tokenizer.from_str(read_header(out).metadata["tokenizer.huggingface.json"])
    assert [carried.encode(text).ids for text in texts] == expected


@pytest.mark.train
def test_sentencepiece_alone_is_tokenized_as_in_training(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, out = real_model("stories-260k"), tmp_path / "base.gguf"
    convert_base(folder, out, quant="f32")
    metadata = read_header(out).metadata
    assert metadata["edgelora.tokenizer"] == "huggingface"
    carried = Tokenizer.from_str(metadata["tokenizer.huggingface.json"])
    trained = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*NASTY, *SPECIAL_TEXTS]
    assert [carried.encode(text).ids for text in texts] == [trained(text)["input_ids"] for text in texts]
    assert json.loads(carried.to_str()) == json.loads(trained.backend_tokenizer.to_str())
    plain = [trained(text, add_special_tokens=False)["input_ids"] for text in SPECIAL_TEXTS[:4]]
    native = llamacpp.tokenize(out, SPECIAL_TEXTS[:4], special=False)
    assert all(one != other for one, other in zip(native, plain, strict=True)), "then it need not be carried"


def test_where_llama_cpp_cannot_the_file_carries_the_tokenizer(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = real_model("tinystories-656k"), tmp_path / "base.gguf"
    report = convert_base(folder, out, quant="f32")
    metadata = read_header(out).metadata
    assert metadata["edgelora.tokenizer"] == "huggingface"
    assert "A tokenizer.json is kept" in report.notices[0]
    carried = Tokenizer.from_str(metadata["tokenizer.huggingface.json"])
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [carried.encode(text).ids for text in NASTY] == [original.encode(text).ids for text in NASTY]
    text = "Once upon a time, there was a little girl named Lily."
    assert llamacpp.tokenize(out, [text], special=True) != [original.encode(text).ids], "then it need not be carried"
