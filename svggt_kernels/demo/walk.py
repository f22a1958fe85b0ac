"""A rendered walk through a flat: images with exact depth, poses and covisibility, made without any download.

Axes and pixels are those of `flat` and `render`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .flat import SHELL, build_flat
from .render import Renderer, pixel_grid

__all__ = ["RenderedWalk", "walk"]

EYE = 1.5  # height of the camera, metres


@dataclass(frozen=True, eq=False)
class RenderedWalk:
    """The frames of one walk and the exact geometry behind them.

    Attributes:
        images: RGB in [0, 1], `[S, 3, H, W]` float32.
        depth: Distance along the optical axis in metres, `[S, H, W]` float32.
        poses: Camera to world, `[S, 4, 4]` float64.
        intrinsics: Pinhole matrix in pixels, `[3, 3]` float64, shared by all frames.
        overlap: `[S, S]` float32; entry (i, j) is the share of the pixels of frame i that frame j sees too.
        rooms: Floor rectangles (x_min, y_min, x_max, y_max) in metres, `[8, 4]` float64, in the order of the walk.
        room_of_frame: Index into `rooms` for each frame, `[S]` int64.
    """

    images: Tensor
    depth: Tensor
    poses: Tensor
    intrinsics: Tensor
    overlap: Tensor
    rooms: Tensor
    room_of_frame: Tensor

    def covisible_pairs(self, threshold: float = 0.05) -> Tensor:
        """Return the ordered pairs (i, j), i != j, of frames that share a view, `[E, 2]` int64.

        Both (i, j) and (j, i) are listed when either overlap exceeds the threshold.

        Args:
            threshold: Share of pixels, in [0, 1).

        Raises:
            ValueError: If the threshold is not in [0, 1).
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be a share of pixels in [0, 1), got {threshold}")
        seen = torch.maximum(self.overlap, self.overlap.T) > threshold
        return seen.fill_diagonal_(False).nonzero()


def walk(
    num_frames: int = 48,
    height: int = 252,
    width: int = 336,
    seed: int = 0,
    *,
    field_of_view: float = 75.0,
) -> RenderedWalk:
    """Render a walk once around the flat; the last frames are back in the first room, close to the first frame.

    The frames are equally spaced along the path, about 0.75 m apart for 48 frames. With fewer than about 24, neighbours
    may share no view. Deterministic for given arguments.

    Args:
        num_frames: `S`, at least 1.
        height: Image height in pixels.
        width: Image width in pixels.
        seed: Decides the floor plan's measures, the colours, the patterns and the furniture.
        field_of_view: Horizontal, in degrees, between 10 and 150.

    Raises:
        ValueError: If a size is not positive or the field of view is out of range.
    """
    if min(num_frames, height, width) < 1:
        raise ValueError(f"num_frames, height and width must be at least 1, got {num_frames}, {height}, {width}")
    if not 10 <= field_of_view <= 150:
        raise ValueError(f"field_of_view must be between 10 and 150 degrees, got {field_of_view}")

    flat = build_flat(np.random.default_rng(seed))
    poses = _poses(flat.path, num_frames)
    focal = width / (2 * math.tan(math.radians(field_of_view) / 2))
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])

    renderer = Renderer(flat)
    images = np.empty((num_frames, 3, height, width), dtype=np.float32)
    depth = np.empty((num_frames, height, width), dtype=np.float32)
    for frame, pose in enumerate(poses):
        images[frame], depth[frame] = renderer.render(pose, intrinsics, height, width)

    eyes = poses[:, None, :2, 3]
    inside = ((eyes >= flat.rooms[:, :2] - SHELL) & (eyes <= flat.rooms[:, 2:] + SHELL)).all(2)
    return RenderedWalk(
        images=torch.from_numpy(images),
        depth=torch.from_numpy(depth),
        poses=torch.from_numpy(poses),
        intrinsics=torch.from_numpy(intrinsics),
        overlap=torch.from_numpy(_overlap(depth, poses, intrinsics)),
        rooms=torch.from_numpy(flat.rooms),
        room_of_frame=torch.from_numpy(inside.argmax(1)),
    )


