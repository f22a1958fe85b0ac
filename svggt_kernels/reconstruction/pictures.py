"""Small pictures of photos and of their depth, `[H, W, 3]` uint8."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def near_is_bright(depth: Tensor) -> np.ndarray:
    """Return a depth map `[H, W]` as a grey picture; what is not known is black."""
    near = 1 / depth.double().where(depth.isfinite() & (depth > 0), float("inf"))
    low, high = np.quantile(near.numpy(), (0.02, 0.98))
    grey = ((near - low) / max(high - low, 1e-12)).clamp(0, 1).mul(255).round().byte()
    return grey[..., None].expand(-1, -1, 3).numpy()


def smaller(picture: np.ndarray, longest: int) -> np.ndarray:
    """Return every n-th pixel of a picture, so that no side is longer than that."""
    step = -(-max(picture.shape[:2]) // longest)
    return np.ascontiguousarray(picture[::step, ::step])
