"""Graphs from images made small: crude, and without any weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Scene
from .similarity import ImageSimilarity

SIDE = 16
ONE_COLOUR = 1e-6


@dataclass(frozen=True)
class ThumbnailSimilarity(ImageSimilarity):
    """Finds covisibility in the images made small. The attributes are those of `Similarity`."""

    by: ClassVar[str] = "thumbnails"

    def descriptors(self, scene: Scene) -> Tensor:
        """Return the thumbnail of each image less its mean colour, `[S, 768]` float32."""
        return thumbnails(scene.rgb)


def thumbnails(
    images: Tensor,  # [S, 3, H, W]
) -> Tensor:
    """Return one descriptor per image, `[S, 3 * 16 * 16]` float32: its thumbnail less the thumbnail's mean colour."""
    small = F.interpolate(images.detach().float(), size=(SIDE, SIDE), mode="area")
    descriptors = (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)
    # An image of one colour has no direction; all such images are alike.
    flat = descriptors.abs().amax(dim=1, keepdim=True) < ONE_COLOUR
    return torch.where(flat, torch.ones_like(descriptors), descriptors)
