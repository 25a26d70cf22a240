"""Vocabularies of every kind, and what llama.cpp cannot stand for."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import TokenType
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from converters.errors import ConversionError, FormatError, MissingFileError, UnsupportedError
from converters.pretokenizers import CUTS, LLAMA3, QWEN2
from converters.sentencepiece_model import read_sentencepiece
from converters.tokenizer import load_vocabulary
from converters.tokenizer_rules import GEMMA_4_RULES, LLAMA_RULES, PHI_3_RULES, TokenizerRules
from tests.conftest import SHARED
from tests.converters.folders import SPECIAL, byte_level_tokenizer, split, write_json

SIZE = 320


def folder_with(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], **config})
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)
    return folder


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<tool>", "new word"])
    vocabulary = load_vocabulary(folder_with(tmp_path, tokenizer), SIZE)
    metadata, ids = vocabulary.metadata, tokenizer.get_vocab()
    types = metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert metadata["edgelora.tokenizer"] == "llama.cpp"
    assert "tokenizer.huggingface.json" not in metadata
    assert all(vocabulary.tokens[number] == token for token, number in ids.items())
    assert types[ids[SPECIAL[0]]] == TokenType.CONTROL
    assert types[ids["<tool>"]] == types[ids["new word"]] == TokenType.USER_DEFINED
    assert types[ids["a"]] == TokenType.NORMAL
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert "tokenizer.ggml.add_bos_token" not in metadata  # llama.cpp adds none under this name
    assert len(metadata["tokenizer.ggml.merges"]) == len(json.loads(tokenizer.to_str())["model"]["merges"])


def test_added_ends_come_from_the_post_processor(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A {SPECIAL[1]}", special_tokens=[(SPECIAL[0], 0), (SPECIAL[1], 1)]
    )
    metadata = load_vocabulary(folder_with(tmp_path, tokenizer), SIZE).metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is True
    assert metadata["edgelora.tokenizer"] == "llama.cpp"


def no_byte(value: dict[str, Any]) -> None:
    vocab = value["model"]["vocab"]
    number = vocab.pop("\u0143")
    vocab["spare"] = number
    value["model"]["merges"] = [pair for pair in value["model"]["merges"] if "\u0143" not in "".join(pair)]


DIFFERENT: dict[str, tuple[Callable[[Tokenizer], Any], Callable[[dict[str, Any]], object], str]] = {
    "a normalizer": (lambda t: setattr(t, "normalizer", normalizers.NFC()), lambda v: None, "it normalizes text"),
    "another pre-tokenizer": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(split(r"\w+|\W+"))), lambda v: None,
        "no pre-tokenizer that cuts text as it does",
    ),
    "a prefix space": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), lambda v: None,
        "no pre-tokenizer that cuts text as it does",
    ),
    "no step to bytes": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
        lambda v: v["model"].update(ignore_merges=True), "no pre-tokenizer that cuts text as it does",
    ),
    "bytes before the expression": (
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(split(LLAMA3)[::-1])),
        lambda v: v["model"].update(ignore_merges=True), "no pre-tokenizer that cuts text as it does",
    ),
    "a missing byte": (lambda t: None, no_byte, "1 of 256 bytes are not in its vocabulary"),
    "a token that takes spaces": (
        lambda t: None, lambda v: v["added_tokens"][1].update(lstrip=True), "takes the spaces around it",
    ),
    "a longer template": (
        lambda t: setattr(t, "post_processor", processors.TemplateProcessing(
            single=f"{SPECIAL[0]} {SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])), lambda v: None,
        "its post-processor does more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_tokenizer_that_llama_cpp_lacks_goes_into_the_file(what: str, tmp_path: Path) -> None:
    prepare, change, reason = DIFFERENT[what]
    tokenizer = byte_level_tokenizer()
    prepare(tokenizer)
    edit(folder_with(tmp_path, tokenizer), change)
    vocabulary = load_vocabulary(tmp_path, SIZE)
    assert vocabulary.metadata["edgelora.tokenizer"] == "huggingface"
    assert vocabulary.metadata["tokenizer.huggingface.json"] == (tmp_path / "tokenizer.json").read_text()
    assert vocabulary.metadata["tokenizer.ggml.pre"] in CUTS
    assert reason in vocabulary.notices[0]


@pytest.mark.parametrize(("regex", "ignore_merges", "name"), [(LLAMA3, True, "llama-bpe"), (QWEN2, False, "qwen2")])
def test_pretokenizers_are_named_by_their_expression(
    regex: str, ignore_merges: bool, name: str, tmp_path: Path
) -> None:
    folder_with(tmp_path, byte_level_tokenizer(*split(regex), ignore_merges=ignore_merges))
    assert load_vocabulary(tmp_path, SIZE).metadata["tokenizer.ggml.pre"] == name


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_chat_templates(tmp_path: Path) -> None:
    folder_with(tmp_path, byte_level_tokenizer(), chat_template="from the config")
    assert load_vocabulary(tmp_path, SIZE).metadata["tokenizer.chat_template"] == "from the config"
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert load_vocabulary(tmp_path, SIZE).metadata["tokenizer.chat_template"] == CHAT
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_vocabulary(tmp_path, SIZE).metadata["tokenizer.chat_template"] == CHAT


def test_a_list_of_chat_templates(tmp_path: Path) -> None:
    default, other = {"name": "default", "template": "one"}, {"name": "rag", "template": "two"}
    folder_with(tmp_path, byte_level_tokenizer(), chat_template=[default, other])
    vocabulary = load_vocabulary(tmp_path, SIZE)
    assert (vocabulary.metadata["tokenizer.chat_template"], vocabulary.notices) == ("one", ())
    folder_with(tmp_path, byte_level_tokenizer(), chat_template=[other])
    vocabulary = load_vocabulary(tmp_path, SIZE)
    assert "tokenizer.chat_template" not in vocabulary.metadata
    assert "none is named 'default' (there is rag)" in vocabulary.notices[0]
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    vocabulary = load_vocabulary(tmp_path, SIZE)
    assert (vocabulary.metadata["tokenizer.chat_template"], vocabulary.notices) == (CHAT, ())


EOS, EOT, ENDS_KEY = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "edgelora.end_token_ids"
# (tokenizer_config's eos, config.json, generation_config.json) to (eos, the others)
ENDS: dict[str, tuple[str | None, Any, Any, tuple[int | None, list[int] | None]]] = {
    "one": (SPECIAL[1], 1, 1, (1, None)),
    "a list": (SPECIAL[1], [1, 5], None, (1, [5])),
    "its own first": (SPECIAL[1], None, [7, 1], (1, [7])),
    "three": (SPECIAL[1], None, [7, 1, 8, 9], (1, [7, 8, 9])),
    "an empty tokenizer_config": (None, None, [7, 8], (7, [8])),
    "config.json first": (None, 3, 4, (3, [4])),
    "none": (None, None, None, (None, None)),
}


@pytest.mark.parametrize("what", ENDS)
def test_every_id_that_ends_a_reply(what: str, tmp_path: Path) -> None:
    own, config, generation, (eos, others) = ENDS[what]
    folder_with(tmp_path, byte_level_tokenizer())
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": own} if own else {})
    write_json(tmp_path / "config.json", {"eos_token_id": config})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": generation})
    metadata = load_vocabulary(tmp_path, SIZE).metadata
    assert (metadata.get(EOS), metadata.get(ENDS_KEY)) == (eos, others)
    assert EOT not in metadata  # llama.cpp's converter writes none


def test_an_end_outside_the_vocabulary(tmp_path: Path) -> None:
    write_json(folder_with(tmp_path, byte_level_tokenizer()) / "config.json", {"eos_token_id": [1, 999]})
    with pytest.raises(FormatError, match=r"config\.json: eos_token_id has 999, expected ids below 320"):
        load_vocabulary(tmp_path, SIZE)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], type[ConversionError], str]] = {
    "not a tokenizer": (lambda v: v.pop("model"), FormatError, "tokenizers package cannot read it"),
    "wordpiece": (
        lambda v: v.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, added_tokens=[]),
        UnsupportedError, "a WordLevel tokenizer",
    ),
    "no merges": (lambda v: v["model"].update(merges=[]), UnsupportedError, "has no merges"),
    "ids beyond the model": (
        lambda v: v["added_tokens"].append({**v["added_tokens"][1], "id": 999, "content": "<far>"}),
        FormatError, r"token ids go up to \d+, config.json says vocab_size",
    ),
    "padding taken by a token": (
        lambda v: v["model"]["vocab"].update({"[PAD310]": 300}), UnsupportedError, "are both '\\[PAD310\\]'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_tokenizers(what: str, tmp_path: Path) -> None:
    change, error, message = BROKEN[what]
    edit(folder_with(tmp_path, byte_level_tokenizer()), change)
    with pytest.raises(error, match=message):
        load_vocabulary(tmp_path, SIZE if "far" not in what and "ids" not in what else 300)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_vocabulary(tmp_path, SIZE)


def bare(folder: Path, **config: Any) -> Path:
    """vocab.json and merges.txt, as GPT-2 and Qwen came at first."""
    model = json.loads(byte_level_tokenizer().to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    return folder


def test_vocabulary_and_merges_take_the_steps_of_their_class(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(bare(tmp_path, tokenizer_class="GPT2Tokenizer"), SIZE)
    whole = load_vocabulary(folder_with(tmp_path, byte_level_tokenizer()), SIZE)
    for key in ("tokens", "merges", "pre", "model"):
        assert vocabulary.metadata[f"tokenizer.ggml.{key}"] == whole.metadata[f"tokenizer.ggml.{key}"]
    (tmp_path / "tokenizer.json").unlink()
    vocabulary = load_vocabulary(bare(tmp_path, tokenizer_class="Qwen2TokenizerFast"), SIZE)
    assert vocabulary.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert "it normalizes text (NFC)" in vocabulary.notices[0]


def test_vocabulary_and_merges_of_another_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="how XTokenizer cuts text is not known") as caught:
        load_vocabulary(bare(tmp_path, tokenizer_class="XTokenizer"), SIZE)
    assert "PIPELINES, converters/tokenizer_file.py" in caught.value.hint
    assert (
        load_vocabulary(bare(tmp_path), SIZE, config={"model_type": "gpt2"}).metadata["tokenizer.ggml.pre"] == "gpt-2"
    )


def test_a_notice_shows_where_llama_cpp_would_cut_otherwise(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(*split(r"\w+|\W+"))
    notice = load_vocabulary(folder_with(tmp_path, tokenizer), SIZE).notices[0]
    assert re.search(
        r"hash [0-9a-f]{64}; a name for it goes into NAME_OF_HASH, converters/pretokenizer_hashes\.py", notice
    )
    assert re.search(r"For example, '.+' is \[.+\] and would be \[.+\]\. A tokenizer\.json is kept", notice)


def test_a_token_that_llama_cpp_takes_for_a_control_token(tmp_path: Path) -> None:
    edit(folder_with(tmp_path, byte_level_tokenizer()), lambda v: v["model"]["vocab"].update({"</s>": 310}))
    assert "'</s>' is an ordinary word of it" in load_vocabulary(tmp_path, SIZE).notices[0]
    edit(tmp_path, lambda v: v["added_tokens"].append({**v["added_tokens"][0], "id": 310, "content": "</s>"}))
    assert load_vocabulary(tmp_path, SIZE).notices == ()


@pytest.mark.parametrize(
    ("tokens", "seen"),
    [(["<a>", "><bb"], True), (["<a>", "<bb>"], False), (["  ", "   "], False), (["<a>", ">" + "<b" * 50_000], True)],
)
def test_added_tokens_that_can_overlap(tokens: list[str], seen: bool, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(tokens)
    notices = load_vocabulary(folder_with(tmp_path, tokenizer), SIZE).notices
    assert any("can overlap" in notice for notice in notices) == seen


JUNK: dict[str, tuple[str, Any]] = {
    "templates without names": ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}),
    "an added_tokens_decoder that is a list": ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    "an added_tokens_decoder with endless ids": ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {}}}),
    "a negative id": ("config.json", {"bos_token_id": -1}),
    "an id that is not one": ("generation_config.json", {"eos_token_id": [True]}),
}


@pytest.mark.parametrize("what", JUNK)
def test_junk_in_the_files_around_a_tokenizer(what: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    load_vocabulary(tmp_path, 270)
    file, value = JUNK[what]
    write_json(tmp_path / file, value)
    with pytest.raises(FormatError):
        load_vocabulary(tmp_path, 270)


def test_ids_of_added_tokens_that_are_none(tmp_path: Path) -> None:
    """Hugging Face's tokenizer takes what tokenizer_config.json adds; keys that are no ids add nothing."""
    decoder = {"9" * 5000: {"content": "a b"}, "²": {"content": "c d"}}
    with_them = load_vocabulary(folder_with(tmp_path, byte_level_tokenizer(), added_tokens_decoder=decoder), SIZE)
    assert not {"a b", "c d"} & set(with_them.tokens)


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def sentencepiece(
    pieces: list[tuple[str, float, int]], *, model_type: int = 2, charsmap: bytes = b"", suffix: bool = False
) -> bytes:
    """A tokenizer.model, field by field."""
    out = b""
    for text, score, kind in pieces:
        piece = (
            message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind)
        )
        out += message(1, piece)
    trainer = varint(3 << 3) + varint(model_type) + varint(24 << 3) + varint(suffix) + varint(40 << 3) + varint(0)
    return out + message(2, trainer) + message(3, message(1, b"identity") + message(2, charsmap))


