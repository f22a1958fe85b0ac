"""ETH3D, high-resolution multi-view: a scene's images/dslr_images and images/dslr_images_undistorted.

Poses are COLMAP's, in dslr_calibration_jpg and dslr_calibration_undistorted. Depth maps exist for the distorted photos
alone, in ground_truth_depth/dslr_images: float32 in the rows of the photo as it is stored, infinite where depth is not
known. Scenes share file names: the name of a photo is `courtyard/images/dslr_images/DSC_0286.JPG`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from ...io.depth_maps import scaled
from ...io.photos import stored_size
from . import colmap
from .base import Format, KnownPhoto, Reading

CALIBRATIONS = {"dslr_images": "dslr_calibration_jpg", "dslr_images_undistorted": "dslr_calibration_undistorted"}


def is_calibration(path: Path) -> bool:
    """Tell whether a folder is a calibration of the DSLR's photos."""
    return path.name in CALIBRATIONS.values() and colmap.is_model(path)


def read_calibration(path: Path, photos: Sequence[Path]) -> Reading:
    """Read the poses, and for distorted photos the depth maps."""
    reading = colmap.read_model(path, photos)
    scene = path.parent
    return Reading("ETH3D", [_of_scene(scene, known) for known in reading.photos])


def _of_scene(scene: Path, known: KnownPhoto) -> KnownPhoto:
    name = PurePosixPath(known.name)
    depth, photo = scene / "ground_truth_depth" / name, scene / "images" / name
    reader = partial(_read, depth, photo) if depth.is_file() and photo.is_file() else None
    return replace(known, name=f"{scene.name}/images/{name}", depth=reader)


def _read(path: Path, photo: Path) -> Tensor:
    width, height = stored_size(photo)
    depth = np.fromfile(path, dtype="<f4")
    if depth.size != width * height:
        raise ValueError(
            f"{path} must hold {width} x {height} numbers of 4 bytes, as {photo} has pixels, got {depth.size}; "
            "unpack both again"
        )
    return scaled(depth.reshape(height, width), 1.0)


def _beside(folder: Path) -> Path:
    return folder.parent.parent / CALIBRATIONS.get(folder.name, "")


ETH3D = Format(
    "a calibration of ETH3D (dslr_calibration_jpg, dslr_calibration_undistorted)",
    is_calibration,
    read_calibration,
    _beside,
)
