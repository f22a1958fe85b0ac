"""Which frame sees what another one sees, from exact depth."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 400


class Correspondence(NamedTuple):
    """A grid of pixels of every frame, found again in every frame.

    Attributes:
        points: Where in the world, `[B, S, n, 3]`.
        seen: Whether each frame sees it, `[B, S, n, S]`.
        u: Column at which each frame sees it, `[B, S, n, S]`; pixel centres are at integers.
        v: Row, likewise.
    """

    points: Tensor
    seen: Tensor
    u: Tensor
    v: Tensor


def correspond(depth: Tensor, poses: Tensor, intrinsics: Tensor, step: int) -> Correspondence:
    """Project every `step`-th pixel of every frame into every frame.

    A point is seen if it falls into the image and its depth lies between the nearest and the farthest of the four
    pixels around it, give or take 5 % and at most 15 cm: a wall between two rooms is 20 cm.

    Args:
        depth: `[B, S, H, W]`, 0 where it is not known.
        poses: Camera to world, `[B, S, 4, 4]`.
        intrinsics: fx, fy, cx, cy, `[B, 4]`.
        step: Pixels from one to the next; the first is the middle of the first square of this side.
    """
    height, width = depth.shape[-2:]
    rows, columns = (torch.arange(step // 2, side, step, device=depth.device) for side in (height, width))
    rows, columns = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    fx, fy, cx, cy = intrinsics[:, :, None, None].unbind(1)  # [B, 1, 1]
    z = depth[:, :, rows, columns]
    local = torch.stack([(columns - cx) / fx * z, (rows - cy) / fy * z, z], -1)  # [B, S, n, 3]
    points = local @ poses[..., :3, :3].mT + poses[..., None, :3, 3]

    offset = points[:, :, :, None] - poses[:, None, None, :, :3, 3]
    x, y, ahead = torch.einsum("bjrc,bsnjr->bsnjc", poses[..., :3, :3], offset).unbind(-1)
    fx, fy, cx, cy = (value[..., None] for value in (fx, fy, cx, cy))
    u, v = fx * x / ahead.clamp(min=1e-2) + cx, fy * y / ahead.clamp(min=1e-2) + cy
    inside = ((u - (width - 1) / 2).abs() < width / 2) & ((v - (height - 1) / 2).abs() < height / 2)
    around = _four_around(depth, u, v)
    slack = (0.05 * ahead).clamp(max=0.15)
    near, far = around.amin(0) - slack, around.amax(0) + slack
    seen = inside & (ahead > 0.05) & (z > 0)[..., None] & (ahead > near) & (ahead < far)
    return Correspondence(points, seen, u, v)


def overlap(depth: Tensor, poses: Tensor, intrinsics: Tensor) -> Tensor:
    """Return the share of the pixels of frame i that frame j sees, `[B, S, S]`, counted on about `CELLS` pixels."""
    height, width = depth.shape[-2:]
    step = max(1, int(math.sqrt(height * width / CELLS)))
    shares = [
        correspond(depth[scene], poses[scene], intrinsics[scene], step).seen.float().mean(2)
        for scene in (slice(number, number + 1) for number in range(len(depth)))  # one by one: S^2 n is large
    ]
    return torch.cat(shares)


def _four_around(depth: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the depths of the four pixels around (u, v) in the frame of the last axis, `[4, B, S, n, S]`."""
    batch, frames, height, width = depth.shape
    column, row = u.clamp(0, width - 2).long(), v.clamp(0, height - 2).long()
    scene = torch.arange(batch, device=depth.device)[:, None, None, None]
    frame = torch.arange(frames, device=depth.device)
    corner = ((scene * frames + frame) * height + row) * width + column
    values = depth.flatten()
    return torch.stack([values[corner + step] for step in (0, 1, width, width + 1)])