BYTES = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("</s>", 0.0, 3),
    *BYTES,
    ("▁a", -1.0, 1),
    ("user", 0.0, 4),
    ("x", -2.5, 1),
]
ORDINARY = [(text, score, 1 if kind == 4 else kind) for text, score, kind in PIECES]


def test_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    added = {"262": {"content": "<|im_start|>", "special": True}, "263": {"content": "▁hi", "special": False}}
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": True, "added_tokens_decoder": added})
    vocabulary = load_vocabulary(tmp_path, 270)
    metadata, types = vocabulary.metadata, vocabulary.metadata["tokenizer.ggml.token_type"]
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert vocabulary.tokens[258:264] == ("<0xFF>", "▁a", "user", "x", "<|im_start|>", " hi")
    assert types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    expected = [TokenType.NORMAL] * 3  # as llama.cpp's converter has it, also for the piece that is always whole
    assert types[259:265] == [*expected, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert metadata["tokenizer.ggml.scores"][259:265] == [-1.0, 0.0, -2.5, -1000.0, -1000.0, -10000.0]
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert "its token 'user' is always whole" in vocabulary.notices[0]


LEGACY_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
SPACES: dict[str, tuple[dict[str, Any], str]] = {
    "as llama.cpp": ({"normalizer": LEGACY_NORMALIZER, "pre_tokenizer": None}, "llama.cpp"),
    "first": ({}, "huggingface"),
    "always": ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}}, "huggingface"),
    "normalizing": ({"normalizer": {"type": "NFC"}, "pre_tokenizer": None}, "huggingface"),
}


