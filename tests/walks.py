"""A rendered walk with exact poses and depth, and the files that others would have it in."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from svggt_kernels.demo.scenes import Draws, make_scenes

TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


class Walk(NamedTuple):
    """Photos in a folder, and what is exact about them.

    Attributes:
        photos: The files, in order.
        poses: Camera to world `[S, 4, 4]`, float64.
        depth: Metres, `[S, H, W]`.
    """

    photos: list[Path]
    poses: Tensor
    depth: Tensor


@lru_cache
def render(frames: int = 6, size: tuple[int, int] = (28, 42)) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[S, 3, H, W]` in [0, 1], poses `[S, 4, 4]` rigid in float64, and depth `[S, H, W]`."""
    scenes = make_scenes(1, frames, Draws(0), rooms=2, size=size)
    poses = scenes.poses[0].double()
    left, _, right = torch.linalg.svd(poses[:, :3, :3])
    poses[:, :3, :3] = left @ right
    return scenes.images[0], poses, scenes.depth[0]


def walk(folder: Path, names: Sequence[str] | None = None) -> Walk:
    """Render six photos into `folder / "images"`, called 000000.png and so on."""
    images, poses, depth = render()
    names = names or [f"{i:06d}.png" for i in range(len(images))]
    photos = [folder / "images" / name for name in names]
    photos[0].parent.mkdir(parents=True)
    for photo, image in zip(photos, images, strict=True):
        Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(photo)
    return Walk(photos, poses, depth)


def tag(photo: Path, orientation: int) -> None:
    """Give a photo an EXIF orientation; its pixels stay as they are stored, but for what JPEG loses."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(photo) as image:
        image.load()
    image.save(photo, exif=exif)


def quaternion(rotation: np.ndarray) -> list[float]:
    """(x, y, z, w) of a rotation: of the symmetric matrix that it makes, the eigenvector of the largest eigenvalue."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    symmetric = [
        [a - e - i, 0, 0, 0],
        [b + d, e - a - i, 0, 0],
        [c + g, f + h, i - a - e, 0],
        [h - f, c - g, d - b, a + e + i],
    ]
    return np.linalg.eigh(np.array(symmetric))[1][:, -1].tolist()


def words(numbers: Sequence[float]) -> str:
    return " ".join(repr(float(number)) for number in numbers)


def as_tum(path: Path, walk: Walk, times: Sequence[float]) -> Path:
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for time, pose in zip(times, walk.poses.numpy(), strict=True):
        lines.append(words([time, *pose[:3, 3], *quaternion(pose[:3, :3])]))
    path.write_text("\n".join(lines) + "\n")
    return path


def as_kitti(path: Path, walk: Walk) -> Path:
    path.write_text("".join(words(pose[:3].flatten()) + "\n" for pose in walk.poses.numpy()))
    return path


def as_transforms(path: Path, walk: Walk, **more: object) -> Path:
    """Names are images/000000.png; depth maps, exact ones, lie in `depth` beside the file."""
    (path.parent / "depth").mkdir()
    frames = []
    for photo, pose, depth in zip(walk.photos, walk.poses.numpy(), walk.depth, strict=True):
        np.save(path.parent / "depth" / f"{photo.stem}.npy", depth.numpy())
        frames.append(
            {
                "file_path": f"./images/{photo.name}",
                "depth_file_path": f"depth/{photo.stem}.npy",
                "transform_matrix": (pose @ TO_OPENGL).tolist(),
            }
        )
    path.write_text(json.dumps({"depth_unit_scale_factor": 1.0, "frames": frames, **more}))
    return path


def to_camera(pose: Tensor) -> tuple[list[float], list[float]]:
    """The motion from world to camera, as COLMAP has it: quaternion (w, x, y, z) and translation."""
    inverse = np.linalg.inv(pose.numpy())
    x, y, z, w = quaternion(inverse[:3, :3])
    return [w, x, y, z], inverse[:3, 3].tolist()


def as_colmap_text(folder: Path, walk: Walk, under: str = "") -> Path:
    """Every second image has a point, the others an empty line."""
    folder.mkdir(parents=True)
    lines = ["# Image list with two lines of data per image:"]
    for i, (photo, pose) in enumerate(zip(walk.photos, walk.poses, strict=True)):
        rotation, translation = to_camera(pose)
        lines += [
            f"{i + 1} {words(rotation)} {words(translation)} 1 {under}{photo.name}",
            "1.5 2.5 -1" if i % 2 else "",
        ]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def as_colmap_binary(folder: Path, walk: Walk) -> Path:
    folder.mkdir(parents=True)
    content = struct.pack("<Q", len(walk.photos))
    for i, (photo, pose) in enumerate(zip(walk.photos, walk.poses, strict=True)):
        rotation, translation = to_camera(pose)
        content += struct.pack("<I7dI", i + 1, *rotation, *translation, 1) + photo.name.encode() + b"\0"
        content += struct.pack("<Q", i) + struct.pack("<2dq", 1.5, 2.5, -1) * i
    (folder / "images.bin").write_bytes(content)
    return folder
