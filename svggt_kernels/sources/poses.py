"""Covisibility from cameras: which frames look into the same part of space."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..graph.arguments import first_true, tensor
from ..graph.graph import CovisibilityGraph
from ..user_warnings import warn

SAMPLES = 8  # along each image side, and along each ray
ROTATION_TOLERANCE = 1e-3
HOMOGENEOUS_TOLERANCE = 1e-6
# Samples that miss a frustum by this share of its image or depth lie on its border, which rounding moves.
BORDER = 1e-5
# Largest spacing of the numbers that hold the positions, as a share of the nearest depth.
COARSE = 0.01


def from_poses(
    camera_to_world: Tensor | np.ndarray,  # [S, 4, 4] or [S, 3, 4]
    intrinsics: Tensor | np.ndarray,  # [S, 3, 3] or [3, 3]
    depth_range: tuple[float, float],
    image_size: tuple[int, int],
    *,
    min_overlap: float = 0.05,
) -> CovisibilityGraph:
    """Build the graph of frames whose view frusta overlap; what stands between them is not known, so it errs to edges.

    Frame i sees frame j, and j sees i, if at least `min_overlap` of either frustum lies in the other. Where the origin
    of the world lies does not matter, as long as the numbers that hold the positions can tell them apart.

    Args:
        camera_to_world: Poses, axes as in OpenCV (x right, y down, z forward), float32 or float64. Invert
            world-to-camera ones first. Positions far from the origin (UTM) need float64.
        intrinsics: Focal lengths and principal point in pixels, [[fx, skew, cx], [0, fy, cy], [0, 0, 1]], of each frame
            or one for all.
        depth_range: Nearest and farthest depth at which something may be seen, in the unit of the poses.
        image_size: Height and width in pixels.
        min_overlap: Share of a frustum, in (0, 1].

    Raises:
        ValueError: If the poses are not rigid, or anything else is not what it must be.
        TypeError: If poses or intrinsics are neither tensors nor arrays, or are coarser than float32.

    Warns:
        UserWarning: If the positions are held more coarsely than 1 % of the nearest depth.
    """
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap must be in (0, 1], got {min_overlap}")
    overlap = frustum_overlap(camera_to_world, intrinsics, depth_range, image_size)
    return CovisibilityGraph.from_dense((overlap >= min_overlap) | (overlap.T >= min_overlap), square=True)


def frustum_overlap(
    camera_to_world: Tensor | np.ndarray,  # [S, 4, 4] or [S, 3, 4]
    intrinsics: Tensor | np.ndarray,  # [S, 3, 3] or [3, 3]
    depth_range: tuple[float, float],
    image_size: tuple[int, int],
) -> Tensor:
    """Return the share of frame i's frustum that lies in frame j's, `[S, S]` float32.

    8 x 8 x 8 points of each frustum, even over the image and in inverse depth, are projected into every other frame
    (after COLMAP's benchmark rule for covisible pairs), in float64. The arguments are those of `from_poses`.
    """
    (height, width), (near, far) = image_size, depth_range
    if not 0 < near < far < float("inf"):
        raise ValueError(f"depth_range must be (near, far) with 0 < near < far, finite, got {depth_range}")
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}")
    given = tensor("camera_to_world", camera_to_world)
    poses = _checked_poses(given)
    cameras = _checked_cameras(tensor("intrinsics", intrinsics), poses)
    _warn_if_coarse(given, near)
    frames = len(poses)

    middles = (torch.arange(SAMPLES, dtype=poses.dtype, device=poses.device) + 0.5) / SAMPLES
    depths = 1 / (1 / near + middles * (1 / far - 1 / near))
    y, x, z = torch.meshgrid(middles * height, middles * width, depths, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3) @ cameras.inverse().mT
    points = (rays * z.reshape(1, -1, 1)) @ poses[:, :3, :3].mT + poses[:, None, :3, 3]  # [S, K, 3]

    margin = poses.new_tensor([width, height]) * BORDER
    limits = poses.new_tensor([width, height]) + margin
    overlap = torch.empty(frames, frames, dtype=torch.float32, device=poses.device)
    for j in range(frames):
        seen = (points - poses[j, :3, 3]) @ poses[j, :3, :3] @ cameras[j].T  # pixels times depth, depth
        depth = seen[..., 2]
        pixels = seen[..., :2] / depth[..., None].clamp_min(near)
        reached = (depth >= near * (1 - BORDER)) & (depth <= far * (1 + BORDER))
        inside = reached & ((pixels >= -margin) & (pixels <= limits)).all(dim=-1)
        overlap[:, j] = inside.float().mean(dim=1)
    return overlap.to(given.device)


def _checked_poses(camera_to_world: Tensor) -> Tensor:
    """Return rigid poses in float64, moved so that the mean position is the origin."""
    if camera_to_world.dim() != 3 or camera_to_world.shape[1:] not in ((4, 4), (3, 4)) or not len(camera_to_world):
        raise ValueError(f"camera_to_world must be [S, 4, 4] or [S, 3, 4], got {list(camera_to_world.shape)}")
    poses = _as_float64("camera_to_world", camera_to_world)
    rotations, positions = poses[:, :3, :3], poses[:, :3, 3]
    error = (rotations @ rotations.mT - torch.eye(3, dtype=poses.dtype, device=poses.device)).abs().amax(dim=(1, 2))
    sound = (error < ROTATION_TOLERANCE) & (torch.linalg.det(rotations) > 0) & poses.isfinite().all(dim=(1, 2))
    if (frame := first_true(~sound)) is not None:
        raise ValueError(
            f"camera_to_world must hold rigid motions, finite and without scale or mirror, but that of frame {frame} "
            "does not; divide the scale out of its rotation"
        )
    return torch.cat([rotations, (positions - positions.mean(dim=0))[..., None]], dim=2)


def _warn_if_coarse(camera_to_world: Tensor, near: float) -> None:
    """Warn where the numbers that hold the positions lie farther apart than 1 % of the nearest depth."""
    precision = camera_to_world.dtype if camera_to_world.is_floating_point() else torch.float64
    spacing = torch.finfo(precision).eps * float(camera_to_world.detach()[:, :3, 3].abs().max())
    if spacing > COARSE * near:
        warn(
            f"camera_to_world is {precision}, which holds the positions to {spacing:.2g} only, but the nearest depth "
            f"is {near:.2g}; give float64, or subtract the mean position before rounding",
        )


def _checked_cameras(intrinsics: Tensor, poses: Tensor) -> Tensor:
    """Return one invertible camera per pose, `[S, 3, 3]` float64."""
    frames = len(poses)
    if intrinsics.shape not in ((3, 3), (frames, 3, 3)):
        raise ValueError(f"intrinsics must be [{frames}, 3, 3] or [3, 3], got {list(intrinsics.shape)}")
    cameras = _as_float64("intrinsics", intrinsics).to(poses.device).expand(frames, 3, 3)
    if not bool((cameras[:, [0, 1], [0, 1]] > 0).all() & cameras.isfinite().all()):
        raise ValueError("intrinsics must be finite with focal lengths above 0, in pixels")
    fixed = cameras[:, [1, 2, 2, 2], [0, 0, 1, 2]] - poses.new_tensor([0, 0, 0, 1])
    if (frame := first_true((fixed.abs() > HOMOGENEOUS_TOLERANCE).any(dim=1))) is not None:
        raise ValueError(
            f"intrinsics must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]], got {cameras[frame].tolist()} for frame "
            f"{frame}"
        )
    return cameras


def _as_float64(name: str, value: Tensor) -> Tensor:
    """Return an argument in float64, on the CPU if its device has none."""
    if value.is_complex() or (value.is_floating_point() and torch.finfo(value.dtype).bits < 32):
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}, whose rounding moves what a camera sees; compute "
            "it in float32 at least"
        )
    value = value.detach()
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)
