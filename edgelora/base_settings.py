"""What `edgelora convert` can be told about a base. Light: the command line loads it for its own help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import SettingsError

if TYPE_CHECKING:
    from converters.type_overrides import Overrides

DEFAULT_QUANT = "q4_k_m"


@dataclass(frozen=True)
class BaseSettings:
    """What `edgelora convert` can be told about a base.

    Attributes:
        quant: quantization (see `converters.quant_types`); None is `q4_k_m`.
        tensor_types: "EXPRESSION=TYPE" for single tensors; `output_type` and `embedding_type` for those two.
        pure: the quantization's default type for all tensors.
        imatrix: file of an importance matrix.
        calibrate: text or conversations to measure one on; `calibrate_adapter` (a GGUF file or a PEFT folder) is active
            then, and `calibrate_chunks` limits the windows of 512 tokens. `save_imatrix` keeps it.
        allow_requantize: quantize from types that have lost something already.
        untie: write the output as a tensor of its own; a GGUF base then keeps its types where `quant` is None.
        strict: refuse values that are NaN or infinite.
        split_max_size: of each file ("2G"), `split_max_tensors` in each.
        check: text to compare the perplexity before and after on (`base_conversion.check_perplexity`); `check_chunks`
            limits its windows.
        merge: adapters to merge into it, one after another; a GGUF base then keeps its types where `quant` is None.
        dry_run: plan, measure and write nothing.
    """

    quant: str | None = None
    tensor_types: tuple[str, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    imatrix: Path | None = None
    calibrate: Path | None = None
    calibrate_adapter: Path | None = None
    calibrate_chunks: int | None = None
    save_imatrix: Path | None = None
    allow_requantize: bool = False
    untie: bool = False
    strict: bool = False
    split_max_size: str = ""
    split_max_tensors: int = 0
    check: Path | None = None
    check_chunks: int | None = None
    merge: tuple[AdapterRef, ...] = ()
    dry_run: bool = False

    @property
    def keeps_types(self) -> bool:
        """Nothing was said about the types of tensors: a GGUF base that is only untied or merged into keeps its own."""
        named = (self.quant, self.tensor_types, self.output_type, self.embedding_type, self.pure)
        return bool(self.merge or self.untie) and not any(named)

    @property
    def quant_name(self) -> str:
        return (self.quant or DEFAULT_QUANT).lower()

    def overrides(self) -> Overrides | None:
        """Types chosen by hand, None where there are none.

        Raises:
            UnsupportedError: an unknown type, or an expression that cannot be read.
        """
        from converters.type_overrides import Overrides, parse_tensor_types

        chosen = Overrides(parse_tensor_types(self.tensor_types), self.output_type, self.embedding_type, self.pure)
        return None if chosen == Overrides() else chosen

    def split_max_bytes(self) -> int:
        """`split_max_size` in bytes, 0 without a limit.

        Raises:
            UnsupportedError: it is no size.
        """
        from converters.split import parse_size

        return parse_size(self.split_max_size) if self.split_max_size else 0

    def verify(self) -> None:
        """What can be known before the source is looked at, or downloaded.

        Raises:
            SettingsError: unknown types, or settings that exclude or need one another; all of them.
        """
        checks = (
            (not (self.imatrix and self.calibrate), "--imatrix and --calibrate exclude one another: one is enough"),
            (not self.calibrate_adapter or self.calibrate, "--calibrate-adapter needs --calibrate"),
            (not self.calibrate_chunks or self.calibrate, "--calibrate-chunks needs --calibrate"),
            (not self.save_imatrix or self.calibrate, "--save-imatrix needs --calibrate"),
            (not self.check_chunks or self.check, "--check-chunks needs --check"),
        )
        problems = [problem for ok, problem in checks if not ok]
        refused = [*_refusals(self.overrides, self.split_max_bytes)]
        if problems or refused:
            hint = next((hint for _, hint in refused if hint), "")
            raise SettingsError("; ".join([*problems, *(message for message, _ in refused)]), hint=hint)


def _refusals(*readings: Callable[[], object]) -> Iterator[tuple[str, str]]:
    """Message and hint of each reading that fails."""
    from converters.errors import ConversionError

    for read in readings:
        try:
            read()
        except ConversionError as error:
            yield error.message, error.hint
