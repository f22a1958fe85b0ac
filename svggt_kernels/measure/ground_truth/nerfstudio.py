"""Poses and depth maps of nerfstudio's transforms.json.

Camera axes there are those of OpenGL (x right, y up, z backward). Numbers of depth maps are multiplied by
`depth_unit_scale_factor`, as nerfstudio does for every kind of file; 0.001 where it is not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...io.depth_maps import read_depth_map
from ...io.transforms import TURNED_AXES, photo_name, read_frames
from .base import Format, KnownPhoto, Reading, rigid

MILLIMETRES = 0.001


def is_transforms(path: Path) -> bool:
    """Tell whether a file is a JSON file by its name."""
    return path.suffix.lower() == ".json" and path.is_file()


def read_transforms(path: Path, photos: Sequence[Path]) -> Reading:
    """Read the frames of a transforms.json."""
    content, frames = read_frames(path)
    try:
        scale = float(content.get("depth_unit_scale_factor", MILLIMETRES))
    except (ValueError, TypeError):
        scale = torch.nan
    if not 0 < scale < torch.inf:
        raise ValueError(f"{path} must have a depth_unit_scale_factor above 0 if any")
    return Reading("transforms.json", [_known(path, i, frame, scale) for i, frame in enumerate(frames)])


def _known(path: Path, number: int, frame: dict[str, Any], scale: float) -> KnownPhoto:
    where, depth_file = f"{path}, frame {number}", frame.get("depth_file_path")
    if not isinstance(depth_file, str | None):
        raise ValueError(f"{where} must have text as depth_file_path if any, got {depth_file!r}")
    pose = rigid(f"{where}, transform_matrix", frame.get("transform_matrix")) * TURNED_AXES
    depth = None
    if depth_file is not None:
        depth_map = path.parent / depth_file
        if not depth_map.is_file():
            raise ValueError(f"{where} names {depth_map}, which is no file; put it there or take its name out")
        depth = partial(read_depth_map, depth_map, scale)
    return KnownPhoto(photo_name(path, frame), pose, depth)


NERFSTUDIO = Format("nerfstudio's transforms.json", is_transforms, read_transforms)
