"""bitsandbytes' 4-bit weights: NF4 or FP4 codes, a table of their values, and the largest value of each block.

    layers.0.mlp.up_proj.weight                                U8, two codes a byte, the first in the upper half
    layers.0.mlp.up_proj.weight.quant_map                      F32 (16,)
    layers.0.mlp.up_proj.weight.absmax                         F32, or U8 where it is quantized once more:
    layers.0.mlp.up_proj.weight.nested_absmax, nested_quant_map    F32
    layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4  JSON: shape, blocksize, dtype ...

`table[code] * absmax`, rounded to the dtype that the weight had (`dequantize_4bit`, bitsandbytes/functional.py and
`_dequantize_4bit_compute`, bitsandbytes/backends/default/ops.py): what a QLoRA adapter was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters.safetensors_file import StoredTensor
from converters.shards import Floats, Shards, floats
from converters.stored.tensor import Dequantized

ROUNDED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Nested:
    """How block maxima were quantized once more.

    Attributes:
        table: F32 (256,).
        absmax: F32, one for each `block` of them.
        offset: added to every one.
    """

    table: StoredTensor
    absmax: StoredTensor
    block: int
    offset: float


@dataclass(frozen=True)
class Lookup(Dequantized):
    """Codes of four bits, counted through the whole weight."""

    codes: StoredTensor
    table: StoredTensor
    absmax: StoredTensor
    block: int
    nested: Nested | None

    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        columns = self.shape[-1]
        first, last = start * columns, stop * columns
        low = first // 2 * 2
        packed = np.frombuffer(shards.read(self.codes, low // 2, -(-last // 2) - low // 2), np.uint8)
        codes = np.stack((packed >> 4, packed & 15), axis=-1).reshape(-1)[first - low :][: last - first]
        values = floats(shards.rows(self.table), "F32").reshape(-1)[codes]
        blocks = self._largest(shards, first // self.block, -(-last // self.block))
        values *= np.repeat(blocks, self.block)[first % self.block :][: last - first]
        return rounded(values, self.dtype).reshape(stop - start, columns)

    def _largest(self, shards: Shards, first: int, last: int) -> Floats:
        """The largest value of each block, from `first` to `last`."""
        numbers = shards.numbers(self.absmax, first, last)
        if self.nested is None:
            return floats(numbers, self.absmax.dtype)
        nested = self.nested
        low = first // nested.block
        scales = floats(shards.numbers(nested.absmax, low, -(-last // nested.block)), "F32")
        values = floats(shards.rows(nested.table), "F32").reshape(-1)[numbers]
        values *= np.repeat(scales, nested.block)[first - low * nested.block :][: last - first]
        values += np.float32(nested.offset)
        return values


def rounded(values: Floats, dtype: str) -> Floats:
    """To the nearest number of a dtype (ties to even), as float32."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.where(np.isnan(values), values, (nearest & np.uint32(0xFFFF0000)).view(np.float32))
    return values
