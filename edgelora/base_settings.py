"""What `edgelora convert` can be told about a base. Light: the command line loads it for its own help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import SettingsError

DEFAULT_QUANT = "q4_k_m"


@dataclass(frozen=True)
class BaseSettings:
    """What `edgelora convert` can be told about a base.

    Attributes:
        quant: quantization (see `converters.quant_types`); None is `q4_k_m`.
        tensor_types: "EXPRESSION=TYPE" for single tensors; `output_type` and `embedding_type` for those two.
        pure: the quantization's default type for all tensors.
        imatrix: file of an importance matrix.
        calibrate: text or conversations to measure one on; `calibrate_adapter` is active then, and `calibrate_chunks`
            limits the windows of 512 tokens. `save_imatrix` keeps it.
        allow_requantize: quantize from types that have lost something already.
        untie: write the output as a tensor of its own.
        strict: refuse values that are NaN or infinite.
        split_max_size: of each file ("2G"), `split_max_tensors` in each.
        dry_run: plan and write nothing.
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
    dry_run: bool = False

    @property
    def quant_name(self) -> str:
        return (self.quant or DEFAULT_QUANT).lower()

    def check(self) -> None:
        """
        Raises:
            SettingsError: two settings that exclude or need one another.
        """
        checks = (
            (not (self.imatrix and self.calibrate), "--imatrix and --calibrate exclude one another: one is enough"),
            (not self.calibrate_adapter or self.calibrate, "--calibrate-adapter needs --calibrate"),
            (not self.calibrate_chunks or self.calibrate, "--calibrate-chunks needs --calibrate"),
            (not self.save_imatrix or self.calibrate, "--save-imatrix needs --calibrate"),
            (not (self.dry_run and self.calibrate), "--dry-run measures nothing: leave --calibrate out"),
        )
        if problems := [problem for ok, problem in checks if not ok]:
            raise SettingsError("; ".join(problems))
