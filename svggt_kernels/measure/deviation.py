"""How far the outputs of a sparse model are from those of the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The part of an output that holds the rotation of the cameras, by the name of the output.
ROTATIONS = {
    "pose_enc": (..., slice(3, 7)),
    "extrinsics": (..., slice(3), slice(3)),
    "camera_poses": (..., slice(3), slice(3)),
}


@dataclass(frozen=True)
class Deviation:
    """How far an output of the sparse model is from the dense one.

    Attributes:
        relative_l2: `||sparse - dense|| / ||dense||` over the values finite in both.
        max_abs: Largest absolute difference over the same values.
        not_finite: Values that are infinite or NaN in either output.
    """

    relative_l2: float
    max_abs: float
    not_finite: int

    @classmethod
    def of(cls, dense: Tensor, sparse: Tensor) -> Deviation:
        """Compare an output of the sparse model with the same output of the dense one, in float64.

        Raises:
            ValueError: If the shapes differ.
        """
        if dense.shape != sparse.shape:
            raise ValueError(f"both outputs must have one shape, got {list(dense.shape)} and {list(sparse.shape)}")
        finite = dense.isfinite() & sparse.isfinite()
        reference = dense[finite].double()
        difference = sparse[finite].double() - reference
        distance, norm = float(difference.norm()), float(reference.norm())
        return cls(
            relative_l2=distance / norm if norm else (math.inf if distance else 0.0),
            max_abs=float(difference.abs().max()) if difference.numel() else 0.0,
            not_finite=int((~finite).sum()),
        )


def camera_rotation(dense: Mapping[str, Tensor], sparse: Mapping[str, Tensor]) -> dict[str, float] | None:
    """Return the median and the largest angle between the cameras of two runs, degrees; None without cameras."""
    for name, part in ROTATIONS.items():
        if name in dense:
            angles = rotation_degrees(dense[name][part], sparse[name][part])
            return {"median": float(angles.median()), "max": float(angles.max())}
    return None


def rotation_degrees(
    dense: Tensor,  # [..., 4] quaternions or [..., 3, 3] matrices
    sparse: Tensor,
) -> Tensor:
    """Return the angle between two rotations, degrees `[...]` float64; quaternions need not be of unit length."""
    dense, sparse = dense.double(), sparse.double()
    if dense.shape[-2:] == (3, 3):
        # |R - R'| = 2 sqrt(2) sin(angle / 2)
        chord = torch.linalg.matrix_norm(dense - sparse) / (2 * math.sqrt(2))
        return torch.rad2deg(2 * torch.asin(chord.clamp(max=1)))
    a, b = (F.normalize(quaternion, dim=-1) for quaternion in (dense, sparse))
    near, far = (a - b).norm(dim=-1), (a + b).norm(dim=-1)
    return torch.rad2deg(4 * torch.atan2(torch.minimum(near, far), torch.maximum(near, far)))
