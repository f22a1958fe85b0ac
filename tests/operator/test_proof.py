"""The rule against float64, on results whose errors are known."""

from __future__ import annotations

import math

import pytest
import torch

from svggt_kernels.proof import error_ratio

EXACT = torch.tensor([1.0, -2.0, 4.0, -math.inf], dtype=torch.float64)


def off(by: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (EXACT + by).to(dtype)


def test_the_ratio_of_two_errors():
    assert error_ratio(off(0.3), off(0.1), EXACT) == pytest.approx(3)


def test_a_plain_result_without_error_counts_as_one_rounding_or_the_floor():
    rounding = error_ratio(off(2.0**-8, torch.bfloat16), EXACT + 2.0**-12, EXACT + 2.0**-12)
    assert 0 < rounding < 2
    assert error_ratio(off(0.3), EXACT, EXACT, floor=0.1) == pytest.approx(3)
    assert error_ratio(EXACT, EXACT, EXACT) == 0
    assert error_ratio(off(0.3), EXACT, EXACT) == math.inf


@pytest.mark.parametrize(
    ("result", "plain"),
    [([1, -2, math.nan, -math.inf], EXACT), ([1, -2, 4, 0], EXACT), (EXACT, [1, -2, math.inf, -math.inf])],
    ids=["a NaN", "finite where it should not be", "plain overflows"],
)
def test_what_is_not_finite_is_never_right(result, plain):
    result, plain = (torch.as_tensor(x, dtype=torch.float64) for x in (result, plain))
    assert not error_ratio(result, plain, EXACT) <= 2
