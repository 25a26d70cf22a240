"""Classification: the references of all rows are the labels, and every reply is one of them or none.

A reply is a label where it says it, but for case, spacing and punctuation around it; or where it has just one of them
in it, as whole words ("The category is card_arrival."). Of labels inside one another ("card", "card_arrival") the
longer one counts, and a number is no part of another one ("3" of "-3" or "3.5").
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NO_LABEL = "(no label)"
# A whole word; of a number, no part of one with a sign, a fraction or thousands.
_BEFORE = r"(?<!\w)(?:(?!\d)|(?<!\d[.,])(?<!^-)(?<!\s-))"
_AFTER = r"(?!\w)(?:(?<!\d)|(?![.,]\d))"
_AROUND = " \t\r\n.,;:!?'\"`*()[]{}<>"


class Labels:
    """The labels of a data set.

    Args:
        references: one for each row.
    """

    def __init__(self, references: Sequence[str]) -> None:
        self.names = sorted({_trimmed(reference) for reference in references})
        self._by_key = {_key(name): name for name in self.names}
        longest_first = sorted(filter(None, self._by_key), key=len, reverse=True)
        any_label = "|".join(map(re.escape, longest_first))
        self._inside = re.compile(rf"{_BEFORE}(?:{any_label}){_AFTER}" if any_label else r"(?!)")

    def of(self, text: str) -> str:
        """The label that a text says, `NO_LABEL` for none or several."""
        key = _key(text)
        if key in self._by_key:
            return self._by_key[key]
        found = set(self._inside.findall(key))
        return self._by_key[found.pop()] if len(found) == 1 else NO_LABEL


def _trimmed(text: str) -> str:
    return text.strip(_AROUND) or text.strip()


def _key(text: str) -> str:
    return " ".join(_trimmed(text).casefold().split())


@dataclass(frozen=True)
class Confusion:
    """What a variant said for which label.

    Attributes:
        counts: (label, said) to how many rows; `said` may be `NO_LABEL`.
    """

    labels: tuple[str, ...]
    counts: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, labels: Labels, pairs: Sequence[tuple[str, str]]) -> Confusion:
        """Of (reference, reply) pairs."""
        counts = Counter((labels.of(reference), labels.of(reply)) for reference, reply in pairs)
        return cls(tuple(labels.names), counts)

    @property
    def recalls(self) -> dict[str, float]:
        """Of each label, the share of its rows that were said to have it."""
        totals: Counter[str] = Counter()
        for (label, _), count in self.counts.items():
            totals[label] += count
        return {label: self.counts.get((label, label), 0) / total for label, total in totals.items()}

    @property
    def macro_f1(self) -> float:
        """The mean of the labels' F1, each counting as much whatever its number of rows."""
        said: Counter[str] = Counter()
        wanted: Counter[str] = Counter()
        for (label, answer), count in self.counts.items():
            wanted[label] += count
            said[answer] += count
        scores = [2 * self.counts.get((name, name), 0) / (wanted[name] + said[name]) for name in wanted]
        return sum(scores) / len(scores) if scores else 0.0

    def mistakes(self, most: int) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: label, what was said, how often."""
        wrong = [(label, said, count) for (label, said), count in self.counts.items() if label != said]
        return sorted(wrong, key=lambda each: (-each[2], each[0], each[1]))[:most]
