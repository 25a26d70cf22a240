"""Every `tokenizer.*` key and value is what llama.cpp's `set_vocab` writes, family by family."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from converters import tokenizer_rules as rules
from converters.pretokenizers import LLAMA3, QWEN2, QWEN35
from converters.sentencepiece_json import merges
from converters.sentencepiece_model import Piece, SentencePieceModel
from converters.tokenizer import load_vocabulary
from converters.tokenizer_rules import TokenizerRules
from tests.conftest import SHARED
from tests.converters.folders import SPECIAL, byte_level_tokenizer, split, write_json
from tests.equivalence.reference import reference_root
from tests.equivalence.tokenizer_twins import sentencepiece_bytes

WORKER = Path(__file__).parent / "vocabulary_worker.py"
OURS_ALONE = {"tokenizer.huggingface.json"}
SIZE = 700
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
END, IM_END = SPECIAL
Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A folder to convert both ways.

    Attributes:
        make: puts the tokenizer files into the folder.
        tokenizer_config: None for a folder without that file.
        files: further files, as JSON or as text.
    """

    architecture: str
    model_type: str
    rules: TokenizerRules
    make: Callable[[Path], None]
    tokenizer_config: Json | None = field(default_factory=lambda: {"bos_token": END, "eos_token": IM_END})
    config: Json = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    size: int = SIZE


def added(tokenizer: Tokenizer) -> None:
    """Tokens of every sort: special, not, only special by its look, with spaces, and one that decodes to another."""
    tokenizer.add_special_tokens(["<|user|>", AddedToken("<|assistant|>", normalized=False)])
    tokenizer.add_tokens(["<tool>", "<|looks_special|>", "   ", "<pad>", AddedToken("▁word", normalized=False)])


def byte_level(
    *steps: Any,
    ignore_merges: bool = False,
    first: str = "",
    last: str = "",
    nfc: bool = False,
    bytes_after: bool = False,
    plain: bool = False,
) -> Callable[[Path], None]:
    """tokenizer.json of a byte-level BPE."""

    def make(folder: Path) -> None:
        tokenizer = byte_level_tokenizer(*steps, ignore_merges=ignore_merges, vocab_size=500)
        tokenizer.normalizer = normalizers.NFC() if nfc else None
        if not plain:
            added(tokenizer)
        parts: list[Any] = [processors.ByteLevel(trim_offsets=False)] if bytes_after else []
        if first or last:
            ids = [(text, tokenizer.token_to_id(text)) for text in (first, last) if text]
            parts.append(processors.TemplateProcessing(single=f"{first} $A {last}".strip(), special_tokens=ids))
        if parts:
            tokenizer.post_processor = processors.Sequence(parts) if len(parts) > 1 else parts[0]
        tokenizer.save(str(folder / "tokenizer.json"))

    return make


def vocabulary_and_merges(folder: Path) -> None:
    value = json.loads(byte_level_tokenizer(vocab_size=500).to_str())["model"]
    write_json(folder / "vocab.json", value["vocab"])
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in value["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


BASE = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
GEMMA_BASE = [("<pad>", 0.0, 3), ("<eos>", 0.0, 3), ("<bos>", 0.0, 3), ("<unk>", 0.0, 2), ("<mask>", 0.0, 4)]
WORDS = ["▁a", "▁t", "he", "▁the", "in", "▁in", "on", "er", "re", "▁b", "▁▁", "ing"]


def pieces(base: Sequence[tuple[str, float, int]]) -> list[Piece]:
    rows = [*base, *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)), ("[user]", 0.0, 4), ("unused", 0.0, 5)]
    letters = sorted({letter for word in WORDS for letter in word})
    rows += [(text, -float(rank), 1) for rank, text in enumerate([*WORDS, *letters])]
    return [Piece(*row) for row in rows]


def sentencepiece(folder: Path, base: Sequence[tuple[str, float, int]] = BASE) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(pieces(base)))


