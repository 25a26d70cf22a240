"""What `edgelora convert` can be told about an adapter. Light: the command line loads it for its own help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.adapter import AdapterOptions


GENERAL = "general"


@dataclass(frozen=True)
class AdapterSettings:
    """What `edgelora convert` can be told about an adapter.

    Attributes:
        dtype: of its tensors: f16 (None), f32, bf16 or q8_0.
        rank: at most so many ranks for each tensor.
        max_error: of what is approximated or cut, as a share of the change; None is 0.01.
        allow_bin: read weights that were saved as a pickle; nothing in it is executed.
        initial: the adapter before its training, where its initialisation moved a part of the base into it.
        certify: record what Hugging Face and PEFT compute, on these conversations or on `GENERAL` prompts of our own,
            for `edgelora verify`.
        repair_rank: of ranks that repair a quantized base (`edgelora.repair`), for each tensor; None for no repair.
        repair_reference: the base before it was quantized; None finds it.
        repair_text: to measure on whether it helps.
    """

    dtype: str | None = None
    rank: int | None = None
    max_error: float | None = None
    allow_bin: bool = False
    initial: Path | None = None
    certify: Path | None = None
    repair_rank: int | None = None
    repair_reference: Path | None = None
    repair_text: Path | None = None

    def options(self) -> AdapterOptions:
        from converters.adapter import AdapterOptions

        usual = AdapterOptions()
        return AdapterOptions(
            dtype=self.dtype or usual.dtype,
            rank=self.rank,
            max_error=usual.max_error if self.max_error is None else self.max_error,
            allow_bin=self.allow_bin,
            initial=self.initial,
        )

    def given(self) -> list[str]:
        """Options that were used."""
        usual = AdapterSettings()
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(usual, field.name)]
        return [f"--{name.replace('_', '-')}" for name in names]
