"""What the losses compare with: everything in the axes of frame 0 and in units of the scene's scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svggt_kernels.demo.scenes import Scenes, correspond

COVISIBLE = 0.05


@dataclass(frozen=True)
class Truth:
    """Targets of a batch of scenes; N patches a frame.

    The scale of a scene is the mean distance of the points seen by frames that are connected to frame 0, from frame 0.

    Attributes:
        rotation: Camera to frame 0, `[B, S, 3, 3]`.
        centre: `[B, S, 3]`.
        half_view: Tangents of half the vertical and half the horizontal field of view, `[B, S, 2]`.
        log_depth: `[B, S, H, W]`.
        points: The point at the middle of each patch, `[B, S, N, 3]`.
        connected: 1 for frames that a chain of covisible frames connects to frame 0, else 0, `[B, S]`. The pose of
            other frames nobody could know.
        covisible: Which frames share a view, `[B, S, S]`.
        seen: Which frames see the point of a patch, `[B, S, N, S]`.
        patch: In which of their patches, `[B, S, N, S]`.
    """

    rotation: Tensor
    centre: Tensor
    half_view: Tensor
    log_depth: Tensor
    points: Tensor
    connected: Tensor
    covisible: Tensor
    seen: Tensor
    patch: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, scenes: Scenes, patch_size: int) -> Truth:
        """Return the targets of scenes for a model with patches of `patch_size` pixels."""
        frames, height, width = scenes.depth.shape[1:]
        found = correspond(scenes.depth, scenes.poses, scenes.intrinsics, patch_size)
        rows, columns = height // patch_size, width // patch_size
        row = ((found.v + 0.5) / patch_size).long().clamp(0, rows - 1)
        column = ((found.u + 0.5) / patch_size).long().clamp(0, columns - 1)
        share = found.seen.float().mean(2)
        covisible = torch.maximum(share, share.mT) > COVISIBLE
        connected = _connected(covisible)

        origin, centres = scenes.poses[:, 0, :3, 3], scenes.poses[..., :3, 3]
        axes = scenes.poses[:, 0, :3, :3]
        points = (found.points - origin[:, None, None]) @ axes[:, None]
        weight = connected[:, :, None].expand(points.shape[:-1])
        scale = (points.norm(dim=-1) * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)
        focal_x, focal_y = scenes.intrinsics[:, 0], scenes.intrinsics[:, 1]
        half_view = torch.stack([height / 2 / focal_y, width / 2 / focal_x], -1)
        return cls(
            rotation=axes.mT[:, None] @ scenes.poses[..., :3, :3],
            centre=(centres - origin[:, None]) @ axes / scale[:, None, None],
            half_view=half_view[:, None].expand(-1, frames, -1),
            log_depth=(scenes.depth.clamp(min=0.02) / scale[:, None, None, None]).log(),
            points=points / scale[:, None, None, None],
            connected=connected,
            covisible=covisible,
            seen=found.seen,
            patch=row * columns + column,
        )


def _connected(covisible: Tensor) -> Tensor:
    """Return 1.0 for frames `[B, S]` that a chain of covisible pairs `[B, S, S]` connects to frame 0."""
    reach = covisible.float()
    for _ in range(max(1, math.ceil(math.log2(covisible.shape[-1])))):
        reach = (reach @ reach > 0).float()
    return reach[:, 0]