def gemma_sentencepiece(folder: Path) -> None:
    sentencepiece(folder, GEMMA_BASE)


def sentencepiece_like(base: Sequence[tuple[str, float, int]] = BASE) -> Callable[[Path], None]:
    """tokenizer.json with byte tokens and no tokenizer.model, and tokens added behind and inside the vocabulary."""

    def make(folder: Path) -> None:
        all_pieces = tuple(pieces(base))
        model = SentencePieceModel(all_pieces, "bpe", normalizes=False, adds_prefix=True)
        value: Json = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                "vocab": {piece.text: number for number, piece in enumerate(all_pieces)}, "merges": merges(model),
            },
        }  # fmt: skip
        tokenizer = Tokenizer.from_str(json.dumps(value))
        tokenizer.add_special_tokens([text for text, _, kind in base if kind != 4])
        tokenizer.add_special_tokens(["[INST]", "<|tool_call>"])
        tokenizer.add_tokens(["<extra>", "<turn|>"])
        tokenizer.save(str(folder / "tokenizer.json"))

    return make


DIGITS = (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
GPT2_STEPS = (pre_tokenizers.ByteLevel(add_prefix_space=False),)
SP: Json = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
IDS: Json = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GEMMA_SP: Json = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "tokenizer_class": "GemmaTokenizer"}
GEMMA_IDS: Json = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
DECODER: Json = {
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
        "305": {"content": "<|im_start|>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        "306": {"content": "▁hi▁", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        "307": {"content": "[CTRL]", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
    }
}
GEMMA_DECODER: Json = {
    "added_tokens_decoder": {key: entry for key, entry in DECODER["added_tokens_decoder"].items() if key != "0"}
}
PLAIN: Json = {"bos_token": END, "eos_token": IM_END, "tokenizer_class": "PreTrainedTokenizerFast"}
CASES: Mapping[str, Case] = {
    "llama 2": Case("LlamaForCausalLM", "llama", rules.LLAMA_RULES, sentencepiece, SP, IDS),
    "llama, prefix": Case(
        "LlamaForCausalLM", "llama", rules.LLAMA_RULES, sentencepiece,
        {**SP, **DECODER, "add_prefix_space": False, "add_bos_token": True, "add_eos_token": False}, IDS,
        {"added_tokens.json": {"<more>": 320}},
    ),
    "code llama": Case("LlamaForCausalLM", "llama", rules.LLAMA_RULES, sentencepiece, SP, IDS, size=32016),
    "granite code": Case(
        "LlamaForCausalLM", "llama", rules.LLAMA_RULES, byte_level(*DIGITS), PLAIN, size=49152
    ),
    "llama 3": Case(
        "LlamaForCausalLM", "llama", rules.LLAMA_RULES,
        byte_level(*split(LLAMA3), ignore_merges=True, first=END, bytes_after=True),
        {**PLAIN, "chat_template": TEMPLATE}, {"eos_token_id": [1, 5]},
    ),
    "mistral": Case("MistralForCausalLM", "mistral", rules.LLAMA_RULES, sentencepiece, {**SP, **DECODER}, IDS),
    "mixtral": Case("MixtralForCausalLM", "mixtral", rules.LLAMA_RULES, sentencepiece, SP, IDS),
    "smollm3": Case(
        "SmolLM3ForCausalLM", "smollm3", rules.LLAMA_RULES, byte_level(*split(LLAMA3), ignore_merges=True, first=END),
        PLAIN,
    ),
    "granite": Case("GraniteForCausalLM", "granite", rules.LLAMA_RULES, byte_level(*DIGITS, bytes_after=True), PLAIN),
    "qwen2": Case("Qwen2ForCausalLM", "qwen2", rules.QWEN_RULES, byte_level(*split(QWEN2), nfc=True, bytes_after=True)),
    "qwen2, bare": Case(
        "Qwen2ForCausalLM", "qwen2", rules.QWEN_RULES, vocabulary_and_merges,
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": IM_END, "pad_token": END}, {"eos_token_id": 1},
    ),
    "qwen3": Case("Qwen3ForCausalLM", "qwen3", rules.QWEN_RULES, byte_level(*split(QWEN2), nfc=True, bytes_after=True)),
    "qwen2-moe": Case("Qwen2MoeForCausalLM", "qwen2_moe", rules.BYTE_LEVEL_RULES, byte_level(*split(QWEN2), nfc=True)),
    "qwen3-moe": Case("Qwen3MoeForCausalLM", "qwen3_moe", rules.BYTE_LEVEL_RULES, byte_level(*split(QWEN2), nfc=True)),
    "qwen3-next": Case("Qwen3NextForCausalLM", "qwen3_next", rules.BYTE_LEVEL_RULES, byte_level(*split(QWEN2))),
    "qwen3.5": Case(
        "Qwen3_5ForCausalLM", "qwen3_5_text", rules.BYTE_LEVEL_RULES, byte_level(*split(QWEN35), nfc=True)
    ),
    "gemma": Case("GemmaForCausalLM", "gemma", rules.GEMMA_1_RULES, gemma_sentencepiece, GEMMA_SP, GEMMA_IDS),
    "gemma 2": Case(
        "Gemma2ForCausalLM", "gemma2", rules.GEMMA_RULES, gemma_sentencepiece, {**GEMMA_SP, **GEMMA_DECODER}, GEMMA_IDS
    ),
    "gemma 3": Case("Gemma3ForCausalLM", "gemma3_text", rules.GEMMA_RULES, gemma_sentencepiece, GEMMA_SP, GEMMA_IDS),
    "gemma 3n": Case(
        "Gemma3nForCausalLM", "gemma3n_text", rules.GEMMA_RULES, gemma_sentencepiece, GEMMA_SP,
        {**GEMMA_IDS, "vocab_size_per_layer_input": 500},
    ),
    "gemma 4": Case(
        "Gemma4ForCausalLM", "gemma4_text", rules.GEMMA_4_RULES, sentencepiece_like(GEMMA_BASE),
        {**GEMMA_SP, "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["[INST]", "<|tool_call>"]},
        GEMMA_IDS, size=0,
    ),
    "llama, tokenizer.json alone": Case(
        "LlamaForCausalLM", "llama", rules.LLAMA_RULES, sentencepiece_like(),
        {**SP, "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": ["[INST]"]}, IDS, size=0,
    ),
    "phi-2": Case("PhiForCausalLM", "phi", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, bytes_after=True)),
    "phi-3": Case("Phi3ForCausalLM", "phi3", rules.PHI_3_RULES, sentencepiece, {**SP, **DECODER}, IDS),
    "phi-4": Case(
        "Phi3ForCausalLM", "phi3", rules.PHI_3_RULES, byte_level(*split(LLAMA3)),
        {"bos_token": END, "eos_token": IM_END, "tokenizer_class": "GPT2Tokenizer"},
    ),
    "olmo 2": Case("Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*split(LLAMA3)), PLAIN),
    "stablelm": Case("StableLmForCausalLM", "stablelm", rules.BYTE_LEVEL_RULES, byte_level(*split(QWEN2)), PLAIN),
    "gpt2": Case("GPT2LMHeadModel", "gpt2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, bytes_after=True)),
    "gpt2, bare": Case("GPT2LMHeadModel", "gpt2", rules.BYTE_LEVEL_RULES, vocabulary_and_merges, None, IDS),
    "gpt-neox": Case("GPTNeoXForCausalLM", "gpt_neox", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, nfc=True)),
    "falcon": Case("FalconForCausalLM", "falcon", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, bytes_after=True)),
    "starcoder2": Case("Starcoder2ForCausalLM", "starcoder2", rules.BYTE_LEVEL_RULES, byte_level(*DIGITS)),
    "command-r": Case(
        "CohereForCausalLM", "cohere", rules.BYTE_LEVEL_RULES, byte_level(*DIGITS, nfc=True, first=END, last=IM_END),
        {
            "bos_token": {"__type": "AddedToken", "content": END, "special": True}, "eos_token": "<|user|>",
            "add_bos_token": True, "add_eos_token": False,
            "chat_template": [
                {"name": "default", "template": TEMPLATE},
                {"name": "tool-use", "template": "t"},
                {"name": "rag", "template": "r"},
            ],
        },
    ),
    "glm-4": Case("Glm4ForCausalLM", "glm4", rules.GLM_4_RULES, byte_level(*split(LLAMA3)), {"eos_token": "<|user|>"}),
    "exaone 4": Case("Exaone4ForCausalLM", "exaone4", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS), PLAIN),
    "ernie 4.5": Case(
        "Ernie4_5ForCausalLM", "ernie4_5", rules.ERNIE_RULES, sentencepiece,
        {**SP, **DECODER, "add_prefix_space": False}, IDS,
    ),
    "gpt-oss": Case("GptOssForCausalLM", "gpt_oss", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS), PLAIN),
    "templates in files": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS), PLAIN, {},
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": "r"},
    ),
    "a template in a file": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS), PLAIN, {},
        {"chat_template.jinja": TEMPLATE},
    ),
    "an older template file": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS), PLAIN, {},
        {"chat_template.json": {"chat_template": TEMPLATE}},
    ),
    "no tokenizer_config": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, first=END, last=IM_END), None, IDS
    ),
    "cls and sep": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, first=END, last=IM_END),
        {
            "cls_token": END, "sep_token": IM_END, "mask_token": "<tool>",
            "unk_token": {"__type": "AddedToken", "content": "<|user|>"},
        },
    ),
    "an end that is another": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, last=IM_END),
        {"bos_token": END, "eos_token": "<|user|>"},
    ),
    "ids in text_config": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, plain=True), PLAIN,
        {"text_config": {"pad_token_id": 3, "unk_token_id": 4}},
    ),
    "special tokens in a map": Case(
        "Olmo2ForCausalLM", "olmo2", rules.BYTE_LEVEL_RULES, byte_level(*GPT2_STEPS, plain=True),
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END}, {},
        {"special_tokens_map.json": {"unk_token": {"content": "a", "lstrip": False}, "pad_token": "b"}},
    ),
}  # fmt: skip
QWEN_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


