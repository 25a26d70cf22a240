"""Which of llama.cpp's pre-tokenizers cuts text as a `tokenizer.json` does.

llama.cpp compiles its regular expressions in and picks them by a name in the file (`llm_tokenizer_bpe` and
`llama_vocab::impl::load`, src/llama-vocab.cpp). `CUTS` says what each name does, in the spelling of Hugging Face where
llama.cpp only translated it (`(?i:'s)` is `'[sS]` there), in llama.cpp's own where it does something else.

Measured over all of Unicode: the two libraries' letters, digits and spaces are the same but for 80 digits of Unicode
16, which llama.cpp does not know yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, DIGITS3 = r"\p{N}", r"\p{N}{1,3}"
LLAMA3 = CONTRACTIONS + "|" + LETTERS + "|" + DIGITS3 + OTHERS + SPACES
QWEN2 = CONTRACTIONS + "|" + LETTERS + "|" + DIGIT + OTHERS + SPACES
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES
UFAKZEKA = LETTERS + "|" + DIGIT + OTHERS + SPACES
MINICPM5 = CONTRACTIONS + "|" + LETTERS + r"|\p{N}+" + OTHERS + SPACES
SEED_CODER = CONTRACTIONS + "|" + LETTERS + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES
JAIS2 = (
    CONTRACTIONS + "|" + LETTERS + "|" + DIGITS3 + OTHERS + r"|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)"
    r"|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)
EXAONE_MOE = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
BAILING = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" + LETTERS + r"|\p{N}" + OTHERS + r"|\s*[\r\n]|\s+(?!\S)|\s+"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + SPACES
)
WIDE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# llama.cpp's own: the letters' case is guessed from ASCII, and marks are no letters
_LOWER, _UPPER = r"((?=[\p{L}])([^A-Z]))", r"((?=[\p{L}])([^a-z]))"
_CASED_1, _CASED_2 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
TEKKEN = _CASED_1 + "|" + _CASED_2 + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
GPT4O = _CASED_1 + CONTRACTIONS + "?|" + _CASED_2 + CONTRACTIONS + r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"

# other ways to write the same expression; the key is what a tokenizer.json may say
SPELLINGS: Mapping[str, str] = {
    GPT2.removesuffix(r"|\s+"): GPT2,  # what it leaves out, a space before a word, is a piece of its own either way
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    **{
        expression.replace(CONTRACTIONS, written): expression
        for expression in (LLAMA3, QWEN2, QWEN35, MINICPM5, SEED_CODER, JAIS2, EXAONE_MOE)
        for written in (r"'(?i:[sdmt]|ll|ve|re)", r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
    },
}


@dataclass(frozen=True)
class Cut:
    """How text is cut before merges.

    Attributes:
        steps: regular expressions, each cutting what the one before left.
        ignore_merges: a whole word in the vocabulary is one token at once.
        adds_bos: llama.cpp puts the bos token first where the file does not say otherwise.
    """

    steps: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


def _named(*rows: tuple[Cut, str]) -> dict[str, Cut]:
    return {name: cut for cut, names in rows for name in names.split()}


# The first name of a cut is the one for a tokenizer that no hash is known of.
CUTS: Mapping[str, Cut] = _named(
    (
        Cut((GPT2,)),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais",
    ),
    (Cut((GPT2,)), "trillion granite-docling exaone4"),
    (Cut((DIGIT, GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (Cut((LLAMA3,), ignore_merges=True, adds_bos=True), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0"),
    (Cut((LLAMA3,), ignore_merges=True, adds_bos=True), "lfm2 jina-v5-nano"),
    (Cut((LLAMA3,)), "smaug-bpe dbrx chatglm-bpe"),
    (Cut((LLAMA3,), ignore_merges=True), "glm4 glm5"),
    (Cut((QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2"),
    (Cut((QWEN35,)), "qwen35"),
    (Cut((UFAKZEKA,)), "ufakzeka"),
    (Cut((DIGITS3, MINICPM5), ignore_merges=True), "minicpm5"),
    (Cut((SEED_CODER,)), "seed-coder"),
    (Cut((JAIS2,)), "jais-2"),
    (Cut((EXAONE_MOE,)), "exaone-moe"),
    (Cut((DIGITS3, CJK, DEEPSEEK3)), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (Cut((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", WIDE, DIGIT)), "deepseek-coder"),
    (Cut((_PUNCTUATION, GPT2, "[0-9][0-9][0-9]")), "falcon"),
    (Cut((BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (Cut((TEKKEN,), ignore_merges=True, adds_bos=True), "tekken"),
    (Cut((GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (Cut((r" ?[^(\s|.,!?…。，、।۔،)]+",)), "poro-chat bloom gpt3-finnish"),
    (Cut((r" ?[^(\s|.,!?…。，、।۔،)]+", DIGIT)), "viking"),
)
ADDS_BOS = {name for name, cut in CUTS.items() if cut.adds_bos} | {"chameleon"}


def cut_of(tokenizer: Json) -> Cut | None:
    """What a byte-level BPE `tokenizer.json` does, or None where it is not a matter of regular expressions."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return Cut(steps, bool(tokenizer["model"].get("ignore_merges"))) if steps else None


def name_of(cut: Cut) -> str | None:
    """The name of what llama.cpp does equally, or None."""
    equal = (
        name for name, other in CUTS.items() if (other.steps, other.ignore_merges) == (cut.steps, cut.ignore_merges)
    )
    return next(equal, None)


def _steps(pre_tokenizer: Json | None) -> tuple[str, ...] | None:
    """The regular expressions in order, or None for a step that is not one, or bytes that are not made last."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if [number for number, part in enumerate(parts) if part.get("type") == "ByteLevel"] != [len(parts) - 1]:
        return None  # without it, or before other steps, text does not reach the merges as llama.cpp's bytes do
    steps: tuple[str, ...] = ()
    for part in parts:
        step = _step(part)
        if step is None:
            return None
        steps += step
    return steps


def _step(part: Json) -> tuple[str, ...] | None:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return (GPT2,) if part.get("use_regex", True) else ()
    if kind == "Digits" and part.get("individual_digits"):
        return (DIGIT,)
    if kind == "Split" and "Regex" in part.get("pattern", {}):
        keeps_all = (part.get("behavior"), bool(part.get("invert"))) in {("Isolated", False), ("Removed", True)}
        expression = part["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n")
        return (SPELLINGS.get(expression, expression),) if keeps_all else None
    return None
