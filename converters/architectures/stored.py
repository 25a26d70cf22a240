"""A GGUF base as a family reads its settings back from it: keys, shapes, and the few tensors that hold settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Stored:
    """What a file says of its model.

    Attributes:
        architecture: `general.architecture`.
        shapes: GGUF name to shape in numpy order, of every tensor.
        read: GGUF name to float32 values; of computed tensors, such as the factors of a rotary embedding.
    """

    architecture: str
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], npt.NDArray[np.float32]]

    def __getitem__(self, key: str) -> Any:
        """The value of a key, without the architecture before it; None where there is none.

        Numbers are float32 in the file, and here the shortest decimals that give them back: 1e-05, as config.json has
        it, and not 9.999999747378752e-06.
        """
        return decimal(self.metadata.get(f"{self.architecture}.{key}"))

    def floats(self, name: str) -> list[float]:
        """A vector as the shortest decimals that give it back."""
        return [float(str(value)) for value in self.read(name).reshape(-1)]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name; `{layer}` stands for any layer's number."""
        if "{layer}" not in name:
            return name in self.shapes
        return any(name.replace("{layer}", str(layer)) in self.shapes for layer in range(self["block_count"] or 0))


def decimal(value: Any) -> Any:
    """The shortest decimal that is this float32; other values as they are."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
