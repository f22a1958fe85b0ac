"""Points in the world from depth and cameras, and which other photos agree that they see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .scene import Reconstruction

EDGE = 1.1
"""Farthest / nearest depth of a pixel and its neighbours above which the pixel lies at an edge of two surfaces."""

NOISE = 0.1
"""Share of pixels away from edges below which depth is noise, as of random weights, and edges are kept."""

AGREE = 0.05
"""Largest difference of two depths of one point, as a share of either."""

SEED = 0


@dataclass(frozen=True)
class PointChoice:
    """Which pixels become points.

    Attributes:
        max_points: Points at most; of more, so many are drawn, always the same.
        least_confident: Share of all pixels that is left out because the model is least sure of them, in [0, 1).
        edges: Whether pixels at edges of depth are kept, whose depth is often that of neither side.

    Raises:
        ValueError: If a number is out of range.
    """

    max_points: int = 1_000_000
    least_confident: float = 0.3
    edges: bool = False

    def __post_init__(self) -> None:
        if self.max_points < 1 or not 0 <= self.least_confident < 1:
            raise ValueError(
                "max_points must be at least 1 and least_confident in [0, 1), got "
                f"{self.max_points} and {self.least_confident}"
            )


@dataclass(frozen=True, eq=False)
class PointCloud:
    """Points in the world; N of them, in the order of the frames.

    Attributes:
        points: `[N, 3]`, float64.
        colours: `[N, 3]`, uint8.
        frames: Which frame each is of, `[N]` int64.
        pixels: Where in that frame, `[N, 2]` float64; the centre of the first pixel is (0.5, 0.5).
    """

    points: Tensor
    colours: Tensor
    frames: Tensor
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def first_drawn(self, most: int) -> PointCloud:
        """Return so many of the points, drawn from all; always the same."""
        kept = _drawn(len(self), most)
        return PointCloud(self.points[kept], self.colours[kept], self.frames[kept], self.pixels[kept])


class Sightings(NamedTuple):
    """Which photos see points of a cloud; M sightings, photo after photo.

    Attributes:
        point: The point `[M]`.
        photo: Who sees it `[M]`.
        pixels: Where, in pixels of the stored photo `[M, 2]`.
    """

    point: Tensor
    photo: Tensor
    pixels: Tensor


def point_cloud(scene: Reconstruction, choice: PointChoice) -> PointCloud:
    """Return the points that pixels of all frames show.

    Raises:
        ValueError: If no pixel has a depth that is finite and above 0.
    """
    usable = _usable(scene, choice).flatten(1)
    ends = usable.sum(1).cumsum(0)
    drawn = _drawn(int(ends[-1]), choice.max_points)
    width, parts = scene.frame_size[0], []
    for frame, (pose, intrinsics) in enumerate(zip(scene.poses, scene.intrinsics, strict=True)):
        end = int(ends[frame])
        start = end - int(usable[frame].sum())
        places = usable[frame].nonzero()[:, 0][drawn[(drawn >= start) & (drawn < end)] - start]
        pixels = torch.stack([places % width, places // width], 1).double() + 0.5
        rays = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1) @ torch.linalg.inv(intrinsics).mT
        local = rays * scene.depth[frame].flatten()[places, None].double()
        points = local @ pose[:3, :3].mT + pose[:3, 3]
        parts.append((points, scene.colours[frame].flatten(0, 1)[places], torch.full_like(places, frame), pixels))
    return PointCloud(*(torch.cat(part) for part in zip(*parts, strict=True)))


def sightings(scene: Reconstruction, cloud: PointCloud) -> Sightings:
    """Return which photos see which points, by the depth of each photo's frame.

    The frame that a point is of sees it. Another frame sees it if the point falls into the frame, in front of the
    camera, and the frame's depth at the nearest pixel is that of the point, give or take `AGREE`.
    """
    width, height = scene.frame_size
    found = []
    for number, (pose, intrinsics, camera) in enumerate(zip(scene.poses, scene.intrinsics, scene.cameras, strict=True)):
        seen = (cloud.points - pose[:3, 3]) @ pose[:3, :3] @ intrinsics.mT
        depth = seen[:, 2]
        pixels = seen[:, :2] / depth[:, None]
        inside = (depth > 0) & (pixels >= 0).all(1) & (pixels[:, 0] < width) & (pixels[:, 1] < height)
        column, row = pixels.where(inside[:, None], 0.0).long().unbind(1)
        there = scene.depth[number][row, column].double()
        agrees = inside & ((there - depth).abs() <= AGREE * torch.minimum(there, depth))
        own = cloud.frames == number
        point = (agrees | own).nonzero()[:, 0]
        exact = torch.where(own[:, None], cloud.pixels, pixels)[point]
        of_photo = exact @ camera.of_frame[:, :2].mT + camera.of_frame[:, 2]
        found.append((point, torch.full_like(point, number), of_photo))
    return Sightings(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _usable(scene: Reconstruction, choice: PointChoice) -> Tensor:
    """Return which pixels become points, `[S, H, W]`."""
    depth, confidence = scene.depth, scene.confidence
    usable = depth.isfinite() & (depth > 0) & confidence.isfinite()
    if not usable.any():
        raise ValueError("no pixel has a depth that is finite and above 0; check the weights and the photos")
    least = np.quantile(confidence[usable].numpy(), choice.least_confident)
    usable &= confidence >= float(least)
    if not choice.edges:
        smooth = torch.stack([_is_smooth(frame) for frame in depth])
        if int((usable & smooth).sum()) >= NOISE * int(usable.sum()):
            usable &= smooth
    return usable


def _is_smooth(depth: Tensor) -> Tensor:
    """Return at which pixels `[H, W]` the depth of the eight neighbours is nearly the same."""
    known = depth.nan_to_num(0, 0, 0).clamp(min=0)[None, None]
    padded = F.pad(known, (1, 1, 1, 1), mode="replicate")
    farthest, nearest = F.max_pool2d(padded, 3, 1), -F.max_pool2d(-padded, 3, 1)
    return (farthest <= EDGE * nearest)[0, 0]


def _drawn(count: int, most: int) -> Tensor:
    """Return `most` of so many places in their order, or all."""
    if count <= most:
        return torch.arange(count)
    drawn = np.random.default_rng(SEED).choice(count, most, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn))
