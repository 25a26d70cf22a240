"""A weight's change in sixteen numbers, the same on every machine and under every quantization of the base.

An adapter adds a matrix to a weight. Multiplied from both sides with a few vectors of signs, which the tensor's name
determines, it gives

    model.layers.0.self_attn.q_proj.weight   256 x 256   [[ 3.12, -0.71, 5.00, 1.94], [-2.26, ...], ...]

Twice the scale gives twice the numbers, and rows in another order give others altogether. The vectors count rows and
columns as transformers does, so that two files agree where they make the same change, whatever they do with the rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLES = 4
"""Vectors on each side."""


@dataclass(frozen=True)
class ChangeSample:
    """What a certificate keeps of one weight's change.

    Attributes:
        tensor: the weight's name in transformers.
        shape: its outputs and its inputs.
        values: float32 (SAMPLES, SAMPLES); a row for each vector on the side of the outputs.
    """

    tensor: str
    shape: tuple[int, int]
    values: npt.NDArray[np.float32]


def inputs_of(tensor: str, n_inputs: int) -> npt.NDArray[np.float64]:
    """The vectors that go in: signs, shape (SAMPLES, n_inputs)."""
    return _signs(f"{tensor} inputs", n_inputs)


def sample(tensor: str, outputs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The numbers of a change.

    Args:
        outputs: what it makes of `inputs_of`, shape (SAMPLES, n_outputs).
    """
    products: npt.NDArray[np.float64] = _signs(f"{tensor} outputs", outputs.shape[1]) @ outputs.astype(np.float64).T
    return products


def _signs(name: str, length: int) -> npt.NDArray[np.float64]:
    stream = hashlib.shake_128(name.encode()).digest(-(-SAMPLES * length // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[: SAMPLES * length]
    return bits.reshape(SAMPLES, length).astype(np.float64) * 2 - 1
