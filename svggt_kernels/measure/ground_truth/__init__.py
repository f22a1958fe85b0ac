"""What is known of a folder of photos: camera poses and depth maps, from whatever they were written by.

A truth is told by what it is: the first of `FORMATS` that recognises a path reads it. Photos are told by their paths
(`sources.names`): the whole name that the truth has must be the end of a photo's path, with or without its suffix.

Poses and depth maps are of pixels as they are stored, while models see photos upright. So photos that their EXIF
orientation turns are refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...io.depth_maps import DEPTH_SUFFIXES, depth_of_frame, read_depth_map
from ...io.photos import UPRIGHT, find_photos, orientation, photo_size
from ...sources.names import ImageNames
from ..wording import count
from . import seven_scenes
from .base import DepthReader, KnownPhoto, Reading
from .co3d import CO3D
from .colmap import COLMAP
from .eth3d import ETH3D
from .hiroom import HIROOM
from .nerfstudio import NERFSTUDIO
from .seven_scenes import SEVEN_SCENES
from .trajectories import TRAJECTORY

__all__ = ["FORMATS", "Truth", "find_truth", "photos_of", "read_truth", "with_depth_maps"]

FORMATS = (SEVEN_SCENES, ETH3D, HIROOM, CO3D, COLMAP, NERFSTUDIO, TRAJECTORY)
MILLIMETRES = 0.001
LISTED = 3


@dataclass(frozen=True, eq=False)
class Truth:
    """The known poses and depth maps of photos.

    Attributes:
        label: What it was read from and how photos are told, in words.
        photos: All photos, in order.
        known: Places of the photos whose pose is known, in order.
        poses: Their poses, camera to world `[K, 4, 4]`, float64, axes as in OpenCV, K of 2 or more.
        depth: For each of them what reads its depth map, if there is one.
        unused: Poses of the truth that are of no photo.

    Raises:
        ValueError: If fewer than two poses are known.
    """

    label: str
    photos: list[Path]
    known: list[int]
    poses: Tensor
    depth: list[DepthReader | None]
    unused: int

    def __post_init__(self) -> None:
        if len(self.known) < 2:
            raise ValueError(
                f"{self.label}: the poses of two photos or more must be known, but of "
                f"{count(len(self.photos), 'photo')} ({_names(self.photos)}) {len(self.known)} are; give the truth of "
                "these photos, or more of them"
            )

    def first(self, most: int | None) -> Truth:
        """Return what is known of the first so many photos; of all for None."""
        photos = self.photos[:most]
        kept = sum(place < len(photos) for place in self.known)
        return replace(self, photos=photos, known=self.known[:kept], poses=self.poses[:kept], depth=self.depth[:kept])

    def depth_of_frames(self, size: tuple[int, int]) -> Tensor:
        """Return the depth that frames of a height and width show, `[K, H, W]` float32; 0 where it is not known.

        Raises:
            ValueError: If a depth map cannot be read, or does not show what its photo shows.
        """
        height, width = size
        frames = torch.zeros(len(self.known), height, width)

        def fill(frame: Tensor, photo: Path, read: DepthReader | None) -> None:
            if read is not None:
                try:
                    frame.copy_(depth_of_frame(read(), photo_size(photo), (width, height)))
                except ValueError as error:
                    raise ValueError(f"the depth map of {photo}: {error}") from error

        with ThreadPoolExecutor() as workers:
            list(workers.map(fill, frames, [self.photos[place] for place in self.known], self.depth))
        return frames


def photos_of(folder: Path) -> list[Path]:
    """List the photos of a folder as `find_photos` does, without the depth maps that lie among those of 7-Scenes."""
    return [photo for photo in find_photos(folder) if not seven_scenes.is_depth_map(photo)]


def find_truth(folder: Path) -> Path:
    """Return where the truth of a folder of photos lies, if it is that of a data set whose layout is known.

    Raises:
        ValueError: If it is none.
    """
    folder = Path(os.path.abspath(folder))
    for kind in FORMATS:
        if kind.beside is not None and kind.recognises(path := kind.beside(folder)):
            return path
    raise ValueError(
        f"{folder} is not the folder of photos of a data set whose layout is known; give --truth: {_kinds()}"
    )


def read_truth(path: Path, photos: Sequence[Path]) -> Truth:
    """Read the poses of photos, and the depth maps that come with them.

    Args:
        path: The truth, in any of `FORMATS`.
        photos: The photos, in order.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is of no known format or not as it must be, if it cannot be told which pose is of which photo,
            or if a photo whose pose is known has an EXIF orientation other than 1.
    """
    if not path.exists():
        raise FileNotFoundError(f"the truth must be a file or folder, but {path} does not exist")
    path = Path(os.path.abspath(path))
    kind = next((kind for kind in FORMATS if kind.recognises(path)), None)
    if kind is None:
        raise ValueError(f"{path} must be one of: {_kinds()}")
    return _matched(path, kind.read(path, photos), photos)


def with_depth_maps(truth: Truth, folder: Path, scale: float | None = None) -> Truth:
    """Return the truth with the depth maps of a folder, which have the names of the photos: .png or .npy.

    Args:
        truth: Poses without depth maps.
        folder: Where the depth maps lie.
        scale: By what their numbers are multiplied to be in the unit of the poses; by default 0.001 for .png
            (millimetres) and 1 for .npy.

    Raises:
        ValueError: If the truth has depth maps already, the folder holds none of these photos, or two of one name.
    """
    if any(truth.depth):
        raise ValueError(f"{truth.label} comes with depth maps of its own; leave {folder} out")
    files = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in DEPTH_SUFFIXES]
    repeated = [stem for stem, times in Counter(file.stem for file in files).items() if times > 1]
    if repeated:
        raise ValueError(f"{folder} must hold one depth map a photo, but two are called {repeated[0]}; take one out")
    by_stem = {file.stem: file for file in files}
    maps = [by_stem.get(truth.photos[place].stem) for place in truth.known]
    if not any(maps):
        raise ValueError(
            f"{folder} must hold depth maps, .png or .npy, with the names of the photos ({_names(truth.photos)}), but "
            f"holds {_names(files) or 'none'}"
        )
    return replace(truth, depth=[None if file is None else _reader(file, scale) for file in maps])


def _reader(file: Path, scale: float | None) -> DepthReader:
    if scale is None:
        scale = MILLIMETRES if file.suffix.lower() == ".png" else 1.0
    return partial(read_depth_map, file, scale)


def _matched(path: Path, reading: Reading, photos: Sequence[Path]) -> Truth:
    names = ImageNames([os.path.abspath(photo) for photo in photos], stems=True)
    found: dict[int, KnownPhoto] = {}
    for known in reading.photos:
        place = names.find(known.name)
        if place in found:
            raise ValueError(
                f"{path} must name each photo once, but {found[place].name!r} and {known.name!r} both are "
                f"{photos[place].name}; take one out"
            )
        if place is not None:
            found[place] = known
    if not found:
        raise ValueError(
            f"{path} knows none of {count(len(photos), 'photo')} ({_listed(photos)}): it is of {len(reading.photos)} "
            f"others ({_listed([known.name for known in reading.photos])}), whose whole names must be ends of the "
            "photos' paths; give the truth of these photos, or lay them into folders of these names"
        )
    places = sorted(found)
    _refuse_turned(path, [photos[place] for place in places])
    return Truth(
        label=f"{path} ({reading.label})",
        photos=list(photos),
        known=places,
        poses=torch.stack([found[place].pose for place in places]),
        depth=[found[place].depth for place in places],
        unused=len(reading.photos) - len(found),
    )


def _refuse_turned(path: Path, photos: Sequence[Path]) -> None:
    with ThreadPoolExecutor() as workers:
        orientations = workers.map(orientation, photos)
        turned = [(photo, number) for photo, number in zip(photos, orientations, strict=True) if number != UPRIGHT]
    if turned:
        photo, number = turned[0]
        raise ValueError(
            f"photos with a pose in {path} must be stored upright (EXIF orientation 1 or none), because poses and "
            f"depth are of pixels as they are stored; {len(turned)} of {len(photos)} are not (first {photo}: EXIF "
            f"orientation {number}); write them without that tag, their pixels as they are stored"
        )


def _kinds() -> str:
    return "; ".join(kind.label for kind in FORMATS)


def _names(files: Sequence[Path]) -> str:
    return _listed([file.name for file in files])


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:LISTED])) + (", ..." if len(names) > LISTED else "")
