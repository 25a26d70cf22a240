"""Packing: several short rows in one sequence, with attention and positions kept apart, and so with the same loss.

    input_ids      12 85  7  3 | 44 19  3 |  9 61 ...      whole rows, until `max_length` is full (best fit, TRL's)
    position_ids    0  1  2  3 |  0  1  2 |  0  1 ...
    labels          .  .  7  3 |  . 19  3 |  . 61 ...      the first of a row is no successor of the one before

From positions that begin anew, and no attention mask, transformers makes masks in blocks (`masking_utils`,
`find_packed_sequence_indices`), and flash attention the bounds of its sequences. Not every model goes through that:
some have layers that hand on a state (Mamba, linear attention), some make masks of their own. So that rows are kept
apart is proven on the model itself before it is trained (`require_rows_apart`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from edgelora.errors import SettingsError
from edgelora.train.data import IGNORED, TokenRow, TokenRows

LENGTHS = "seq_lengths"  # TRL's name
PROBE_TOKENS = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""How far logits may be from those of the row alone, as root mean squares: other shapes round otherwise. Where a row
sees the one before it, they are off by more than a tenth."""


@dataclass(frozen=True)
class PackedRow(TokenRow):
    """Whole rows one after another; `lengths` are theirs, in tokens, and `source` names them all."""

    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedRows:
    """Rows in sequences of at most `max_length` tokens, and as they were."""

    rows: list[PackedRow]
    unpacked: TokenRows

    @property
    def sources(self) -> list[str]:
        return [row.source for row in self.rows]

    def token_rows(self) -> list[TokenRow]:
        return self.unpacked.rows

    def columns(self) -> dict[str, list[list[int]]]:
        lengths = [list(row.lengths) for row in self.rows]
        return {
            "input_ids": [row.input_ids for row in self.rows],
            "labels": [row.labels for row in self.rows],
            LENGTHS: lengths,
        }

    def notes(self, name: str, max_length: int) -> list[str]:
        return self.unpacked.notes(name, max_length)

    def packing_note(self) -> str:
        return f"{len(self.unpacked.rows)} rows are packed into {len(self.rows)} sequences"


def packed(rows: TokenRows, max_length: int) -> PackedRows:
    """Whole rows in as few sequences as best fit decreasing takes.

    Args:
        rows: none longer than `max_length`.
    """
    numbers = [[index] * len(row.input_ids) for index, row in enumerate(rows.rows)]
    dataset = pack_dataset(Dataset.from_dict({**rows.columns(), "row": numbers}), max_length, strategy="bfd")
    return PackedRows([_packed_row(sequence, rows.sources) for sequence in dataset], rows)


def _packed_row(sequence: Mapping[str, Any], sources: Sequence[str]) -> PackedRow:
    names = dict.fromkeys(sources[index] for index in sequence["row"])
    return PackedRow(sequence["input_ids"], sequence["labels"], ", ".join(names), tuple(sequence[LENGTHS]))


class PackingCollator:
    """Batches of packed sequences, and of ones that are not packed as TRL makes those.

    Args:
        padding: the id to pad with.
        flat: all sequences of a batch as one, as flash attention wants them.
    """

    def __init__(self, padding: int, *, flat: bool) -> None:
        self._padding = padding
        self._flat = DataCollatorForLanguageModeling(pad_token_id=padding, padding_free=True) if flat else None
        self._unpacked = DataCollatorForLanguageModeling(pad_token_id=padding)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if LENGTHS not in examples[0]:
            return dict(self._unpacked(list(examples)))
        return dict(self._flat(list(examples))) if self._flat else self._beside(examples)

    def _beside(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One under another, each padded to the longest; every padding token is a sequence of its own."""
        longest = max(len(example["input_ids"]) for example in examples)
        shape = len(examples), longest
        input_ids, labels = torch.full(shape, self._padding), torch.full(shape, IGNORED)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(examples):
            n_tokens = len(example["input_ids"])
            input_ids[row, :n_tokens] = torch.tensor(example["input_ids"])
            labels[row, :n_tokens] = torch.tensor(example["labels"])
            position_ids[row, :n_tokens] = torch.cat([torch.arange(length) for length in example[LENGTHS]])
        labels[position_ids == 0] = IGNORED
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def collator_for(model: Any, padding: int) -> PackingCollator:
    """The collator for the attention that a model has."""
    return PackingCollator(padding, flat=_attention(model).startswith("flash_attention"))


def require_rows_apart(model: Any, rows: Sequence[TokenRow], collator: PackingCollator) -> None:
    """See on the model that a row's logits are the same behind another row as alone.

    Raises:
        SettingsError: they are not: its attention, or what it has in the place of that, cannot keep rows apart.
    """
    if len(rows) < 2:
        return
    first, second = (row.input_ids[:PROBE_TOKENS] for row in rows[:2])
    both = {"input_ids": first + second, "labels": first + second, LENGTHS: [len(first), len(second)]}
    alone = {"input_ids": second, "labels": second, LENGTHS: [len(second)]}
    try:
        behind = _logits(model, collator([both]))[len(first) :]
        wanted = _logits(model, collator([alone]))
    except (TypeError, ValueError) as error:  # a model that takes no positions
        raise _cannot(model, str(error).splitlines()[0]) from error
    if behind.shape != wanted.shape:
        raise _cannot(model, "it puts tokens of its own before a sequence")
    difference = float((behind - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    if not difference <= TOLERANCE[model.dtype]:
        raise _cannot(model, f"behind another row, a row's logits differ by {difference:.1%} from those of it alone")


def _cannot(model: Any, reason: str) -> SettingsError:
    return SettingsError(
        f"packing: {model.config.model_type} with {_attention(model)} attention does not keep rows apart: {reason}",
        hint="Leave out --packing, or try another --attention.",
    )


def _attention(model: Any) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "its own")


def _logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """float32 (n_tokens, n_vocab), of a batch of one sequence; the model is left as it was."""
    on_device = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    del on_device["labels"]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**on_device, use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