def make(case: Case, folder: Path) -> int:
    """Write a case's folder; returns its vocabulary size."""
    folder.mkdir(parents=True)
    case.make(folder)
    size = case.size
    if not size:  # LlamaHfVocab pads nothing: the model has as many tokens as the tokenizer
        size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": size}
    given = {"architectures": [case.architecture], "model_type": case.model_type, **shape, **case.config}
    write_json(folder / "config.json", given)
    if case.tokenizer_config is not None:
        write_json(folder / "tokenizer_config.json", case.tokenizer_config)
    for name, value in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return size


def ours(folder: Path, size: int, family: TokenizerRules) -> Json:
    metadata = load_vocabulary(folder, size, family).metadata
    return {key: value for key, value in metadata.items() if not key.startswith("edgelora.")}


def theirs(root: Path, jobs: Sequence[Sequence[str]], work: Path) -> dict[str, Json]:
    """`set_vocab` of llama.cpp, by name: key to value, and arrays of names in order."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    answer = work / "answer.json"
    command = [sys.executable, str(WORKER), str(root), str(work / "jobs.json"), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert answer.is_file(), done.stderr[-2000:]
    found = json.loads(answer.read_text())
    failed = {name: said for name, said in found.items() if isinstance(said, str)}
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())
    return {name: {key: _ordered(key, value) for key, (_, value) in keys.items()} for name, keys in found.items()}


def _ordered(key: str, value: Any) -> Any:
    return sorted(value) if key == "tokenizer.chat_templates" else value  # there, a set's order


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Json, Json, Path]]:
    """Every case as ours and as theirs: one process for all, because importing torch takes longest."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    root, work = reference_root(), tmp_path_factory.mktemp("vocabularies")
    found, jobs = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        folder = work / str(number)
        found[name] = ours(folder, make(case, folder), case.rules), folder
        jobs.append([name, str(folder), case.architecture, str(found[name][0].get("tokenizer.ggml.pre"))])
    reference = theirs(root, jobs, work)
    return {name: (own, reference[name], folder) for name, (own, folder) in found.items()}


