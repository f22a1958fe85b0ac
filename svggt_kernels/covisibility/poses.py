"""Covisibility from cameras: which frames look into the same part of space."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import CovisibilityGraph

SAMPLES = 8  # along each image side, and along each ray
ROTATION_TOLERANCE = 1e-3


def from_poses(
    camera_to_world: Tensor,  # [S, 4, 4] or [S, 3, 4]
    intrinsics: Tensor,  # [S, 3, 3] or [3, 3]
    depth_range: tuple[float, float],
    image_size: tuple[int, int],
    *,
    min_overlap: float = 0.05,
) -> CovisibilityGraph:
    """Build the graph of frames whose view frusta overlap; what stands between them is not known, so it errs to edges.

    Frame i sees frame j, and j sees i, if at least `min_overlap` of either frustum lies in the other.

    Args:
        camera_to_world: Poses, axes as in OpenCV (x right, y down, z forward). Invert world-to-camera ones first.
        intrinsics: Focal lengths and principal point in pixels, of each frame or one for all.
        depth_range: Nearest and farthest depth at which something may be seen, in the unit of the poses.
        image_size: Height and width in pixels.
        min_overlap: Share of a frustum, in (0, 1].

    Raises:
        ValueError: If the poses are not rigid, or anything else is not what it must be.
    """
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap must be in (0, 1], got {min_overlap}")
    overlap = frustum_overlap(camera_to_world, intrinsics, depth_range, image_size)
    return CovisibilityGraph.from_dense((overlap >= min_overlap) | (overlap.T >= min_overlap), square=True)


def frustum_overlap(
    camera_to_world: Tensor,  # [S, 4, 4] or [S, 3, 4]
    intrinsics: Tensor,  # [S, 3, 3] or [3, 3]
    depth_range: tuple[float, float],
    image_size: tuple[int, int],
) -> Tensor:
    """Return the share of frame i's frustum that lies in frame j's, `[S, S]` float32.

    8 x 8 x 8 points of each frustum, even over the image and in inverse depth, are projected into every other frame
    (after COLMAP's benchmark rule for covisible pairs). The arguments are those of `from_poses`.
    """
    poses = _checked_poses(camera_to_world)
    frames, (height, width), (near, far) = len(poses), image_size, depth_range
    if not 0 < near < far < float("inf"):
        raise ValueError(f"depth_range must be (near, far) with 0 < near < far, finite, got {depth_range}")
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}")
    if intrinsics.shape not in ((3, 3), (frames, 3, 3)):
        raise ValueError(f"intrinsics must be [{frames}, 3, 3] or [3, 3], got {list(intrinsics.shape)}")
    cameras = intrinsics.to(poses).expand(frames, 3, 3)
    if not bool((cameras[:, [0, 1], [0, 1]] > 0).all() & cameras.isfinite().all()):
        raise ValueError("intrinsics must be finite with focal lengths above 0, in pixels")

    middles = (torch.arange(SAMPLES, dtype=poses.dtype, device=poses.device) + 0.5) / SAMPLES
    depths = 1 / (1 / near + middles * (1 / far - 1 / near))
    y, x, z = torch.meshgrid(middles * height, middles * width, depths, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3) @ cameras.inverse().mT
    points = (rays * z.reshape(1, -1, 1)) @ poses[:, :3, :3].mT + poses[:, None, :3, 3]  # [S, K, 3]

    overlap = torch.empty(frames, frames, dtype=torch.float32, device=poses.device)
    for j in range(frames):
        seen = (points - poses[j, :3, 3]) @ poses[j, :3, :3] @ cameras[j].T  # pixels times depth, depth
        depth = seen[..., 2]
        pixels = seen[..., :2] / depth[..., None].clamp_min(near)
        limits = pixels.new_tensor([width, height])
        inside = (depth >= near) & (depth <= far) & ((pixels >= 0) & (pixels <= limits)).all(dim=-1)
        overlap[:, j] = inside.float().mean(dim=1)
    return overlap


def _checked_poses(camera_to_world: Tensor) -> Tensor:
    if camera_to_world.dim() != 3 or camera_to_world.shape[1:] not in ((4, 4), (3, 4)) or not len(camera_to_world):
        raise ValueError(f"camera_to_world must be [S, 4, 4] or [S, 3, 4], got {list(camera_to_world.shape)}")
    poses = camera_to_world.detach().float()
    rotations = poses[:, :3, :3]
    error = (rotations @ rotations.mT - torch.eye(3, device=poses.device)).abs().amax(dim=(1, 2))
    sound = (error < ROTATION_TOLERANCE) & (torch.linalg.det(rotations) > 0) & poses.isfinite().all(dim=(1, 2))
    if not bool(sound.all()):
        frame = int((~sound).nonzero()[0])
        raise ValueError(
            f"camera_to_world must hold rigid motions, finite and without scale or mirror, but that of frame {frame} "
            "does not; divide the scale out of its rotation"
        )
    return poses
