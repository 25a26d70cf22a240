"""Numbers drawn without torch against torch itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from converters.errors import FormatError
from converters.torch_random import LONG_PERMUTATION, TorchGenerator

pytestmark = pytest.mark.train

SEEDS = (0, 42, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1, -1)
SIZES = (0, 1, 2, 15, 16, 17, 31, 1000, 2**16 + 3)
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VECTOR_MATHS = 1e-6  # a logarithm, sine or cosine in float32 that is off by its last bits, times a radius of up to 6


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_permutations_are_torchs(seed):
    for size in SIZES:
        expected = torch.randperm(size, generator=torch_generator(seed)).numpy()
        np.testing.assert_array_equal(TorchGenerator(seed).randperm(size), expected)
        for first in (0, 1, 7, size):
            np.testing.assert_array_equal(TorchGenerator(seed).randperm(size, first), expected[:first])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_numbers_are_torchs(seed, dtype):
    for low, high in ((0.0, 1.0), (-0.3, 0.3), (-0.0123, 0.7), (5.0, 9.1), (5.0, 5.0000005)):
        ours, theirs = TorchGenerator(seed), torch_generator(seed)
        for size in SIZES:  # one after the other: as many words are used up
            expected = torch.empty(size, dtype=DTYPES[dtype]).uniform_(low, high, generator=theirs)
            np.testing.assert_array_equal(ours.uniform(size, low, high, dtype), expected.float().numpy())


@pytest.mark.parametrize("seed", SEEDS)
def test_whole_numbers_are_torchs(seed):
    ours, theirs = TorchGenerator(seed), torch_generator(seed)
    for low, high in ((0, 7), (-5, 2**20), (3, 3 + 2**28 - 1), (3, 3 + 2**28), (0, 2**32), (-(2**40), 2**40 + 1)):
        expected = torch.randint(low, high, (3, 5), generator=theirs).numpy()
        np.testing.assert_array_equal(ours.randint(low, high, (3, 5)), expected)


def test_methods_initialisations_are_torchs():
    ours, theirs = TorchGenerator(7), torch_generator(7)
    for shape, slope, dtype in (((16, 40), 0.0, "F32"), ((40, 16), 0.0, "F32"), ((6, 1, 33), math.sqrt(5), "BF16")):
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        expected = torch.nn.init.kaiming_uniform_(tensor, a=slope, generator=theirs)
        np.testing.assert_array_equal(ours.kaiming_uniform(shape, slope, dtype), expected.float().numpy())
    np.testing.assert_array_equal(ours.rand((4, 1, 9)), torch.rand((4, 1, 9), generator=theirs).numpy())


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_numbers_are_torchs_within_the_last_bits(seed):
    ours, theirs = TorchGenerator(seed), torch_generator(seed)
    for size in SIZES:
        for std in (1.0, 0.5):
            expected = torch.normal(0.25, std, (size,), generator=theirs).numpy()
            found = ours.normal(size, 0.25, std)
            np.testing.assert_allclose(found, expected, rtol=0, atol=VECTOR_MATHS)
            if size < 16:
                np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ours.rand(9), torch.rand(9, generator=theirs).numpy())


def test_draws_go_on_where_the_last_one_ended():
    ours, theirs = TorchGenerator(3), torch_generator(3)
    for size in (100, 3, 1):
        expected = torch.randperm(size, generator=theirs).numpy()
        np.testing.assert_array_equal(ours.randperm(size, first=2), expected[:2])
        np.testing.assert_array_equal(ours.rand(5), torch.rand(5, generator=theirs).numpy())
    other = TorchGenerator(3)
    assert not np.array_equal(other.rand(5), other.rand(5))


def test_another_seed_gives_other_numbers():
    expected = torch.rand(100, generator=torch_generator(1)).numpy()
    assert not np.array_equal(TorchGenerator(2).rand(100), expected)
    assert not np.array_equal(TorchGenerator(2).randperm(100), TorchGenerator(1).randperm(100))


@pytest.mark.slow
def test_permutations_of_large_matrices_are_torchs():
    """Beyond 214 million elements torch shuffles in another way; it takes it 10 s each."""
    for size in (LONG_PERMUTATION - 1, LONG_PERMUTATION):
        theirs, ours = torch_generator(5), TorchGenerator(5)
        expected = torch.randperm(size, generator=theirs)[:1000].numpy()
        np.testing.assert_array_equal(ours.randperm(size, first=1000), expected)
        np.testing.assert_array_equal(ours.rand(5), torch.rand(5, generator=theirs).numpy())


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**400, 1.0, None, True, "7"])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(FormatError, match="no seed"):
        TorchGenerator(seed)
