"""FourierFT (arXiv:2405.03003): W + scaling * the real part of an inverse discrete Fourier transform.

    <module>.fourierft_spectrum  (count,)

The spectrum, (rows, columns), is zero but for `count` places; they are drawn from `random_loc_seed` and not saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import quiet
from converters.methods.method import Method, Module, Whole
from converters.peft_settings import number, seed
from converters.torch_random import TorchGenerator

ARRAY_BYTES = 2**26  # of complex numbers at a time


def read(module: Module) -> Iterator[Change]:
    shape = spectrum_shape(module)

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        spectrum = module.load("spectrum").astype(np.float64) * module.setting("scaling")
        places = drawn_places(module.setting("random_loc_seed"), shape, len(spectrum))
        step = max(1, ARRAY_BYTES // (16 * max(len(spectrum), shape[1])))
        changed = weight.copy()
        for first in range(0, len(weight), step):
            part = changed[first : first + step]
            part += _transformed(spectrum, places, shape, np.arange(start + first, start + first + len(part)))
        return changed

    yield Transformed(module.weight, shape, apply, uses_weight=False)


def spectrum_shape(module: Module) -> tuple[int, int]:
    """(rows, columns) of the base's weight, in which the spectrum has its places."""
    shape = module.base_shape()
    module.check("spectrum", None)
    if module.shape("spectrum")[0] > prod(shape):
        raise ModuleProblem(f"has {module.shape('spectrum')[0]} frequencies, its base's weight is {shape}")
    return shape


@lru_cache(maxsize=16)
def drawn_places(drawn_from: int, shape: tuple[int, int], count: int) -> Whole:
    """Row and column of each number of a spectrum, (2, count)."""
    return np.stack(np.divmod(TorchGenerator(drawn_from).randperm(prod(shape), count), shape[1]))


def _transformed(
    spectrum: npt.NDArray[np.float64], places: Whole, shape: tuple[int, int], numbers: Whole
) -> npt.NDArray[np.float64]:
    """Some rows of the transform's real part: first down the columns that hold anything, then along the rows."""
    rows, columns = shape
    order = np.argsort(places[1], kind="stable")
    turns = np.exp(2j * np.pi / rows * np.arange(rows))
    terms = turns[numbers[:, None] * places[0][order] % rows] * (spectrum[order] / rows)
    held, starts = np.unique(places[1][order], return_index=True)
    half = np.zeros((len(numbers), columns), np.complex128)
    half[:, held] = np.add.reduceat(terms, starts, axis=1)
    return np.fft.ifft(half, axis=1).real


METHOD = Method(
    "FourierFT",
    "arXiv:2405.03003",
    parts={".fourierft_spectrum": "spectrum"},
    read=read,
    settings={"scaling": number(150.0), "random_loc_seed": seed(777)},
    free=("fan_in_fan_out", "init_weights", "n_frequency", "n_frequency_pattern"),
)