@pytest.mark.train
@pytest.mark.parametrize("name", CASES)
def test_every_key_and_value(name: str, converted: dict[str, tuple[Json, Json, Path]]) -> None:
    own, reference, _ = converted[name]
    assert set(own) - OURS_ALONE == set(reference)
    different = {key: (own[key], value) for key, value in reference.items() if own[key] != value}
    assert not different, {key: first_difference(*pair) for key, pair in different.items()}


def first_difference(one: Any, other: Any) -> Any:
    if not isinstance(one, list) or not isinstance(other, list):
        return one, other
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return at, one[at : at + 3], other[at : at + 3], len(one), len(other)


CHANGES: Mapping[str, tuple[str, Callable[[Json], object]]] = {
    "llama 2": ("tokenizer_config.json", lambda v: v.update(add_prefix_space=False)),
    "command-r": ("tokenizer_config.json", lambda v: v["chat_template"].pop()),
    "qwen2": ("tokenizer.json", lambda v: v["added_tokens"][-1].update(content="other")),
    "llama 3": ("tokenizer.json", lambda v: v.update(post_processor=None)),
    "phi-3": ("config.json", lambda v: v.update(pad_token_id=9)),
}


@pytest.mark.train
@pytest.mark.parametrize("name", CHANGES)
def test_another_folder_is_seen(name: str, converted: dict[str, tuple[Json, Json, Path]], tmp_path: Path) -> None:
    _, reference, folder = converted[name]
    case, (file, change) = CASES[name], CHANGES[name]
    size = make(case, tmp_path / "changed")
    value = json.loads((folder / file).read_text())
    change(value)
    write_json(tmp_path / "changed" / file, value)
    own = ours(tmp_path / "changed", size, case.rules)
    assert {key: value for key, value in own.items() if key not in OURS_ALONE} != reference


