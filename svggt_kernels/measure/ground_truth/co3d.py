"""CO3D, version 1 and 2: a category's frame_annotations.jgz, and its sequences' images, depths and depth_masks.

A viewpoint is PyTorch3D's: X_camera = X_world R + T, x left, y up, z forward. Depth is a PNG of 16 bits that are a
float16, times `scale_adjustment`, unknown outside the mask. Layout: co3d/dataset/data_types.py of its repository.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...io.depth_maps import scaled
from ...io.photos import read_levels
from ...rigid_motions import inverse
from .base import Format, KnownPhoto, Reading, rigid

ANNOTATIONS = "frame_annotations.jgz"
TO_OPENCV = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)


def is_annotations(path: Path) -> bool:
    """Tell whether a file holds the annotations of a category."""
    return path.name == ANNOTATIONS and path.is_file()


def read_annotations(path: Path, photos: Sequence[Path]) -> Reading:
    """Read the frames of the one sequence in whose folder `images` the photos lie."""
    sequence = photos[0].absolute().parent.parent.name
    try:
        with gzip.open(path) as file:
            frames = [frame for frame in json.load(file) if frame["sequence_name"] == sequence]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the frame annotations of a CO3D category, and cannot be read "
            f"({type(error).__name__}: {error})"
        ) from error
    known = [_known(path, frame) for frame in frames if frame.get("viewpoint")]
    if not known:
        raise ValueError(f"{path} has no viewpoint of sequence {sequence!r}; give the folder images of one that it has")
    return Reading(f"CO3D, sequence {sequence}", known)


def _known(path: Path, frame: Mapping[str, Any]) -> KnownPhoto:
    try:
        name, viewpoint, depth = frame["image"]["path"], frame["viewpoint"], frame.get("depth")
        where = f"{path}, {name}"
        rotation = torch.tensor(viewpoint["R"], dtype=torch.float64).mT
        to_camera = torch.cat([rotation, torch.tensor(viewpoint["T"], dtype=torch.float64)[:, None]], dim=1)
        pose = inverse(rigid(f"{where}, viewpoint", TO_OPENCV[:, None] * to_camera))
        root, reader = path.parent.parent, None
        if depth and (root / depth["path"]).is_file():
            mask = root / depth["mask_path"] if depth.get("mask_path") else None
            reader = partial(_read, root / depth["path"], float(depth["scale_adjustment"]), mask)
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path} must hold frames with image and viewpoint, got {frame} ({error})") from error
    return KnownPhoto(name, pose, reader)


def _read(path: Path, scale: float, mask: Path | None) -> Tensor:
    levels = read_levels(path)
    if levels.ndim != 2 or levels.dtype.itemsize < 2:
        raise ValueError(f"{path} must be a grey PNG of 16 bits, got {levels.dtype} {list(levels.shape)}")
    depth = scaled(levels.astype(np.uint16).view(np.float16), scale)
    if mask is not None:
        inside = read_levels(mask)
        if inside.shape != depth.shape:
            raise ValueError(f"{mask} must be of the size of {path}, {list(depth.shape)}, got {list(inside.shape)}")
        depth[inside == 0] = 0
    return depth


CO3D = Format(
    "the annotations of CO3D (frame_annotations.jgz)",
    is_annotations,
    read_annotations,
    beside=lambda folder: folder.parent.parent / ANNOTATIONS,
)
