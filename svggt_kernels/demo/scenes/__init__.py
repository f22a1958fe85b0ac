"""Rendered flats: batches of scenes with exact depth, poses, intrinsics and covisibility, drawn from a seed.

World: x east, y north, z up, metres. Camera: x right, y down, z forward; pixel centres at integers; poses are camera to
world. The same seed on the same kind of device gives the same scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .boxes import furnish
from .cameras import FAMILIES, HELD_OUT, draw_cameras
from .covisibility import Correspondence, correspond, overlap
from .draws import Draws
from .flats import PLANS, draw_flats
from .renderer import render
from .surfaces import paint

__all__ = [
    "FAMILIES",
    "HELD_OUT",
    "PLANS",
    "SIZE",
    "Correspondence",
    "Draws",
    "Scenes",
    "correspond",
    "make_scenes",
    "overlap",
]

SIZE = (112, 154)


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes of the same number of frames.

    Attributes:
        images: RGB in [0, 1], `[B, S, 3, H, W]`.
        depth: Metres along the optical axis, 0 where there is nothing, `[B, S, H, W]`.
        poses: Camera to world, `[B, S, 4, 4]`.
        intrinsics: fx, fy, cx, cy in pixels, shared by the frames of a scene, `[B, 4]`.
        boxes: What the flats are made of, `[B, K, 32]`, see `boxes`.
    """

    images: Tensor
    depth: Tensor
    poses: Tensor
    intrinsics: Tensor
    boxes: Tensor

    def overlap(self) -> Tensor:
        """Return the share of the pixels of frame i that frame j sees, `[B, S, S]`."""
        return overlap(self.depth, self.poses, self.intrinsics)


@torch.no_grad()
def make_scenes(
    batch: int,
    frames: int,
    draws: Draws,
    *,
    families: Mapping[str, float] | str = "walk",
    rooms: int = 4,
    difficulty: float = 1.0,
    shuffled: float = 0.0,
    size: tuple[int, int] = SIZE,
) -> Scenes:
    """Draw flats and cameras and render all frames.

    Args:
        batch: Scenes, B.
        frames: Frames of each scene, S.
        draws: Random numbers; the scenes are on their device.
        families: A family of camera paths, or several with weights, from which each scene draws its own.
        rooms: Rooms of each flat, one of `PLANS`.
        difficulty: From 0, small steps and much overlap, to 1.
        shuffled: Share of the scenes whose frames come in random order.
        size: Height and width in pixels.

    Raises:
        ValueError: If a family or a number of rooms is not known.
    """
    families = {families: 1.0} if isinstance(families, str) else families
    unknown = [family for family in families if family not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"families must be among {', '.join(FAMILIES)}, got {', '.join(unknown) or 'none'}")
    flats = draw_flats(batch, rooms, draws)
    poses = draw_cameras(flats, frames, families, difficulty, draws)
    if shuffled > 0:
        in_order = torch.linspace(0, 1, frames, device=draws.device)
        order = torch.where(draws.chance(shuffled, batch, 1), draws.uniform(0, 1, batch, frames), in_order).argsort(1)
        poses = poses.gather(1, order[:, :, None, None].expand(-1, -1, 4, 4))
    boxes = furnish(flats, poses, draws)
    paint(boxes, flats, draws)
    boxes = boxes.flatten(1, 2)
    height, width = size
    focal = width / (2 * torch.tan(torch.deg2rad(draws.uniform(55, 85, batch)) / 2))
    middle = torch.ones_like(focal)
    intrinsics = torch.stack([focal, focal, middle * (width - 1) / 2, middle * (height - 1) / 2], 1)
    images, depth = render(boxes, poses, intrinsics, size)
    return Scenes(images, depth, poses, intrinsics, boxes)