@pytest.mark.parametrize("what", SPACES)
def test_a_space_in_other_places_is_not_llama_cpps(what: str, tmp_path: Path) -> None:
    change, expected = SPACES[what]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(ORDINARY))
    made = load_vocabulary(tmp_path, 270).metadata["tokenizer.huggingface.json"]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**json.loads(made), **change}))
    vocabulary = load_vocabulary(tmp_path, 270)
    assert vocabulary.metadata["edgelora.tokenizer"] == expected
    assert any("puts no space after a special token" in notice for notice in vocabulary.notices) == (
        expected == "huggingface"
    )


def test_sentencepiece_alone_gets_the_tokenizer_json_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>"})
    vocabulary = load_vocabulary(tmp_path, 270)
    assert vocabulary.metadata["edgelora.tokenizer"] == "huggingface"
    assert "puts no space after a special token" in vocabulary.notices[0]
    carried = Tokenizer.from_str(vocabulary.metadata["tokenizer.huggingface.json"])
    assert carried.encode("user", add_special_tokens=False).tokens == ["user"]
    assert carried.encode("<s>x</s>x user").tokens[:4] == ["<s>", "<s>", "x", "</s>"]


def test_tokens_of_tokenizer_json_alone_are_kept(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    tokenizer = Tokenizer.from_str(load_vocabulary(tmp_path, 270).metadata["tokenizer.huggingface.json"])
    tokenizer.add_special_tokens(["[CALL]"])
    tokenizer.add_tokens(["▁word"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = load_vocabulary(tmp_path, 270)
    assert vocabulary.tokens[262:265] == ("[CALL]", " word", "[PAD264]")
    types = vocabulary.metadata["tokenizer.ggml.token_type"]
    assert types[262:265] == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED]
    with pytest.raises(FormatError, match="token ids go up to 263"):
        load_vocabulary(tmp_path, 263)


def test_two_vocabularies_that_disagree_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    made = json.loads(load_vocabulary(tmp_path, 270).metadata["tokenizer.huggingface.json"])
    made["model"]["vocab"]["y"] = made["model"]["vocab"].pop("x")
    write_json(tmp_path / "tokenizer.json", {**made, "normalizer": LEGACY_NORMALIZER, "pre_tokenizer": None})
    vocabulary = load_vocabulary(tmp_path, 270)
    assert vocabulary.metadata["edgelora.tokenizer"] == "huggingface"
    assert "'y' is 261" in vocabulary.notices[0]


UNFIT = {
    "spaces after words": (sentencepiece(PIECES, suffix=True), "it puts the space after a word"),
    "unigram": (sentencepiece(PIECES, model_type=1), "its model type is unigram"),
    "a character map": (sentencepiece(PIECES, charsmap=b"map"), "it normalizes text"),
    "no bytes": (sentencepiece(PIECES[:3]), "256 of 256 byte tokens are missing"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_sentencepiece_that_llama_cpp_lacks(what: str, tmp_path: Path) -> None:
    data, reason = UNFIT[what]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UnsupportedError, match=reason) as caught:
        load_vocabulary(tmp_path, 270)
    assert "save_pretrained" in caught.value.hint
    folder_with(tmp_path, byte_level_tokenizer(vocab_size=265))
    vocabulary = load_vocabulary(tmp_path, 270)
    assert vocabulary.metadata["edgelora.tokenizer"] == "huggingface"
    assert reason in vocabulary.notices[0]


def sentencepiece_like(folder: Path, change: Callable[[dict[str, Any]], object] = lambda value: None) -> Path:
    """A tokenizer.json with byte tokens, as Gemma 4 has it."""
    (folder / "tokenizer.model").write_bytes(sentencepiece(ORDINARY))
    made = json.loads(str(load_vocabulary(folder, 270).metadata["tokenizer.huggingface.json"]))
    (folder / "tokenizer.model").unlink()
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made.update(normalizer=replace, pre_tokenizer=None, post_processor=None)
    made["model"]["vocab"] |= {"\n": 262, "\n\n": 263, "▁": 264, "a": 265}
    made["model"]["merges"] = [["\n", "\n"], ["▁", "a"]]
    change(made)
    write_json(folder / "tokenizer.json", made)
    return folder


GEMMA_4: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "as it is": (lambda v: None, ""),
    "a normalizer": (lambda v: v.update(normalizer={"type": "NFC"}), "it does more to text"),
    "a cut": (lambda v: v.update(pre_tokenizer={"type": "Whitespace"}), "it cuts text before it merges"),
    "across lines": (lambda v: v["model"]["vocab"].update({"a\n": 266}), "its token 'a\\n' crosses a line break"),
    "no merge": (lambda v: v["model"]["merges"].pop(0), "its merges do not make '\\n\\n' of line breaks"),
    "no byte": (lambda v: v["model"]["vocab"].pop("<0x41>"), "1 of 256 byte tokens are missing"),
}


@pytest.mark.parametrize("what", GEMMA_4)
def test_gemma_4(what: str, tmp_path: Path) -> None:
    change, reason = GEMMA_4[what]
    vocabulary = load_vocabulary(sentencepiece_like(tmp_path, change), 270, GEMMA_4_RULES)
    assert vocabulary.metadata["tokenizer.ggml.model"] == "gemma4"
    assert "tokenizer.ggml.pre" not in vocabulary.metadata
    assert vocabulary.metadata["edgelora.tokenizer"] == ("huggingface" if reason else "llama.cpp")
    assert not vocabulary.notices if not reason else reason in vocabulary.notices[0]


RUBBISH = (
    None,
    True,
    -1,
    1e9,
    "",
    "x",
    [],
    [1],
    ["a", "b"],
    {},
    {"a": 1},
    [[]],
    {"content": 5},
    float("nan"),
    "\ud800",
)


def spoiled(value: Any, rng: random.Random) -> Any:
    """Something in it removed or replaced by rubbish."""
    places: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        part = rest.pop()
        keys = list(part)[:40] if isinstance(part, dict) else range(min(6, len(part))) if isinstance(part, list) else ()
        places += [(part, key) for key in keys]
        rest += [part[key] for key in keys]
    part, key = rng.choice(places)
    if isinstance(part, dict) and rng.random() < 0.2:
        del part[key]
    else:
        part[key] = copy.deepcopy(rng.choice(RUBBISH))
    return value


def plain_folder(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes(sentencepiece(PIECES))
    return folder


FOLDERS: dict[str, tuple[Callable[[Path], Path], TokenizerRules]] = {
    "byte level": (lambda folder: folder_with(folder, byte_level_tokenizer()), LLAMA_RULES),
    "bare": (lambda folder: bare(folder, tokenizer_class="Qwen2Tokenizer"), LLAMA_RULES),
    "sentencepiece": (plain_folder, PHI_3_RULES),
    "sentencepiece-like": (sentencepiece_like, LLAMA_RULES),
    "both": (lambda folder: plain_folder(sentencepiece_like(folder)), PHI_3_RULES),
    "gemma 4": (sentencepiece_like, GEMMA_4_RULES),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_rubbish_anywhere_is_refused_in_words_or_makes_no_difference(kind: str, tmp_path: Path) -> None:
    make, rules = FOLDERS[kind]
    rng, outcomes = random.Random(kind), set()
    decoder = {"0": {"content": "<unk>", "special": True}, "300": {"content": "more"}}
    given = {"chat_template": [{"name": "default", "template": "x"}], "extra_special_tokens": ["a"]}
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder)
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": decoder, **given}
        path = folder / "tokenizer_config.json"
        write_json(path, {**(json.loads(path.read_text()) if path.is_file() else {}), **config})
        write_json(folder / "config.json", {"vocab_size": 320, "text_config": {"pad_token_id": 3}})
        write_json(folder / "special_tokens_map.json", {"unk_token": {"content": "a"}})
        path = rng.choice(sorted(folder.glob("*.json")))
        write_json(path, spoiled(json.loads(path.read_text()), rng))
        try:
            load_vocabulary(folder, SIZE, rules)
            outcomes.add("converted")
        except ConversionError:
            outcomes.add("refused")
    assert outcomes == {"converted", "refused"}


def test_every_truncation_of_a_sentencepiece_model_is_named_or_shorter(tmp_path: Path) -> None:
    data, path = sentencepiece(PIECES[:8]), tmp_path / "tokenizer.model"
    outcomes = set()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            outcomes.add(len(read_sentencepiece(path).pieces))
        except FormatError:
            outcomes.add(-1)
    assert outcomes == {-1, *range(1, 9)}


def test_not_a_sentencepiece_model(tmp_path: Path) -> None:
    for data in (b"hello world", b"\xff" * 40, b"{}"):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(FormatError, match="not a SentencePiece model"):
            load_vocabulary(tmp_path, 270)


def test_sentencepiece_agrees_with_its_own_package() -> None:
    package = pytest.importorskip("sentencepiece")
    path = SHARED / "tokenizers" / "llama2" / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    processor, ours = package.SentencePieceProcessor(model_file=str(path)), read_sentencepiece(path)
    assert len(ours.pieces) == processor.vocab_size() == 32000
    for number, piece in enumerate(ours.pieces):
        assert (piece.text, piece.score) == (processor.IdToPiece(number), processor.GetScore(number))
    assert ours.model_type == "bpe"
    assert not ours.normalizes
