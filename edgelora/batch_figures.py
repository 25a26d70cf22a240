"""How a batch goes, and how it went: counts, rates and distributions, for each adapter. Small, however many rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgelora.batch_answers import Answer
from edgelora.engine.engine import Completion


class Distribution:
    """Numbers from 0 up, to three digits: at most 900 different ones for each power of ten."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        self._counts[float(f"{value:.3g}")] += 1

    @property
    def count(self) -> int:
        return self._counts.total()

    def percentile(self, percent: float) -> float:
        """The smallest of the numbers that so many percent do not exceed; 0 where there are none."""
        wanted, seen = percent / 100 * self.count, 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                return value
        return 0.0

    def bins(self, edges: Sequence[float]) -> list[int]:
        """How many are below each of the `edges` and not below the one before it. The last edge counts as inside."""
        counts = [0] * (len(edges) - 1)
        for value, count in self._counts.items():
            place = next((i for i, edge in enumerate(edges[1:]) if value < edge), len(counts) - 1)
            counts[place] += count
        return counts

    @property
    def most(self) -> float:
        return max(self._counts, default=0.0)


@dataclass
class Figures:
    """What one adapter's rows of this run came to.

    Attributes:
        latency: seconds from a row's place in the engine to the end of its reply.
        lengths: completion tokens of each reply.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency: Distribution = field(default_factory=Distribution)
    lengths: Distribution = field(default_factory=Distribution)

    def add(self, answer: Answer) -> None:
        self.rows += 1
        if not isinstance(answer.reply, Completion):
            self.errors += 1
            return
        self.prompt_tokens += answer.reply.prompt_tokens
        self.completion_tokens += answer.reply.completion_tokens
        self.latency.add(answer.seconds)
        self.lengths.add(answer.reply.completion_tokens)


@dataclass(frozen=True)
class Progress:
    """How far a batch is.

    Attributes:
        done: rows done, those of earlier runs among them.
        total: rows there are to do, and were.
        errors, completion_tokens, seconds: of this run.
    """

    done: int
    total: int
    errors: int
    completion_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class BatchSummary:
    """How a batch went.

    Attributes:
        rows: of the input that were selected.
        resumed: rows that an earlier run had done.
        all_errors: error rows of the output, those of earlier runs included.
        by_adapter: this run's rows, by what they call their adapter.
    """

    rows: int
    resumed: int
    all_errors: int
    seconds: float
    by_adapter: Mapping[str, Figures]

    @property
    def written(self) -> int:
        return sum(figures.rows for figures in self.by_adapter.values())

    @property
    def errors(self) -> int:
        return sum(figures.errors for figures in self.by_adapter.values())

    @property
    def prompt_tokens(self) -> int:
        return sum(figures.prompt_tokens for figures in self.by_adapter.values())

    @property
    def completion_tokens(self) -> int:
        return sum(figures.completion_tokens for figures in self.by_adapter.values())

    def table(self) -> list[list[str]]:
        """A header, a line for each adapter, and what they sum up to; all but the first column are numbers."""
        lines = [[name, *self._numbers(figures)] for name, figures in sorted(self.by_adapter.items())]
        total = Figures(self.written, self.errors, self.prompt_tokens, self.completion_tokens)
        lines += [["all", *self._numbers(total)]] if len(lines) > 1 else []
        return [["adapter", "rows", "errors", "prompt tokens", "completion tokens", "tokens/s"], *lines]

    def _numbers(self, figures: Figures) -> list[str]:
        counts = (figures.rows, figures.errors, figures.prompt_tokens, figures.completion_tokens)
        return [*(f"{count:,}" for count in counts), f"{self.per_second(figures.completion_tokens):,.1f}"]

    def per_second(self, tokens: int) -> float:
        """Tokens over the whole run's time, so that adapters add up."""
        return tokens / self.seconds if self.seconds else 0.0


def round_edges(most: float, least_step: float = 0.0, n_bins: int = 24) -> list[float]:
    """Edges of at most `n_bins` equal bins from 0 to `most` or a little more, at round numbers."""
    step = max(most / n_bins, least_step, 1e-6)
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= step * 0.999999)
    n_steps = max(1, math.floor(most / step + 1e-9) + 1)
    return [round(step * i, 9) for i in range(n_steps + 1)]