REAL: Mapping[str, tuple[str, str, TokenizerRules, Json, Sequence[str]]] = {
    "gpt2": ("GPT2LMHeadModel", "gpt2", rules.BYTE_LEVEL_RULES, {"vocab_size": 50257}, QWEN_FILES[:2]),
    "qwen2.5": (
        "Qwen2ForCausalLM", "qwen2", rules.QWEN_RULES, {"vocab_size": 151936, "eos_token_id": 151645}, QWEN_FILES,
    ),
    "llama2": ("LlamaForCausalLM", "llama", rules.LLAMA_RULES, {"vocab_size": 32000, **IDS}, ("tokenizer.model",)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.train
def test_vocabularies_that_people_have(tmp_path: Path) -> None:
    """Of these, llama.cpp's converter knows the hash."""
    root, jobs, found = reference_root(), [], {}
    for name, (architecture, model_type, family, config, files) in REAL.items():
        source, folder = SHARED / "tokenizers" / name, tmp_path / name
        if not source.is_dir():
            pytest.skip(f"{source} is not there")
        folder.mkdir()
        for file in files:
            (folder / file).write_bytes((source / file).read_bytes())
        write_json(folder / "config.json", {"architectures": [architecture], "model_type": model_type, **config})
        found[name] = ours(folder, config["vocab_size"], family)
        jobs.append([name, str(folder), architecture, "unknown"])
    for name, reference in theirs(root, jobs, tmp_path).items():
        assert {key: value for key, value in found[name].items() if key not in OURS_ALONE} == reference
        assert reference["tokenizer.ggml.pre"] == {"gpt2": "gpt-2", "qwen2.5": "qwen2", "llama2": "default"}[name]
