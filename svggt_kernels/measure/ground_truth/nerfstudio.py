"""Poses and depth maps of nerfstudio's transforms.json.

Camera axes there are those of OpenGL (x right, y up, z backward). Numbers of depth maps are multiplied by
`depth_unit_scale_factor`, as nerfstudio does for every kind of file; 0.001 where it is not given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...io.depth_maps import read_depth_map
from .base import Format, KnownPhoto, Reading, rigid

TO_OPENCV = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
MILLIMETRES = 0.001


def is_transforms(path: Path) -> bool:
    """Tell whether a file is a JSON file by its name."""
    return path.suffix.lower() == ".json" and path.is_file()


def read_transforms(path: Path, photos: Sequence[Path]) -> Reading:
    """Read the frames of a transforms.json."""
    try:
        content = json.loads(path.read_bytes())
        frames, scale = content["frames"], float(content.get("depth_unit_scale_factor", MILLIMETRES))
        sound = isinstance(frames, list) and all(isinstance(frame, dict) for frame in frames) and 0 < scale < torch.inf
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a transforms.json with frames ({type(error).__name__}: {error})") from error
    if not sound:
        raise ValueError(f"{path} must hold a list of frames, and a depth_unit_scale_factor above 0 if any")
    return Reading(
        "transforms.json", [_known(f"{path}, frame {i}", path.parent, frame, scale) for i, frame in enumerate(frames)]
    )


def _known(where: str, folder: Path, frame: Mapping[str, Any], scale: float) -> KnownPhoto:
    file, depth_file = frame.get("file_path"), frame.get("depth_file_path")
    if not isinstance(file, str) or not isinstance(depth_file, str | None):
        raise ValueError(f"{where} must have a file_path, and text as depth_file_path if any, got {sorted(frame)}")
    pose = rigid(f"{where}, transform_matrix", frame.get("transform_matrix")) * TO_OPENCV
    depth = None
    if depth_file is not None:
        depth_map = folder / depth_file
        if not depth_map.is_file():
            raise ValueError(f"{where} names {depth_map}, which is no file; put it there or take its name out")
        depth = partial(read_depth_map, depth_map, scale)
    # A path that leaves the folder can be told as a whole only.
    name = os.path.abspath(folder / file) if ".." in Path(file).parts else file
    return KnownPhoto(name, pose, depth)


NERFSTUDIO = Format("nerfstudio's transforms.json", is_transforms, read_transforms)
