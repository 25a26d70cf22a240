"""The tables serve both directions: from the file we wrote, the checkpoint comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from converters.architectures import Place, Sizes
from converters.base import convert_base
from converters.checkpoint import Checkpoint
from converters.fingerprint import fingerprint
from converters.model import understand
from converters.reader import read_header
from converters.restore import restore, restored_places
from tests.equivalence import tiny_models
from tests.equivalence.tiny_models import TINY

pytestmark = pytest.mark.train
# A norm that was shifted by one, and a logarithm that was taken: roundings of float32, relative to one.
TOLERANCE = 2e-6


def values_of(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    header, data = read_header(path), path.read_bytes()
    return {
        name: np.frombuffer(data, np.float32, int(np.prod(tensor.shape)), tensor.offset).reshape(tensor.shape)
        for name, tensor in header.tensors.items()
    }


@pytest.mark.parametrize("name", TINY)
def test_the_checkpoint_comes_back(name: str, tmp_path: Path) -> None:
    folder = tiny_models.build(name, tmp_path / "model")
    out = convert_base(folder, tmp_path / "base.gguf", quant="f32").path
    values = values_of(out)
    with Checkpoint(folder) as checkpoint:
        model = understand(checkpoint)
        header = read_header(out)
        sizes = Sizes(header.architecture, model.sizes.vocab, header.metadata)
        places = restored_places(model.family, sizes, model.config, values)
        back = dict(restore(places, sizes, values.__getitem__))
        assert set(back) == set(checkpoint.tensors)
        for hf_name, tensor in back.items():
            stored = checkpoint.rows(hf_name).reshape(checkpoint.tensors[hf_name].shape)
            assert tensor.shape == stored.shape
            np.testing.assert_allclose(tensor, stored, rtol=0, atol=TOLERANCE)
    for quant in ("q4_k_m", "q8_0"):
        assert fingerprint(convert_base(folder, tmp_path / f"{quant}.gguf", quant=quant).path) == fingerprint(folder)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = tiny_models.build("qwen3-next", tmp_path / "model")
    values = values_of(convert_base(folder, tmp_path / "base.gguf", quant="f32").path)
    with Checkpoint(folder) as checkpoint:
        model = understand(checkpoint)
    places: list[Place] = restored_places(model.family, model.sizes, model.config, values)
    without = [place for place in places if place.gguf_name != "blk.0.attn_gate.weight"]
    with pytest.raises(ValueError, match="in_proj_qkvz"):
        dict(restore(without, model.sizes, values.__getitem__))
