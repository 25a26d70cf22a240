"""What llama.cpp's own tokenizer would do otherwise than the tokenizer of training, and a text that shows it.

Each difference is read off the structure of the two; the text is looked for afterwards, with a twin of llama.cpp's
tokenizer: the same vocabulary behind the expressions that llama.cpp has for a name, or its SentencePiece in short.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from gguf.constants import TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers

from converters.pretokenizer_hashes import NAME_OF_HASH
from converters.pretokenizers import CUTS, Cut, cut_of, name_of
from converters.tokenizer_file import TokenizerFile

Json = Mapping[str, Any]
Encode = Callable[[str], list[int]]
# llama.cpp makes a token with one of these texts a control token, whatever the file says (load, src/llama-vocab.cpp)
ALWAYS_CONTROL = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>",
    "[EOT]", "<end_of_utterance>", "<|eom_id|>", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>",
    "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>",
    "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>",
    "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>", "<|return|>", "<|call|>", "<|flush|>",
    "<|calls|>", "</s>", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
))  # fmt: skip
LONGEST_OVERLAP = 256  # of added tokens that is looked for, in characters: no vocabulary comes near it
ORDINARY_END = {"<|tool_response>", "<|plamo:eos|>"}  # beside one of these, it leaves </s> as it is
SAMPLES = (
    "Hello world", " two  spaces   three", "it's we'LL o'clock 'tis", "1 12 123 1234 12345 3.14", "a\n\nb\r\n\tc \n d",
    "x = f(y)[0] != {'k': 1}; // z", "e\u0301 n\u0303 o\u0308", "ÉCOLE École écoleÉ", "Привет мир", "日本語のテキスト",
    "한국어 텍스트", "हिन्दी ไทย العربية", "😀 👩\u200d👩\u200d👧 🇩🇪", "½ ² Ⅷ ٣٤", "a\u00a0b\u3000c", "\n" * 40,
    " " * 90, "naïve café", "tag <b>bold</b>", "https://a.b/c?d=e%20f", "CamelCase snake_case UPPER",
)  # fmt: skip


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode`, github.com/openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def pretokenizer_name(file: TokenizerFile) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer cuts text, by its hash or else by its steps; None for neither."""
    if name := NAME_OF_HASH.get(file.hash):
        return name
    cut = cut_of(file.as_read)
    if cut is None:
        return None
    other = name_of(replace(cut, ignore_merges=not cut.ignore_merges))
    return name_of(cut) or (other if other and _merges_make_every_token(file, cut) else None)


def byte_level_differences(file: TokenizerFile, name: str | None) -> list[str]:
    """What llama.cpp's BPE under a pre-tokenizer's name does otherwise than a byte-level tokenizer.

    Args:
        name: None where no name is known for it.
    """
    model, normalizer = file.model, file.as_read.get("normalizer")
    missing = _missing_bytes(file)
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    checks = (
        (normalizer is None, f"it normalizes text ({_kinds(normalizer)})"),
        (_cuts_equally(file, name), _cut_reason(file, name)),
        (
            not missing,
            f"{len(missing)} of 256 bytes are not in its vocabulary ({', '.join(map(hex, missing[:3]))} ...)",
        ),
        (not any(affixes) and not model.get("dropout"), "its BPE has affixes or dropout"),
        (
            adds_only_ends(file.as_read.get("post_processor")),
            "its post-processor does more than add a first and a last token",
        ),
    )
    return [*(reason for ok, reason in checks if not ok), *added_differences(file)]


def _missing_bytes(file: TokenizerFile) -> list[int]:
    """Those without a token that text can hold: UTF-8 has no 0xC0, 0xC1, and none from 0xF5."""
    symbol_of = byte_symbols()
    return [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1) and symbol_of[byte] not in file.vocab]


def added_differences(file: TokenizerFile) -> list[str]:
    """What llama.cpp does otherwise with added tokens in text."""
    flags = [token.content for token in file.added.values() if token.lstrip or token.rstrip or token.single_word]
    plain = _promoted(file)
    crossing = _crossing([token.content for token in file.added.values()])
    checks = (
        (not flags, f"the added token {flags[0]!r} takes the spaces around it" if flags else ""),
        (not plain, f"{plain[0]!r} is an ordinary word of it" if plain else ""),
        (
            not crossing,
            f"its added tokens {crossing} can overlap in text, and llama.cpp takes the longer" if crossing else "",
        ),
    )
    return [reason for ok, reason in checks if not ok]


