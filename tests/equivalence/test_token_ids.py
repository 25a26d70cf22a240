"""The engine cuts text into the ids that the model was trained with: by llama.cpp, or by the tokenizer in the file.

The ids of training are those of the folder's tokenizer.json, or of transformers where there is none.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf.constants import TokenType
from tokenizers import Tokenizer, pre_tokenizers

from converters.pretokenizers import CUTS, DIGIT, GPT2, Cut
from converters.tokenizer import NATIVE, Vocabulary, load_vocabulary
from converters.tokenizer_rules import BYTE_LEVEL_RULES, LLAMA_RULES, QWEN_RULES, TokenizerRules
from converters.writer import header_bytes
from edgelora.engine.tokenizer import open_tokenizer
from tests.conftest import SHARED
from tests.converters.folders import SPECIAL, byte_level_tokenizer, split, write_json
from tests.equivalence import llamacpp
from tests.equivalence.reference import reference_root
from tests.equivalence.tokenizer_twins import PADDING, TWINS, Original, make_twin, vectors

Ids = list[list[int]]
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>")
# the ids of the smaller vocabularies are compared in every run
QUICK = ("gpt-2", "starcoder", "deepseek-coder", "llama-spm", "phi-3")
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
    "antidisestablishmentarianism" * 40,
    "x" * 3000,
    "    def f():\n\treturn\n\n\n\n        # four breaks, eight spaces\n" + "\n" * 12,
    "שלום עולם מרחבא مرحبا بالعالم \u202eltr\u202c",
    "\u0378\u0379 \U000e0001\U000e0020 \ufffe\uffff",  # unassigned, tags, noncharacters
    "1234567890" * 5 + " ١٢٣٤٥ 一二三 Ⅻ ¼½¾",
    "snake_case camelCase SCREAMING HTTPServer2XML it'S IT'S",
    "<i></s></i> a</s>b ▁<PRE> >><EOT><<",
    "<s> </s> <unk> <pad> <|im_start|> <bos> <eos> [INST] <<SYS>> <|endoftext",
    "\n" * 40 + "x" + "\t" * 40 + " " * 200,
    "\r\r\n \r \n\r\t\v\f \x85",
]


def vocabulary_file(vocabulary: Vocabulary, path: Path) -> Path:
    """A GGUF file without tensors, as llama.cpp loads it for its vocabulary alone."""
    path.write_bytes(header_bytes({"general.architecture": "llama", **vocabulary.metadata}, []))
    return path


def engine_ids(vocabulary: Vocabulary, path: Path, texts: Sequence[str], *, special: bool = True) -> Ids:
    """What edgelora's engine makes of texts with a file of this vocabulary."""
    with llamacpp.loaded(vocabulary_file(vocabulary, path), vocab_only=True) as model:
        tokenizer = open_tokenizer(llama_cpp.llama_model_get_vocab(model), vocabulary.metadata)
        return [tokenizer.encode(text, special=special) for text in texts]


def native_ids(vocabulary: Vocabulary, path: Path, texts: Sequence[str]) -> Ids:
    with llamacpp.loaded(vocabulary_file(vocabulary, path), vocab_only=True) as model:
        tokenizer = open_tokenizer(
            llama_cpp.llama_model_get_vocab(model), {**vocabulary.metadata, "edgelora.tokenizer": NATIVE}
        )
        return [tokenizer.encode(text, special=True) for text in texts]


def hf_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def with_special(vocabulary: Vocabulary) -> list[str]:
    """Texts with special tokens of this vocabulary in them."""
    types: Any = vocabulary.metadata["tokenizer.ggml.token_type"]
    kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
    found = [token for token, kind in zip(vocabulary.tokens, types, strict=True) if kind in kinds]
    return [text for token in found[:12] for text in (token, f"a{token}b", f" {token} c\n{token}")]


def is_native(vocabulary: Vocabulary) -> bool:
    return vocabulary.metadata["edgelora.tokenizer"] == NATIVE


