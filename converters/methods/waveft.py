"""WaveFT (arXiv:2505.12532): W + scaling * one level of an inverse discrete wavelet transform.

    <module>.waveft_spectrum  (count,)

The coefficients, a little more than (rows, columns), are zero but for `count` places; they are drawn from
`random_loc_seed` and not saved. Without `use_idwt` they are the change themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats
from converters.methods.changes import Change, Transformed
from converters.methods.factored import quiet
from converters.methods.fourierft import drawn_places, spectrum_shape
from converters.methods.method import Method, Module, Whole
from converters.methods.shira import added
from converters.methods.wavelets import WAVELETS, filters
from converters.peft_settings import choice, flag, number, seed


@dataclass(frozen=True)
class Axis:
    """Where a coefficient goes along the rows or the columns.

    Attributes:
        size: of the weight.
        taps: of the wavelet's filters; even.
    """

    size: int
    taps: int

    @property
    def coefficients(self) -> int:
        """How many there are: `size`, as many more as the filters overlap, and even."""
        wide = self.size + self.taps - 2
        return wide + wide % 2

    @property
    def margin(self) -> int:
        """Coefficients before the first one that may have a place."""
        return (self.coefficients - self.size) // 2

    @property
    def cut(self) -> int:
        """Values before the weight's first one."""
        return self.taps - 2 + (self.coefficients + 2 - self.taps - self.size) // 2

    def halves(self, places: Whole) -> tuple[Whole, Whole]:
        """Whether each place is in the second half, and where its first tap goes."""
        second, which = np.divmod(places + self.margin, self.coefficients // 2)
        return second, 2 * which - self.cut


def read(module: Module) -> Iterator[Change]:
    shape = spectrum_shape(module)

    @quiet
    def apply(weight: Floats, start: int) -> Floats:
        spectrum = module.load("spectrum") * np.float32(module.setting("scaling"))
        places = drawn_places(module.setting("random_loc_seed"), shape, len(spectrum))
        if not module.setting("use_idwt"):
            return added(weight, start, places, spectrum)
        return weight + _transformed(spectrum, places, shape, module.setting("wavelet_family"), start, len(weight))

    yield Transformed(module.weight, shape, apply, uses_weight=False)


def _transformed(
    spectrum: Floats, places: Whole, shape: tuple[int, int], wavelet: str, start: int, count: int
) -> npt.NDArray[np.float32]:
    """Some rows of the transform: each coefficient is a patch, the outer product of two filters.

    PEFT takes the high pass down the columns for the right half, and along the rows for the lower half.
    """
    both = filters(wavelet)
    taps = both.shape[1]
    (is_lower, rows), (is_right, columns) = (
        Axis(size, taps).halves(along) for size, along in zip(shape, places, strict=True)
    )
    found = np.zeros((count, shape[1]), np.float32)
    for which in np.flatnonzero((rows + taps > start) & (rows < start + count)):
        row, column = rows[which] - start, columns[which]
        down = both[is_right[which], max(0, -row) : max(0, count - row)] * spectrum[which]
        across = both[is_lower[which], max(0, -column) : max(0, shape[1] - column)]
        row, column = max(0, row), max(0, column)
        found[row : row + len(down), column : column + len(across)] += np.outer(down, across)
    return found


METHOD = Method(
    "WaveFT",
    "arXiv:2505.12532",
    parts={".waveft_spectrum": "spectrum"},
    read=read,
    settings={
        "scaling": number(25.0),
        "random_loc_seed": seed(777),
        "use_idwt": flag(True),
        "wavelet_family": choice("db1", *WAVELETS),
    },
    free=("fan_in_fan_out", "init_weights", "n_frequency", "n_frequency_pattern", "proportional_parameters"),
)