def _poses(path: np.ndarray, num_frames: int) -> np.ndarray:
    """Return camera-to-world poses `[S, 4, 4]` at equal steps along the closed path, looking where it leads."""
    step = np.linalg.norm(np.roll(path, -1, axis=0) - path, axis=1)
    travelled, length = np.cumsum(step) - step, step.sum()
    laps = np.linspace(-length, 2 * length, 6000)
    x, y = (np.interp(laps, travelled, coordinate, period=length) for coordinate in path.T)
    yaw = np.unwrap(np.arctan2(np.diff(y), np.diff(x)))
    turned = np.cumsum(yaw) * (laps[1] - laps[0])  # the integral of yaw, whose differences give mean directions

    here = np.arange(num_frames) * length / num_frames
    behind, ahead = 1.0, 2.0  # metres of the path that the direction is the mean of, so that turns are gradual
    yaw = np.interp(here + ahead, laps[1:], turned) - np.interp(here - behind, laps[1:], turned)
    yaw /= behind + ahead
    pitch = math.radians(-6)
    forward = np.stack([np.cos(yaw) * math.cos(pitch), np.sin(yaw) * math.cos(pitch), 0 * yaw + math.sin(pitch)], 1)
    right = np.stack([np.sin(yaw), -np.cos(yaw), 0 * yaw], axis=1)

    poses = np.zeros((num_frames, 4, 4))
    poses[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=2)
    poses[:, :3, 3] = np.stack([np.interp(here, laps, x), np.interp(here, laps, y), np.full(num_frames, EYE)], axis=1)
    poses[:, 3, 3] = 1
    return poses


def _overlap(
    depth: np.ndarray,  # [S, H, W]
    poses: np.ndarray,  # [S, 4, 4]
    to_pixels: np.ndarray,  # [3, 3]
    tolerance: float = 0.05,
) -> np.ndarray:
    """Return `[S, S]`: the share of the pixels of frame i that frame j sees, tested on a grid of about 1000 pixels.

    A point of frame i is seen in frame j if it projects into the image of j and its depth there agrees with one of the
    four pixels around it within `tolerance`, and within 15 cm, less than a wall is thick.
    """
    frames, height, width = depth.shape
    stride = max(1, round(math.sqrt(height * width / 1000)))
    rows, columns = (np.arange((size - 1) % stride // 2, size, stride) for size in (height, width))
    rays = np.linalg.inv(to_pixels) @ pixel_grid(rows, columns)  # [3, n]
    to_camera = np.linalg.inv(poses)
    maps = depth.reshape(frames, -1)
    overlap = np.empty((frames, frames), dtype=np.float32)
    for frame in range(frames):
        relative = to_camera @ poses[frame]  # [S, 4, 4] from this camera to all cameras
        points = relative[:, :3, :3] @ (rays * depth[frame][np.ix_(rows, columns)].ravel()) + relative[:, :3, 3:]
        x, y, z = (to_pixels @ points).swapaxes(0, 1)  # [S, n] each
        column, row = x / np.maximum(z, 1e-3), y / np.maximum(z, 1e-3)
        inside = (z > 0) & (abs(column - (width - 1) / 2) < width / 2) & (abs(row - (height - 1) / 2) < height / 2)
        left, top = (
            np.clip(np.floor(at), 0, last).astype(np.int64) for at, last in ((column, width - 1), (row, height - 1))
        )
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        around = [row * width + column for row in (top, bottom) for column in (left, right)]
        error = np.min([abs(np.take_along_axis(maps, pixel, axis=1) - z) for pixel in around], axis=0)
        overlap[frame] = (inside & (error < np.minimum(tolerance * z, 0.15))).mean(1)
    return overlap
