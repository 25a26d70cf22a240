"""Checkpoints whose weights are stored quantized: computed back where that is simple and well defined, refused by name
where it is not.

Each weight becomes a `Dequantized` under its own name, which reads its rows from the tensors that stand for it. What
comes out are llama.cpp's numbers, bit for bit, for every format that its converter computes back (`dequant_model`,
conversion/base.py); AWQ and bitsandbytes, which it does not know, follow their own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import ConversionError, FormatError, UnsupportedError, listed
from converters.safetensors_file import StoredTensor
from converters.shards import Shards
from converters.stored.methods import METHODS
from converters.stored.settings import ORIGINAL, find_settings, refused
from converters.stored.tensor import Dequantized, Parts, Problems, Settings

__all__ = ["BESIDE", "Dequantized", "Restored", "restore"]

BESIDE = ("hf_quant_config.json", "quantize_config.json")  # files beside config.json that say how weights are stored
KEPT = {"mxfp4": "gpt_oss"}  # blocks that go over as they are, in the family that has rows for them
# Endings that only quantized weights have, for a folder that does not say that they are.
TRACES = (".qweight", ".weight_packed", ".weight_scale_inv", ".SCB", ".quant_map")


@dataclass(frozen=True)
class Restored:
    """Tensors by name, quantized ones as the weights they stand for."""

    tensors: Mapping[str, StoredTensor | Dequantized]
    notices: tuple[str, ...] = ()


def restore(folder: Path, config: Settings, beside: Mapping[str, Settings], tensors: Parts) -> Restored:
    """What a checkpoint's tensors are, quantized ones computed back when they are read.

    Args:
        beside: files of `BESIDE` that are there, by name.

    Raises:
        UnsupportedError: a quantization that is not computed back here, by name.
        FormatError: tensors that do not fit their quantization.
    """
    method = ""
    try:
        method, settings = find_settings(config, beside)
        if method in METHODS:
            return _restored(method, settings, tensors)
        if method and config.get("model_type") != KEPT.get(method):
            raise refused(method)
        if not method and (traces := [name for name in tensors if name.endswith(TRACES)]):
            raise UnsupportedError(
                f"holds quantized weights, and config.json does not say how to read them:{listed(traces)}",
                hint="Download config.json again; it has a quantization_config. " + ORIGINAL,
            )
    except ConversionError as error:
        where = f"{folder}, quantized by {method}" if method else f"{folder}"
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from None
    return Restored(tensors)


def _restored(method: str, settings: Settings, tensors: Parts) -> Restored:
    problems = Problems()
    with Shards(tensor.file for tensor in tensors.values()) as shards:
        found = METHODS[method](settings, tensors, shards, problems)
    if problems:
        raise FormatError(f"tensors do not fit their quantization, {found.what}:{listed(problems)}")
    kept = {name: tensor for name, tensor in tensors.items() if name not in found.used}
    if not found.weights:
        return Restored(kept)
    notice = (
        f"the checkpoint was quantized before, {found.what}: {len(found.weights)} of its weights are computed back "
        "from that, and are what it left of them; the original weights convert without that loss"
    )
    return Restored({**kept, **found.weights}, (notice,))
