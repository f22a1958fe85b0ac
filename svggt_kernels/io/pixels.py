"""What values images hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MARGIN = 0.5
"""By how much images may leave [0, 1]: bicubic interpolation that is not clamped does by 0.45, other ranges by more."""

FRAMES_AT_ONCE = 1024
"""Frames whose limits are found at once: fewer than 2^31 values, as not every reduction on a device counts further."""


def require_unit_range(
    images: Tensor,  # [S, 3, H, W]
    name: str = "images",
    *,
    nan: bool = False,
) -> None:
    """Raise unless images are in [0, 1]; waits for their device.

    Args:
        images: Floating point, or integers.
        name: What messages call them.
        nan: Whether they may hold NaN.

    Raises:
        ValueError: If they leave the range by more than interpolation does, or hold NaN.
    """
    limits = torch.stack([torch.stack(part.aminmax()) for part in images.detach().split(FRAMES_AT_ONCE)]).tolist()
    numbers = [value for both in limits for value in both if not math.isnan(value)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if len(numbers) < 2 * len(limits) and not nan:
        broken = images.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist()
        listed = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        raise ValueError(f"{name} must not hold NaN, but {name} {listed} do; read them again")
    if low < -MARGIN or high > 1 + MARGIN:
        raise ValueError(
            f"{name} must be in [0, 1], got values from {low:.4g} to {high:.4g}; divide 8-bit images by 255, and leave "
            "normalisation to the model"
        )