def example_of(vocabulary: Vocabulary) -> str:
    """The text that the notice shows to be cut otherwise by llama.cpp."""
    found = re.search(r"For example, ('(?:[^'\\]|\\.)*'|\"[^\"]*\") is \[", vocabulary.notices[0])
    assert found, vocabulary.notices
    return str(ast.literal_eval(found[1]))


# --- every cut of the table that a tokenizer.json can have

SPELLED = {name: cut for name, cut in CUTS.items() if next(n for n in CUTS if CUTS[n] == cut) == name}


def tokenizer_with(cut: Cut) -> Tokenizer:
    """Trained on the corpus itself, so that every rule meets merges that it must stop."""
    steps = [part for step in cut.steps for part in _parts(step)]
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [*steps, bytes_last]
    return byte_level_tokenizer(*parts, ignore_merges=cut.ignore_merges, vocab_size=600, texts=NASTY[:21] * 3)


def _parts(step: str) -> list[Any]:
    if step == DIGIT:
        return [pre_tokenizers.Digits(individual_digits=True)]
    return split(step)[:1]


@pytest.mark.parametrize("name", SPELLED)
def test_every_cut_in_the_table(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(CUTS[name])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 600, BYTE_LEVEL_RULES)
    assert CUTS[str(vocabulary.metadata["tokenizer.ggml.pre"])].steps == CUTS[name].steps
    assert is_native(vocabulary)
    texts = [*NASTY, f"a{SPECIAL[1]}b"]
    assert engine_ids(vocabulary, tmp_path / "v.gguf", texts) == hf_ids(tokenizer, texts)


def test_another_cut_is_seen(tmp_path: Path) -> None:
    tokenizer, other = tokenizer_with(CUTS["gpt-2"]), tokenizer_with(CUTS["qwen2"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 600, BYTE_LEVEL_RULES)
    assert engine_ids(vocabulary, tmp_path / "v.gguf", NASTY) != hf_ids(other, NASTY)


def test_an_unknown_cut_is_carried_with_its_hash_and_an_example(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(Cut((r"\p{N}{1,2}", GPT2)))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 600, BYTE_LEVEL_RULES)
    assert not is_native(vocabulary)
    assert "NAME_OF_HASH, converters/pretokenizer_hashes.py" in vocabulary.notices[0]
    text = example_of(vocabulary)
    path = tmp_path / "v.gguf"
    assert native_ids(vocabulary, path, [text]) != hf_ids(tokenizer, [text])
    assert engine_ids(vocabulary, path, NASTY) == hf_ids(tokenizer, NASTY)


def test_merges_that_make_every_token_make_ignore_merges_idle(tmp_path: Path) -> None:
    cut = CUTS["qwen2"]
    tokenizer = tokenizer_with(cut)
    tokenizer.model.ignore_merges = True  # every token of a trained vocabulary is made by its merges
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 600, BYTE_LEVEL_RULES)
    assert (vocabulary.metadata["tokenizer.ggml.pre"], is_native(vocabulary)) == ("qwen2", True)
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["model"]["merges"].pop(5)  # now one token is made by no merge
    write_json(tmp_path / "tokenizer.json", value)
    assert not is_native(load_vocabulary(tmp_path, 600, BYTE_LEVEL_RULES))


# --- tokenizers and models that people have


