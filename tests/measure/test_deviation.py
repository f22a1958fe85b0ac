"""How far outputs and cameras of two runs are from one another."""

from __future__ import annotations

import math

import pytest
import torch

from svggt_kernels.measure.deviation import Deviation, camera_rotation


def test_deviation():
    dense, sparse = torch.tensor([3.0, 4.0, math.inf]), torch.tensor([3.0, 4.5, 1.0])
    assert Deviation.of(dense, sparse) == Deviation(pytest.approx(0.1), 0.5, 1)


def test_deviation_from_zero():
    assert Deviation.of(torch.zeros(2), torch.zeros(2)).relative_l2 == 0
    assert Deviation.of(torch.zeros(2), torch.ones(2)).relative_l2 == math.inf


def test_outputs_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \[1, 2\] and \[2\]"):
        Deviation.of(torch.zeros(1, 2), torch.zeros(2))


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 1.0, 90.0, 179.0])
def test_rotation_between_cameras(degrees: float):
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    dense, sparse = torch.eye(4, dtype=torch.float64).repeat(2, 3, 1, 1)
    sparse[2, 1:3, 1:3] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    assert camera_rotation(dense, sparse) == {"median": 0, "max": pytest.approx(degrees, abs=1e-12)}