def _promoted(file: TokenizerFile) -> list[str]:
    """Ordinary tokens that llama.cpp takes for control tokens by their text."""
    spared = {"</s>"} if ORDINARY_END & set(file.vocab) else set()
    found = (ALWAYS_CONTROL - spared) & set(file.vocab)
    return sorted(token for token in found if file.vocab[token] not in file.added)


def _crossing(tokens: Sequence[str]) -> str:
    """Two tokens of which one ends as a longer one begins: Hugging Face takes the first in a text, llama.cpp that."""
    starts: dict[str, str] = {}
    for token in sorted(tokens, key=len):
        starts |= {token[:length]: token for length in range(1, min(len(token), LONGEST_OVERLAP))}
    for token in tokens:
        for length in range(1, min(len(token), LONGEST_OVERLAP)):
            other = starts.get(token[-length:], "")
            if len(other) > len(token) and len(set(token + other)) > 1:
                return f"{token!r} and {other!r}"
    return ""


def _kinds(normalizer: Json | None) -> str:
    parts = normalizer.get("normalizers", [normalizer]) if normalizer else []
    return ", ".join(str(part.get("type")) for part in parts)


def _cuts_equally(file: TokenizerFile, name: str | None) -> bool:
    own, other = cut_of(file.as_read), CUTS.get(name or "")
    if own is None or other is None or own.steps != other.steps:
        return False
    return own.ignore_merges == other.ignore_merges or _merges_make_every_token(file, own)


def _merges_make_every_token(file: TokenizerFile, cut: Cut) -> bool:
    """Whether `ignore_merges` is without effect: merges alone lead every token's text to that token."""
    with recut(file.tokenizer, replace(cut, ignore_merges=False)):
        model: Any = file.tokenizer.model
        return all(
            [piece.id for piece in model.tokenize(token)] == [number]
            for token, number in file.vocab.items()
            if number not in file.added
        )


def _cut_reason(file: TokenizerFile, name: str | None) -> str:
    if name is None:
        return (
            "llama.cpp has no pre-tokenizer that cuts text as it does "
            f"(hash {file.hash}; a name for it goes into NAME_OF_HASH, converters/pretokenizer_hashes.py)"
        )
    return f"llama.cpp's pre-tokenizer {name!r} is not known to cut all text as its own does"


def adds_only_ends(processor: Json | None) -> bool:
    parts = [processor] if processor else []
    if processor and processor.get("type") == "Sequence":
        parts = processor.get("processors", [])
    for part in parts:
        if part.get("type") == "TemplateProcessing":
            kinds = ["A" if "Sequence" in item else "special" for item in part.get("single", [])]
            if kinds not in (["A"], ["special", "A"], ["A", "special"], ["special", "A", "special"]):
                return False
        elif part.get("type") != "ByteLevel":
            return False
    return True


@contextmanager
def recut(tokenizer: Any, cut: Cut) -> Iterator[None]:
    """The tokenizer cuts as llama.cpp does, for a while: a second one would take as much memory again."""
    before = tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model.ignore_merges
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in cut.steps]
    tokenizer.normalizer, tokenizer.model.ignore_merges = None, cut.ignore_merges
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    try:
        yield
    finally:
        tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model.ignore_merges = before


def byte_level_example(file: TokenizerFile, name: str) -> str:
    """A sentence with a text that llama.cpp would cut otherwise under a pre-tokenizer's name; "" if none is found."""
    if name not in CUTS:
        return ""
    tokenizer = _with_promoted(file)

    def encode(text: str) -> list[int]:
        with recut(tokenizer, CUTS[name]):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return _example(file, encode)