def test_bundled_base(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real_model("tiny-base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = load_vocabulary(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    assert is_native(vocabulary)
    texts = [*NASTY, "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|><|endoftext|>b <|im_end|> c"]
    assert engine_ids(vocabulary, tmp_path / "v.gguf", texts) == hf_ids(tokenizer, texts)


def test_where_llama_cpp_cannot_the_file_carries_the_tokenizer(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = real_model("tinystories-656k")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = load_vocabulary(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    assert not is_native(vocabulary)
    texts = [*NASTY, *with_special(vocabulary)]
    assert engine_ids(vocabulary, tmp_path / "v.gguf", texts) == hf_ids(tokenizer, texts)
    text = example_of(vocabulary)
    assert native_ids(vocabulary, tmp_path / "v.gguf", [text]) != hf_ids(tokenizer, [text]), (
        "then it need not be carried"
    )


def test_every_end_of_a_reply_reaches_the_engine(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]})
    ends = {}
    for given in ([1], [1, 7, 9]):
        write_json(tmp_path / "generation_config.json", {"eos_token_id": given})
        vocabulary = load_vocabulary(tmp_path, 600)
        with llamacpp.loaded(vocabulary_file(vocabulary, tmp_path / "v.gguf"), vocab_only=True) as model:
            tokenizer = open_tokenizer(llama_cpp.llama_model_get_vocab(model), vocabulary.metadata)
            ends[len(given)] = tokenizer.end_tokens
    assert ends[3] - ends[1] == {7, 9}
    assert 1 in ends[1]


def test_control_tokens_of_a_carried_tokenizer_are_known(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(Cut((r"\p{N}{1,2}", GPT2)))
    tokenizer.add_special_tokens(["[INST]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 700, BYTE_LEVEL_RULES)
    with llamacpp.loaded(vocabulary_file(vocabulary, tmp_path / "v.gguf"), vocab_only=True) as model:
        opened = open_tokenizer(llama_cpp.llama_model_get_vocab(model), vocabulary.metadata)
        assert opened.control_tokens["[INST]"].id == tokenizer.token_to_id("[INST]")
        assert opened.encode("[INST]", special=True) == [tokenizer.token_to_id("[INST]")]
        assert len(opened.encode("[INST]", special=False)) > 1


@pytest.mark.parametrize("special", [True, False])
def test_half_a_character_is_a_question_mark_in_both_engines(
    special: bool, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("tiny-base", "tinystories-656k"):
        folder = real_model(name)
        vocabulary = load_vocabulary(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
        torn, whole = engine_ids(vocabulary, tmp_path / "v.gguf", ["a\ud83d b", "a? b"], special=special)
        assert torn == whole


def copied(names: Sequence[str], source: Path, folder: Path, **config: Any) -> Path:
    """Files of ../shared/data beside a config.json; skips where they are absent."""
    if not (source / names[0]).is_file():
        pytest.skip(f"{source} is not there")
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
    write_json(folder / "config.json", config)
    return folder


BARE: Mapping[str, tuple[tuple[str, ...], TokenizerRules, dict[str, Any], bool]] = {
    "gpt2": (("vocab.json", "merges.txt"), BYTE_LEVEL_RULES, {"model_type": "gpt2", "vocab_size": 50257}, True),
    "qwen2.5": (
        ("vocab.json", "merges.txt", "tokenizer_config.json"), QWEN_RULES,
        {"model_type": "qwen2", "vocab_size": 151936}, False,
    ),
    "llama2": (("tokenizer.model",), LLAMA_RULES, {"model_type": "llama", "vocab_size": 32000}, False),
}  # fmt: skip


@pytest.mark.train
@pytest.mark.parametrize("name", BARE)
def test_folders_without_tokenizer_json_are_tokenized_as_transformers_does(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files, rules, config, native = BARE[name]
    folder = copied(files, SHARED / "tokenizers" / name, tmp_path, **config)
    if name == "llama2":  # it has no other file that names its class
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    trained = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = load_vocabulary(folder, config["vocab_size"], rules)
    assert is_native(vocabulary) == native
    texts = [*NASTY, *with_special(vocabulary)]
    expected = [trained(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert engine_ids(vocabulary, tmp_path / "v.gguf", texts) == expected
    assert (native_ids(vocabulary, tmp_path / "v.gguf", texts) == expected) == native, "then it need not be carried"


SPECIAL_TEXTS = ["<s>Once upon</s>a time <s> there", "</s>a", "</s> a", "<s>\nOnce", "a</s>"]


def stories(real_model: Callable[[str], Path]) -> tuple[Path, Vocabulary]:
    folder = real_model("stories-260k")
    return folder, load_vocabulary(folder, json.loads((folder / "config.json").read_text())["vocab_size"])


def test_sentencepiece(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    folder, vocabulary = stories(real_model)
    processor.Load(str(folder / "tokenizer.model"))
    # The model says remove_extra_whitespaces, which neither transformers nor llama.cpp does: compared without.
    plain = [text for text in NASTY if "  " not in text and text == text.strip() and "s>" not in text]
    expected = [processor.EncodeAsIds(text) for text in plain]
    assert native_ids(vocabulary, tmp_path / "v.gguf", plain) == expected
    assert engine_ids(vocabulary, tmp_path / "v.gguf", plain) == expected


@pytest.mark.train
def test_sentencepiece_alone_is_tokenized_as_in_training(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder, vocabulary = stories(real_model)
    assert not is_native(vocabulary)
    carried = Tokenizer.from_str(str(vocabulary.metadata["tokenizer.huggingface.json"]))
    trained = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*NASTY, *SPECIAL_TEXTS]
    assert [carried.encode(text).ids for text in texts] == [trained(text)["input_ids"] for text in texts]
    assert json.loads(carried.to_str()) == json.loads(trained.backend_tokenizer.to_str())
    native = native_ids(vocabulary, tmp_path / "v.gguf", SPECIAL_TEXTS[:4])
    plain = [trained(text, add_special_tokens=False)["input_ids"] for text in SPECIAL_TEXTS[:4]]
    assert all(one != other for one, other in zip(native, plain, strict=True)), "then it need not be carried"


# --- vocabularies of llama.cpp with test vectors


def expected_types(original: Original, visible: Collection[str]) -> list[int]:
    """Those of the file, but for what the converter that made it did otherwise than today's."""
    rows = zip(original.tokens, original.types, strict=True)
    return [
        TokenType.UNUSED
        if PADDING.fullmatch(token)
        else TokenType.CONTROL
        if kind == TokenType.USER_DEFINED and LOOKS_SPECIAL.fullmatch(token) and token not in visible
        else kind
        for token, kind in rows
    ]


def expected_scores(original: Original) -> list[float]:
    rows = zip(original.tokens, original.scores, strict=True)
    return [-10000.0 if PADDING.fullmatch(token) else score for token, score in rows]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TWINS]
)
def test_twins_of_llama_cpps_vocabularies(name: str, tmp_path: Path) -> None:
    models, twin, folder = reference_root() / "models", TWINS[name], tmp_path / "model"
    original = make_twin(models, name, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts, ids = vectors(models, name)
    assert len(texts) == len(ids) > 40
    assert hf_ids(tokenizer, texts) == ids, "the twin is not its twin"
    assert hf_ids(tokenizer, [text.replace("l", "1") for text in texts]) != ids

    vocabulary = load_vocabulary(folder, len(original.tokens), twin.rules)
    metadata: Mapping[str, Any] = vocabulary.metadata
    assert metadata["tokenizer.ggml.model"] == original.metadata["tokenizer.ggml.model"]
    assert metadata.get("tokenizer.ggml.merges", []) == original.merges
    assert list(vocabulary.tokens) == original.tokens
    assert metadata["tokenizer.ggml.token_type"] == expected_types(original, twin.rules.visible)
    if original.scores:
        assert metadata["tokenizer.ggml.scores"] == expected_scores(original)
    if twin.pre:
        assert metadata["tokenizer.ggml.pre"] == twin.pre

    assert is_native(vocabulary) == twin.native
    corpus = [*NASTY, *texts, *with_special(vocabulary)]
    own = hf_ids(tokenizer, corpus)
    assert engine_ids(vocabulary, tmp_path / "v.gguf", corpus) == own
    if not twin.native:
        assert native_ids(vocabulary, tmp_path / "v.gguf", corpus) != own or twin.unproven, (
            "then it need not be carried"
        )
