"""HiRoom of DA3-Bench: a scene's folders image, pose, depth and aliasing_mask, and cam_K.npy.

Poses are world to camera, one .npy a photo. Depth is a PNG of 16 bits, 65535 being 100 metres, unknown where it is 0 or
where the aliasing mask is not. All scenes have the same file names: the name of a photo is `828805/1/image/0`. Layout:
package depth-anything-3 0.1.1, `depth_anything_3/bench/datasets/hiroom.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ...io.depth_maps import read_array, read_depth_map
from ...io.photos import read_levels
from ...rigid_motions import inverse
from .base import Format, KnownPhoto, Reading, rigid

METRES = 100 / 65535


def is_scene(path: Path) -> bool:
    """Tell whether a folder is the folder of a scene's poses."""
    return path.name == "pose" and any(path.glob("*.npy")) and (path.parent / "cam_K.npy").is_file()


def read_scene(path: Path, photos: Sequence[Path]) -> Reading:
    """Read every pose, and the depth map of each photo that has one."""
    known = []
    for file in sorted(path.glob("*.npy")):
        depth = path.parent / "depth" / f"{file.stem}.png"
        mask = path.parent / "aliasing_mask" / f"{file.stem}.png"
        reader = partial(_read, depth, mask) if depth.is_file() else None
        name = str(Path(*path.parent.parts[-2:], "image", file.stem))
        known.append(KnownPhoto(name, inverse(rigid(str(file), read_array(file))), reader))
    return Reading("HiRoom", known)


def _read(path: Path, mask: Path) -> Tensor:
    depth = read_depth_map(path, METRES)
    if mask.is_file():
        levels = read_levels(mask)
        if levels.shape != depth.shape:
            raise ValueError(
                f"{mask} must be grey and of the size of {path}, {list(depth.shape)}, got {list(levels.shape)}"
            )
        depth[levels > 0] = 0
    return depth


HIROOM = Format(
    "the poses of HiRoom (folder pose beside cam_K.npy)", is_scene, read_scene, lambda folder: folder.parent / "pose"
)
