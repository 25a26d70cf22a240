"""torch's random generator on the CPU, without torch: what an adapter's file leaves out and its seed brings back.

    TorchGenerator(777).randperm(4096 * 4096, first=1000)     the places FourierFT puts its spectrum at
    TorchGenerator(0).kaiming_uniform((256, 4096))            VeRA's frozen A

torch draws words of 32 bits from the Mersenne Twister that numpy has, too; how it makes numbers of them is its own.
Equal bit by bit to torch 2.13, but for `normal`. Nothing here can repeat what was drawn on a GPU.
Sources: aten/src/ATen/core/DistributionsHelper.h and ATen/native/cpu/DistributionTemplates.h,
https://github.com/pytorch/pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.errors import FormatError

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Shape = int | tuple[int, ...]

SEEDS = range(-(2**63), 2**64)  # what torch.Generator.manual_seed takes
CHUNK = 1 << 20  # words drawn at a time
LONG_PERMUTATION = (2**32 - 1) // 20  # from here on torch draws 64 bits an element, and shuffles another way
WIDE_RANGE = 2**28  # likewise for whole numbers
FLOAT_BITS = 24
TWO_PI = np.float32(2 * np.pi)


class TorchGenerator:
    """The same numbers, call for call, as `torch.Generator().manual_seed(seed)`.

    Args:
        seed: -2**63 to 2**64 - 1; torch uses its lowest 32 bits.

    Raises:
        FormatError: another seed.
    """

    def __init__(self, seed: int) -> None:
        if type(seed) is not int or seed not in SEEDS:
            raise FormatError("is no seed: torch takes whole numbers from -2**63 to 2**64 - 1")
        self._twister = np.random.MT19937()
        state: Any = np.random.RandomState(seed % 2**32).get_state(legacy=False)
        self._twister.state = state
        self._unused = 0  # words that were drawn without being looked at
        self._spare: float | None = None  # normal numbers come in pairs

    def randperm(self, n: int, first: int | None = None) -> Integers:
        """The beginning of `torch.randperm(n)`, int64 (min(first, n),).

        It costs as many steps as numbers are wanted; from 2**32 / 20 on it looks at n draws (4 s at 2**28).

        Args:
            first: how many are wanted; all of them if None.
        """
        wanted = n if first is None else max(0, min(first, n))
        return self._short_permutation(n, wanted) if n < LONG_PERMUTATION else self._long_permutation(n, wanted)

    def rand(self, shape: Shape) -> Floats:
        """`torch.rand(shape)`: float32 in [0, 1)."""
        return self.uniform(shape)

    def uniform(self, shape: Shape, low: float = 0.0, high: float = 1.0, dtype: str = "F32") -> Floats:
        """`torch.empty(shape).uniform_(low, high)`.

        torch multiplies and adds with one rounding where the processor can, as any of the last ten years.

        Args:
            dtype: "F32", or "BF16" or "F16" for what torch 2.13 puts in tensors of that type.

        Returns:
            float32, whatever the dtype.
        """
        width, start = float(np.float32(high) - np.float32(low)), float(np.float32(low))

        def convert(words: Words) -> Floats:
            fractions = (words & np.uint64(2**FLOAT_BITS - 1)) * 2.0**-FLOAT_BITS
            return (fractions * width + start).astype(np.float32)

        values = ROUNDED[dtype](self._fill(shape, convert))
        lowest, highest = ROUNDED[dtype](np.array([low, high], np.float32))
        values[values == highest] = lowest  # rounding may reach the end, which is not part of the range
        return values

    def kaiming_uniform(self, shape: tuple[int, ...], slope: float = 0.0, dtype: str = "F32") -> Floats:
        """`torch.nn.init.kaiming_uniform_(torch.empty(shape), a=slope)`, with its defaults (fan_in, leaky_relu)."""
        bound = sqrt(3.0) * (sqrt(2.0 / (1 + slope**2)) / sqrt(max(1, prod(shape[1:]))))
        return self.uniform(shape, -bound, bound, dtype)

    def randint(self, low: int, high: int, shape: Shape) -> Integers:
        """`torch.randint(low, high, shape)`: int64 in [low, high)."""
        count = high - low
        words = self._words64(prod_of(shape)) if count >= WIDE_RANGE else self._words(prod_of(shape))
        return ((words % np.uint64(count)).astype(np.int64) + low).reshape(shape)

    def randn(self, shape: Shape) -> Floats:
        """`torch.randn(shape)`; see `normal`."""
        return self.normal(shape)

    def normal(self, shape: Shape, mean: float = 0.0, std: float = 1.0) -> Floats:
        """`torch.normal(mean, std, shape)`: float32, within 1e-6 * std of torch's.

        From 16 numbers on torch takes the logarithm, sine and cosine from vector code, whose last bits differ from
        processor to processor; fewer come out bit by bit.
        """
        size = prod_of(shape)
        if size < 16:
            values = np.array([self._one_normal() * std + mean for _ in range(size)], np.float32)
        else:
            values = self._normal_blocks(size) * np.float32(std) + np.float32(mean)
        return values.reshape(shape)

    def _short_permutation(self, n: int, wanted: int) -> Integers:
        """Element i changes places with one of those from i on; only places that were changed are kept."""
        moved: dict[int, int] = {}
        result = np.empty(wanted, np.int64)
        steps = min(wanted, n - 1)
        for i, word in enumerate(self._each(steps)):
            other = i + word % (n - i)
            mine = moved.pop(i, i)
            result[i] = mine if other == i else moved.get(other, other)
            if other != i:
                moved[other] = mine
        if wanted == n and n:
            result[n - 1] = moved.get(n - 1, n - 1)
        self._unused += max(0, n - 1 - steps)
        return result

    def _long_permutation(self, n: int, wanted: int) -> Integers:
        """Element i goes to a place up to its own, and what was there to place i; only places wanted are kept."""
        result = np.empty(wanted, np.int64)
        for i, place in enumerate(self._places(0, wanted)):
            result[i] = result[place]
            result[place] = i
        for start in range(wanted, n, CHUNK):
            places = self._places(start, min(CHUNK, n - start))
            kept = np.flatnonzero(places < wanted)
            result[places[kept]] = kept + start  # the last of those that meet in one place stays
        return result

    def _places(self, start: int, count: int) -> Integers:
        elements = np.arange(start, start + count, dtype=np.uint64)
        return (self._words64(count) % (elements + np.uint64(1))).astype(np.int64)

    def _normal_blocks(self, size: int) -> Floats:
        """Box and Muller's pairs, 8 of each in 16 numbers; the last 16 are drawn again if there is a remainder."""
        uniform = self.uniform(size)
        whole = size - size % 16
        values = np.empty(size, np.float32)
        values[:whole] = _pairs(uniform[:whole])
        if whole < size:
            values[-16:] = _pairs(self.uniform(16))
        return values

    def _one_normal(self) -> float:
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        angle, distance = (self._words64(2) & np.uint64(2**53 - 1)) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log1p(-distance))
        self._spare = float(radius * np.sin(2 * np.pi * angle))
        return float(radius * np.cos(2 * np.pi * angle))

    def _fill(self, shape: Shape, convert: Callable[[Words], Floats]) -> Floats:
        values = np.empty(prod_of(shape), np.float32)
        for start in range(0, values.size, CHUNK):
            values[start : start + CHUNK] = convert(self._words(min(CHUNK, values.size - start)))
        return values.reshape(shape)

    def _each(self, count: int) -> Iterator[int]:
        for start in range(0, count, CHUNK):
            yield from self._words(min(CHUNK, count - start)).tolist()

    def _words(self, count: int) -> Words:
        """The next words of 32 bits."""
        self._twister.random_raw(self._unused, output=False)
        self._unused = 0
        words: Words = self._twister.random_raw(count)
        return words

    def _words64(self, count: int) -> Words:
        words = self._words(2 * count)
        return (words[0::2] << np.uint64(32)) | words[1::2]


def prod_of(shape: Shape) -> int:
    return shape if isinstance(shape, int) else prod(shape)


def _pairs(uniform: Floats) -> Floats:
    """float32 at each step, as torch does; n must be a multiple of 16."""
    blocks = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = (TWO_PI * blocks[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).reshape(-1)


def _bfloat16(values: Floats) -> Floats:
    """Rounded to the nearest bfloat16, ties to the even one; finite values only."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _float16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


ROUNDED: dict[str, Callable[[Floats], Floats]] = {"F32": np.asarray, "BF16": _bfloat16, "F16": _float16}
