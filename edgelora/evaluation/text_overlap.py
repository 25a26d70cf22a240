"""How much of a reference a reply has: the same text, a part of it, its words, their order.

Token F1 is SQuAD's (arXiv:1606.05250, section 5; the official `evaluate-v1.1.py`), ROUGE-L is that of Lin 2004,
"ROUGE: A Package for Automatic Evaluation of Summaries" (https://aclanthology.org/W04-1013, section 3.1), with beta 1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")


def exact_match(reply: str, reference: str) -> float:
    """1 where both are the same text, but for white space around it."""
    return float(reply.strip() == reference.strip())


def contains(reply: str, reference: str) -> float:
    """1 where the reply has the reference's text in it, in whatever case and spacing."""
    return float(_plain(reference) in _plain(reply))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def squad_tokens(text: str) -> list[str]:
    """Words in small letters, without punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, whatever their order."""
    found, wanted = squad_tokens(reply), squad_tokens(reference)
    if not found or not wanted:
        return float(found == wanted)
    return _harmonic(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def rouge_tokens(text: str) -> list[str]:
    """Letters and digits that stand together, in small letters; for ASCII as the `rouge_score` package has them."""
    return _WORD.findall(text.casefold())


def rouge_l(reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence of words."""
    found, wanted = rouge_tokens(reply), rouge_tokens(reference)
    if not found or not wanted:
        return float(found == wanted)
    return _harmonic(common_subsequence(found, wanted), len(found), len(wanted))


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, a bit for each place of `one` (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited")."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(one)) - 1
    row = everything
    for word in other:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(one) - row.bit_count()


def _harmonic(shared: int, n_found: int, n_wanted: int) -> float:
    """F1 of `shared` among so many found and wanted ones."""
    return 2 * shared / (n_found + n_wanted)
