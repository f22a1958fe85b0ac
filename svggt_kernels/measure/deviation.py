"""How far the outputs of a sparse model are from those of the dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .accuracy import rotation_angle


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


def camera_rotation(
    dense: Tensor,  # [S, 4, 4]
    sparse: Tensor,
) -> dict[str, float]:
    """Return the median and the largest angle between the cameras of two runs, poses camera to world, degrees."""
    angles = rotation_angle(dense[:, :3, :3].mT @ sparse[:, :3, :3])
    return {"median": float(angles.median()), "max": float(angles.max())}
