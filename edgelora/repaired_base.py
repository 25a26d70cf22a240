"""An adapter that repairs a quantization belongs to those very weights, and not to its base in general."""

from __future__ import annotations

from pathlib import Path

from edgelora.contract import Contract


def other_weights(contract: Contract, base: Path) -> str:
    """Why an adapter's repair is of no use on a base; empty where it repairs these weights, or none.

    On another quantization the ranks would not take its error away, but add that of the one they were made for: so it
    is refused, and `--force` is for those who want to see it.

    Args:
        base: a GGUF file, or a Hugging Face folder, whose weights were never quantized.
    """
    from converters.base_file import read_base_header
    from converters.errors import FormatError
    from converters.repair import weights_hash

    if not contract.repair:
        return ""
    ranks = contract.repair.get("ranks")
    try:
        found = "" if base.is_dir() else weights_hash(read_base_header(base), ranks if isinstance(ranks, dict) else {})
    except FormatError:
        found = ""
    if found == contract.repair.get("base"):
        return ""
    quant = contract.repair.get("quant") or "another quantization"
    return f"it repairs what {quant} took from {contract.base_name or 'its base'}, and {base} has other weights"