def gemma4_differences(file: TokenizerFile) -> list[str]:
    """What llama.cpp's BPE for Gemma 4 does otherwise: it puts ▁ for spaces and cuts lines from line breaks."""
    normalizer, cut, model = file.as_read.get("normalizer") or {}, file.as_read.get("pre_tokenizer") or {}, file.model
    replaces = (normalizer.get("type"), normalizer.get("pattern"), normalizer.get("content"))
    whole = not cut or (cut.get("type"), cut.get("pattern")) == ("Split", {"String": " "})  # no space is left by then
    mixed = sorted(token for token in file.vocab if "\n" in token and token.strip("\n"))
    breaks = [token for token in file.vocab if not token.strip("\n")]
    tokenizer: Any = file.tokenizer
    unmade = [token for token in breaks if len(tokenizer.model.tokenize(token)) != 1]
    spaced = [token.content for token in file.added.values() if {" ", "▁"} & set(token.content)]
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in file.vocab]
    checks = (
        (replaces == ("Replace", {"String": " "}, "▁"), "it does more to text than to put ▁ for spaces"),
        (whole, "it cuts text before it merges"),
        (not mixed, f"its token {mixed[0]!r} crosses a line break" if mixed else ""),
        (not unmade, f"its merges do not make {unmade[0]!r} of line breaks" if unmade else ""),
        (not spaced, f"its added token {spaced[0]!r} has spaces" if spaced else ""),
        (not missing, f"{len(missing)} of 256 byte tokens are missing"),
        (not model.get("ignore_merges") and not model.get("dropout"), "its BPE has dropout or ignores merges"),
    )
    return [*(reason for ok, reason in checks if not ok), *added_differences(file)]


def gemma4_example(file: TokenizerFile) -> str:
    """A sentence with a text that llama.cpp would cut otherwise: it takes an ordinary token for a control token."""
    twin = _with_promoted(file)
    return _example(file, lambda text: list(twin.encode(text, add_special_tokens=False).ids))


def _with_promoted(file: TokenizerFile) -> Any:
    promoted = _promoted(file)
    if not promoted:
        return file.tokenizer
    twin: Any = Tokenizer.from_str(file.text)
    twin.add_special_tokens(promoted)
    return twin


def _example(file: TokenizerFile, llama_cpp: Encode) -> str:
    for text in (*SAMPLES, *_with_added(file)):
        own, other = file.tokenizer.encode(text, add_special_tokens=False).ids, llama_cpp(text)
        if own != other:
            return f"For example, {_short(text)} is {_pieces(file, own)} and would be {_pieces(file, other)}"
    return ""


def _with_added(file: TokenizerFile) -> list[str]:
    tokens = [token.content for token in list(file.added.values())[:64]]
    tokens += _promoted(file)
    return [text for token in tokens for text in (f"{token}a", f"a {token} b", f"<b>{token}</b>")]


def _short(text: str) -> str:
    return repr(text) if len(text) <= 32 else f"{len(text)} times {text[0]!r}"


def _pieces(file: TokenizerFile, ids: Sequence[int]) -> str:
    shown = [str(file.tokenizer.id_to_token(number)) for number in ids[:12]]
    return f"[{' '.join(shown)}{' ...' if len(ids) > 12 else ''}]"


def sentencepiece_example(
    file: TokenizerFile, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, prefix: bool
) -> str:
    """The same against llama.cpp's SentencePiece (`llm_tokenizer_spm_session` and `tokenize`, src/llama-vocab.cpp)."""
    ids = {token: number for number, token in enumerate(tokens)}
    whole = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    special = sorted((token for token, kind in zip(tokens, types, strict=True) if kind in whole), key=len, reverse=True)
    cut = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def encode(text: str) -> list[int]:
        found: list[int] = []
        position, after_special = 0, True
        for match in [*cut.finditer(text), None]:
            part = text[position : match.start() if match else len(text)]
            if part:
                found += _merged((" " if prefix and after_special else "") + part, ids, scores)
                after_special = False
            if match:
                found.append(ids[match[0]])
                position, after_special = match.end(), True
        return found

    return _example(file, encode)


def _merged(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """Neighbours joined while they make a token, the highest score first and then the leftmost."""
    parts: list[str] = list(text.replace(" ", "▁"))
    after = [*range(1, len(parts)), -1]
    before = [-1, *range(len(parts) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (number := ids.get(parts[left] + parts[right])) is not None:
            heapq.heappush(queue, (-scores[number], left, right, parts[left] + parts[right]))

    for right in range(1, len(parts)):
        offer(right - 1, right)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not parts[left] or not parts[right] or parts[left] + parts[right] != joined or after[left] != right:
            continue
        parts[left], parts[right], after[left] = joined, "", after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return list(_numbers(parts, ids))


def _numbers(parts: Iterable[str], ids: Mapping[str, int]) -> Iterable[int]:
    for part in filter(None, parts):
        if part in ids:
            yield ids[part]
        else:
            yield from (ids.get(f"<0x{byte:02X}>", 0) for byte in part.encode("utf-8", errors="replace"))
