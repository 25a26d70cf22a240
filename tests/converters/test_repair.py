"""Ranks that give a quantized base back what quantization took: all of it, or as much as few can hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from converters.adapted_base import open_base
from converters.adapter_file import specs_of
from converters.base import convert_base
from converters.errors import BaseMismatchError, UnsupportedError
from converters.imatrix import Importance, ImportanceMatrix
from converters.quant_types import TYPES
from converters.reader import read_header
from converters.repair import Repair, find_repair, planned_bytes, repairable, weights_hash
from converters.writer import TensorSpec
from tests.conftest import TINY_BASE
from tests.converters.folders import make_model

Floats = npt.NDArray[np.float32]
NAME = "blk.1.ffn_up.weight"
# `low_rank.EXACT` counts as all of a change: half of what storing the ranks in F16 does
EXACT = 2e-4


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q2_k.gguf", quant="q2_k").path


def use(base: Path, seed: int = 0) -> ImportanceMatrix:
    """Columns that are used by very different amounts."""
    random = np.random.default_rng(seed)
    entries = {
        name: Importance(np.exp(random.normal(0, 3, shape[-1])).astype(np.float32), np.array([1], np.int64))
        for name, shape in shapes(base).items()
    }
    return ImportanceMatrix(entries, ("test",), 1, 512)


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    header = read_header(base)
    return {name: header.tensors[name].shape for name in repairable(header)}


def error_of(base: Path, name: str) -> Floats:
    """What quantization took, by two readers."""
    with open_base(TINY_BASE) as before, open_base(base) as now:
        rows = before.shapes[name][0]
        return before.rows(name, 0, rows) - now.rows(name, 0, rows)


def left(repair: Repair, base: Path, weights: Floats | float = 1.0) -> float:
    """The norm of what a repair leaves of one tensor's error, its columns weighted."""
    b, a = next(pair for pair in repair.pairs if pair.tensor == NAME).load()
    return float(np.linalg.norm((error_of(base, NAME) - b @ a) * weights))


def test_all_ranks_give_everything_back(quantized: Path) -> None:
    repair = find_repair(quantized, TINY_BASE, 256)
    assert [pair.tensor for pair in repair.pairs] == repairable(read_header(quantized))
    assert {pair.tensor.split(".")[2] for pair in repair.pairs} == {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    }  # fmt: skip
    for pair in repair.pairs:
        b, a = pair.load()
        error = error_of(quantized, pair.tensor)
        assert float(np.abs(error).max()) > 0.01
        assert float(np.linalg.norm(error - b @ a)) < EXACT * float(np.linalg.norm(error))
    assert repair.share == pytest.approx(1.0, abs=1e-6)


def test_few_ranks_give_back_what_the_largest_singular_values_hold(quantized: Path) -> None:
    rank = 8
    repair = find_repair(quantized, TINY_BASE, rank)
    singular = np.linalg.svd(error_of(quantized, NAME).astype(np.float64), compute_uv=False)
    assert left(repair, quantized) == pytest.approx(float(np.linalg.norm(singular[rank:])), rel=1e-4)
    assert {pair.rank for pair in repair.pairs} == {rank}
    assert 0.05 < repair.share < 0.5


def test_each_is_best_in_its_own_measure(quantized: Path) -> None:
    """Weighted by use, the outputs lose less; unweighted, the weights do."""
    imatrix = use(quantized)
    plain, weighted = (find_repair(quantized, TINY_BASE, 8, given) for given in (None, imatrix))
    means = imatrix.means_for(NAME, 256)
    assert means is not None
    columns = np.sqrt(means[0])
    assert left(weighted, quantized, columns) < 0.9 * left(plain, quantized, columns)
    assert left(plain, quantized) < 0.99 * left(weighted, quantized)
    assert (weighted.is_weighted, plain.is_weighted) == (True, False)


def test_a_column_that_was_never_used_is_no_division_by_nothing(quantized: Path) -> None:
    imatrix = use(quantized)
    imatrix.entries[NAME].sums[:] = 0.0
    imatrix.entries["blk.0.ffn_up.weight"].sums[:100] = 0.0
    for pair in find_repair(quantized, TINY_BASE, 4, imatrix).pairs:
        b, a = pair.load()
        assert np.isfinite(b @ a).all()
        assert float(np.abs(b @ a).max()) < 10.0


def test_the_weights_are_known_again_wherever_they_lie(quantized: Path, tmp_path: Path) -> None:
    names = repairable(read_header(quantized))
    copy = Path(shutil.copy(quantized, tmp_path / "renamed.gguf"))
    renamed = convert_base(TINY_BASE, tmp_path / "other.gguf", quant="q2_k", metadata={"general.name": "Other"}).path
    for same in (copy, renamed):
        assert weights_hash(read_header(same), names) == weights_hash(read_header(quantized), names)
    other = convert_base(TINY_BASE, tmp_path / "q3.gguf", quant="q3_k_m").path
    tensor = read_header(copy).tensors[NAME]
    with open(copy, "r+b") as file:
        file.seek(tensor.offset + tensor.size_bytes // 2)
        file.write(b"\0" * 16)
    for different in (copy, other):
        assert weights_hash(read_header(different), names) != weights_hash(read_header(quantized), names)


def test_its_size_is_known_before_it_is_found(quantized: Path, tmp_path: Path) -> None:
    def planned(path: Path, rank: int, dtype: str = "f16") -> int:
        tensors = read_header(path).tensors.values()
        specs = [TensorSpec(each.name, each.shape, TYPES[each.type_name]) for each in tensors]
        return planned_bytes(specs, rank, dtype)

    pairs = find_repair(quantized, TINY_BASE, 3).pairs
    for dtype in ("f32", "f16"):
        stored = sum(spec.size_bytes for pair in pairs for spec, _ in specs_of(pair, dtype))
        assert planned(quantized, 3, dtype) == stored
    widest = max(min(shape) for shape in shapes(quantized).values())
    assert planned(quantized, widest - 1) < planned(quantized, widest) == planned(quantized, 10 * widest)
    assert planned(convert_base(TINY_BASE, tmp_path / "f16.gguf", quant="f16").path, 3) == 0


def test_what_cannot_be_repaired_is_refused(quantized: Path, tmp_path: Path) -> None:
    plain = convert_base(TINY_BASE, tmp_path / "f16.gguf", quant="f16").path
    with pytest.raises(UnsupportedError, match="no quantized matrices in its layers"):
        find_repair(plain, TINY_BASE, 8)
    with pytest.raises(UnsupportedError, match="was quantized itself"):
        find_repair(quantized, quantized, 8)
    with pytest.raises(BaseMismatchError, match="was not made of"):
        find_repair(quantized, make_model(tmp_path / "other"), 8)
    assert find_repair(quantized, plain, 8).share > 0.05  # half precision is near enough to the original
