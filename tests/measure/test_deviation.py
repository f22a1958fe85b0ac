"""How far outputs and cameras of two runs are from one another."""

from __future__ import annotations

import math

import pytest
import torch

from svggt_kernels.measure.deviation import Deviation, camera_rotation, rotation_degrees


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
def test_rotation(degrees: float):
    half = math.radians(degrees) / 2
    turned = torch.tensor([math.sin(half), 0.0, 0.0, math.cos(half)], dtype=torch.float64)
    identity = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for sign, length in ((1, 1), (-1, 1), (1, 3)):
        angle = rotation_degrees(identity, sign * length * turned)
        assert float(angle) == pytest.approx(degrees, abs=1e-12)
    cos, sin = math.cos(2 * half), math.sin(2 * half)
    matrix = torch.tensor([[1.0, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=torch.float64)
    assert float(rotation_degrees(torch.eye(3), matrix)) == pytest.approx(degrees, abs=1e-9)


def test_rotation_of_each_kind_of_camera():
    upside_down = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    matrices = torch.eye(4).repeat(3, 1, 1), torch.eye(4).repeat(3, 1, 1)
    matrices[1][2, :3, :3] = upside_down
    encodings = torch.zeros(3, 9), torch.zeros(3, 9)
    for encoding in encodings:
        encoding[:, 6] = 1  # x, y, z, w after three of translation
    encodings[1][2, 3:7] = torch.tensor([1.0, 0, 0, 0])
    for name, (dense, sparse) in (("extrinsics", matrices), ("camera_poses", matrices), ("pose_enc", encodings)):
        assert camera_rotation({name: dense}, {name: sparse}) == {"median": 0, "max": pytest.approx(180)}
    assert camera_rotation({"depth": matrices[0]}, {"depth": matrices[1]}) is None
