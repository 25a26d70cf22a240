"""Rows in, rows out: a file of rows worked through by the engine, each row by the adapter it names.

A row has `prompt` or `messages`; it may have `id`, `adapter` (a loaded name, or a path), `scale`, `system`, the
sampling settings, and `metadata`, which is copied to the output. In CSV and Parquet, the columns are these fields; with
a prompt template (`Classify: {text}`) they are whatever the template names. OpenAI's batch files are read and answered
in their own shape (`edgelora.batch_formats`). A row that cannot be answered becomes an output row with an error, and
the work goes on.

Resuming. Every output row has a key of three parts: what the row said, what answered it (base, adapter content, the
run's settings), and how many rows each decode had. What is in the output already is not done again;
`edgelora.resumption` has the rules.

Results are reproducible: rows without a seed get one from their content, and no row depends on what ran before it or
beside it (`Request.deterministic`). So an interrupted and resumed batch ends with the same rows as the uninterrupted
one: as they were done, or with `ordered` in the order of the input. Memory does not grow with the rows: what there is
to do is kept in a temporary file (`edgelora.batch_ledger`), and a few hundred rows are read ahead.
"""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.batch_answers import Answer, Answers
from edgelora.batch_figures import BatchSummary, Figures, Progress
from edgelora.batch_input import rereadable
from edgelora.batch_ledger import Ledger, Selection
from edgelora.batch_rows import Defaults, Rows
from edgelora.engine.engine import Completion, Engine
from edgelora.errors import DataFileError
from edgelora.results import Results, open_results
from edgelora.resumption import reconcile

__all__ = ["BatchOptions", "BatchSummary", "Defaults", "Progress", "Selection", "run_batch"]

OnRow = Callable[[Mapping[str, Any], Progress], None]


@dataclass(frozen=True)
class BatchOptions:
    """How a batch is worked through.

    Attributes:
        ordered: output rows in the order of the input, and not as they are done.
        selection: which rows; all by default.
        redo: drop results that do not belong to this input, base, adapters and settings, and do them again.
        retry_errors: do rows again that ended in an error.
    """

    ordered: bool = False
    selection: Selection = field(default_factory=Selection)
    redo: bool = False
    retry_errors: bool = False


def run_batch(
    engine: Engine,
    input: Path | str,
    output: Path | str,
    *,
    defaults: Defaults | None = None,
    options: BatchOptions | None = None,
    on_row: OnRow | None = None,
) -> BatchSummary:
    """Answer every row of `input` that `output` does not hold yet.

    Args:
        engine: made with `reproducible=True` it answers many rows at once; otherwise one by one.
        input: JSONL, CSV or Parquet, by its suffix; `-` is JSONL on standard input.
        output: JSONL, appended to; `-` is standard output, which cannot be resumed.
        on_row: called with each output row and how far the batch is.

    Raises:
        SettingsError: a prompt template that cannot be used.
        DataFileError: a file cannot be read or written, is locked, or holds results of another batch.
        MissingExtraError: Parquet, without pyarrow.
        EdgeloraError: the engine cannot go on. What was written is kept.
    """
    options = options or BatchOptions()
    with rereadable(input) as source, Ledger(options.selection) as ledger:
        if str(output) != "-" and Path(output).exists() and Path(output).samefile(source):
            raise DataFileError(f"{output}: is the input too", hint="Name another output with -o.")
        batch = _Batch(engine, Rows(engine, source, str(input), defaults or Defaults()), ledger, options, on_row)
        try:
            return batch.run(output)
        except KeyboardInterrupt:
            where = "were written" if str(output) == "-" else f"are in {output}; run the same command to go on"
            raise KeyboardInterrupt(f"{batch.n_done} rows {where}") from None
        except sqlite3.Error as error:
            raise DataFileError(
                f"{tempfile.gettempdir()}: {error}",
                hint="The list of rows is kept there. Free some space, or set TMPDIR.",
            ) from None


class _Batch:
    """One run over one input."""

    def __init__(self, engine: Engine, rows: Rows, ledger: Ledger, options: BatchOptions, on_row: OnRow | None) -> None:
        self.engine, self.rows, self.ledger, self.options, self.on_row = engine, rows, ledger, options, on_row
        self.n_done = 0
        self.by_adapter: dict[str, Figures] = {}

    def run(self, output: Path | str) -> BatchSummary:
        start = time.perf_counter()
        self.rows.note(self.ledger)
        with open_results(output) as results:
            redo, retry_errors = self.options.redo, self.options.retry_errors
            reconcile(results.rows(), self.ledger, output, redo=redo, retry_errors=retry_errors)
            resumed, failed_before, total = self.ledger.n_done, self.ledger.n_failed, self.ledger.n_wanted
            self.n_done = resumed
            self._answer(results, total)
            if self.ledger.n_replaced:
                results.drop(self.ledger.replaced)
        seconds = time.perf_counter() - start
        summary = BatchSummary(total, resumed, failed_before, seconds, self.by_adapter)
        return BatchSummary(total, resumed, failed_before + summary.errors, seconds, self.by_adapter)

    def _answer(self, results: Results, total: int) -> None:
        start, errors, tokens = time.perf_counter(), 0, 0
        to_do = self.rows.to_do(self.ledger)
        answers = Answers(self.engine, to_do, self.rows.request, ordered=self.options.ordered)
        with closing(answers.each()) as stream:
            for answer in stream:
                row = self._row(answer)
                results.append(row)
                self.n_done += 1
                self.by_adapter.setdefault(answer.item.named.adapter, Figures()).add(answer)
                if isinstance(answer.reply, Completion):
                    tokens += answer.reply.completion_tokens
                else:
                    errors += 1
                if self.on_row:
                    self.on_row(row, Progress(self.n_done, total, errors, tokens, time.perf_counter() - start))

    def _row(self, answer: Answer) -> dict[str, Any]:
        shape, named, reply = self.rows.format, answer.item.named, answer.reply
        return shape.reply(named, reply) if isinstance(reply, Completion) else shape.error(named, reply)
