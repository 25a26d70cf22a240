"""What somebody asks of a quantization: the same for a Hugging Face base and for one in GGUF."""

from __future__ import annotations

from dataclasses import dataclass

from converters.imatrix import ImportanceMatrix
from converters.quant_types import Overrides


@dataclass(frozen=True)
class QuantizeOptions:
    """What to make, and how.

    Attributes:
        quant: a name of `quant_types.RECIPES`.
        overrides: types of tensors chosen by hand.
        imatrix: how strongly each column is used; IQ1 to IQ3 need it.
        imatrix_file: the matrix's file as it was given, for `quantize.imatrix.file`; "" for one that was just measured.
        strict: refuse weights that are NaN or infinite, which are otherwise written as they are, with a notice.
        untie: write the output as a tensor of its own where the model ties it to the embeddings.
        split_max_bytes: of the tensors in one file, 0 for no limit; see `split.plan_parts`.
        split_max_tensors: in one file, 0 for no limit.
        allow_requantize: quantize from types that have lost something already.
        threads: for quantization; None takes every core.
    """

    quant: str = "q4_k_m"
    overrides: Overrides | None = None
    imatrix: ImportanceMatrix | None = None
    imatrix_file: str = ""
    strict: bool = False
    untie: bool = False
    split_max_bytes: int = 0
    split_max_tensors: int = 0
    allow_requantize: bool = False
    threads: int | None = None
