"""Products and norms in numpy, compared bit by bit with those of torch."""

import numpy as np
import pytest
import torch

from t5tune.merging import torch_arithmetic
from t5tune.merging.torch_arithmetic import RANKS, ROWS, compute_low_rank_product, row_norms


def make_product(rows: int, rank: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(rows * columns)
    b, a = random.standard_normal((rows, rank), np.float32), random.standard_normal((rank, columns), np.float32)
    return b, a, (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()


@pytest.mark.parametrize("shape", [(4, 4, 15), (5, 1, 17), (64, 8, 99), (25, 64, 10240), (256, 16, 1024), (9, 192, 50)])
@pytest.mark.parametrize("blas", [True, False])
def test_the_product_equals_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], blas: bool
) -> None:
    if not blas:
        monkeypatch.setattr(torch_arithmetic, "_blas_sums_in_order", lambda *shape: False)
    b, a, expected = make_product(*shape)
    assert np.array_equal(compute_low_rank_product(b, a), expected)


@pytest.mark.parametrize("shape", [(64, 193, 99), (77, 512, 333), (1, 400, 64)])
def test_high_ranks_are_summed_in_one_chain_on_every_machine(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    b, a, torchs = make_product(*shape)
    in_order = torch_arithmetic._multiply_in_order(b, a)
    assert np.array_equal(compute_low_rank_product(b, a), in_order)
    np.testing.assert_allclose(in_order, torchs, rtol=1e-4, atol=1e-4)
    if torch_arithmetic._blas_sums_in_order(ROWS, ROWS + RANKS, shape[2]):
        monkeypatch.setattr(torch_arithmetic, "_multiply_in_order", None)  # isn't needed
        assert np.array_equal(compute_low_rank_product(b, a), in_order)


@pytest.mark.parametrize("shape", [(1, 4, 7), (3, 16, 512), (64, 8, 5)])
def test_a_product_of_tiny_matrices_is_within_rounding_of_torchs(shape: tuple[int, int, int]) -> None:
    """On AMD processors, MKL sums in a different order with fewer than 4 rows or about 15 columns."""
    b, a, expected = make_product(*shape)
    np.testing.assert_allclose(compute_low_rank_product(b, a), expected, rtol=1e-5, atol=1e-6)


def test_a_sum_that_would_be_rounded_twice_is_rounded_once() -> None:
    # 2**24 + 2 + (1 + tiny): fp64 drops the tiny part and leaves a tie, which would be rounded to the even neighbor
    b = np.array([[2.0**24 + 2, 1 + 2.0**-23]], np.float32)
    a = np.array([[1.0], [1 - 2.0**-24]], np.float32)
    exact = int(2**24 + 2) * 2**47 + int((1 + 2.0**-23) * 2**23) * int((1 - 2.0**-24) * 2**24)
    expected = np.float32(2**24 + 4) if exact > (2**24 + 3) * 2**47 else np.float32(2**24 + 2)
    assert torch_arithmetic._multiply_in_order(b, a)[0, 0] == expected


@pytest.mark.parametrize("columns", [8, 24, 384, 1024, 2816])
def test_row_norms_equal_those_of_torch(columns: int) -> None:
    values = np.random.default_rng(columns).standard_normal((40, columns), np.float32)
    assert np.array_equal(row_norms(values), torch.linalg.norm(torch.from_numpy(values), dim=1).numpy())
