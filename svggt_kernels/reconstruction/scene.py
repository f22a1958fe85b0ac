"""A reconstruction: what is known of each photo after a model ran, and the one file that holds all of it."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph import CovisibilityGraph
from ..graph.arrays import as_arrays, from_arrays
from ..io.depth_maps import depth_of_photo
from ..io.photos import Crop, crop_of
from .cameras import PhotoCamera, photo_camera, turned_as_stored

RUN = "reconstruction.npz"
ARRAYS = ("poses", "intrinsics", "depth", "confidence", "colours")


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Cameras, depth, confidence and colours of photos; S photos, whose frames have H x W pixels.

    World and cameras have the axes of OpenCV (x right, y down, z forward) where the model answers in those of its
    reference frame. The unit is the model's own: nothing says how many metres it is.

    Attributes:
        folder: Where the photos lie.
        names: The photos, relative to it.
        sizes: Width and height of each photo, upright.
        orientations: EXIF orientation of each, by which it was turned upright.
        times: Seconds of each in its video; None for photos.
        poses: Camera to world `[S, 4, 4]`, float64, of the upright frames.
        intrinsics: Of the frames `[S, 3, 3]`, float64, in their pixels; the centre of the first is (0.5, 0.5).
        depth: Along the optical axis `[S, H, W]`, float32.
        confidence: `[S, H, W]`, float32; its scale is the model's own.
        colours: What the model saw `[S, H, W, 3]`, uint8.
        graph: Which frame saw which.
        facts: What ran, by name.
        request: What was asked for, by name: equal requests have equal results.
    """

    folder: Path
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    orientations: tuple[int, ...]
    times: tuple[float, ...] | None
    poses: Tensor
    intrinsics: Tensor
    depth: Tensor
    confidence: Tensor
    colours: Tensor
    graph: CovisibilityGraph
    facts: dict[str, Any]
    request: dict[str, Any]

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the frames that the model saw."""
        return self.depth.shape[2], self.depth.shape[1]

    @property
    def photos(self) -> list[Path]:
        """The files of the photos."""
        return [self.folder / name for name in self.names]

    @property
    def crops(self) -> list[Crop]:
        """Which part of each upright photo its frame shows."""
        return [crop_of(size, self.frame_size) for size in self.sizes]

    @cached_property
    def cameras(self) -> list[PhotoCamera]:
        """The camera of each photo file, in its own pixels as they are stored."""
        parts = zip(self.poses, self.intrinsics, self.sizes, self.orientations, strict=True)
        return [
            photo_camera(pose, intrinsics, self.frame_size, size, orientation)
            for pose, intrinsics, size, orientation in parts
        ]

    @cached_property
    def typical_depth(self) -> float:
        """The median of all depth that is known.

        Raises:
            ValueError: If no pixel has a depth that is finite and above 0.
        """
        known = self.depth[self.depth.isfinite() & (self.depth > 0)]
        if not len(known):
            raise ValueError("no pixel has a depth that is finite and above 0; check the weights and the photos")
        return float(known.median())

    def depth_maps(self) -> Iterator[Tensor]:
        """Yield for each photo file a depth map `[h, w]` of all it shows, as it is stored; 0 where nothing is known."""
        for depth, size, orientation in zip(self.depth, self.sizes, self.orientations, strict=True):
            known = depth.where(depth.isfinite() & (depth > 0), 0.0)
            yield turned_as_stored(depth_of_photo(known, size), orientation)

    def save(self, path: Path) -> None:
        """Write everything into one .npz, without pickle."""
        words = {
            "folder": str(self.folder),
            "names": self.names,
            "times": self.times,
            "facts": self.facts,
            "request": self.request,
        }
        arrays: dict[str, Any] = {
            **{name: getattr(self, name).numpy() for name in ARRAYS},
            **as_arrays(self.graph),
            "sizes": np.array(self.sizes, np.int64),
            "orientations": np.array(self.orientations, np.int64),
            "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
        }
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def __repr__(self) -> str:
        frames, height, width = self.depth.shape
        return f"Reconstruction({frames} photos of {self.folder}, frames of {width} x {height} pixels)"

    @classmethod
    def load(cls, path: str | Path) -> Reconstruction:
        """Read what `save` wrote, or a folder that `reconstruct` wrote; runs no code from it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else, or is damaged.
        """
        path = Path(path)
        with _opened(path / RUN if path.is_dir() else path) as held:
            words = _words(held)
            return cls(
                folder=Path(words["folder"]),
                names=tuple(words["names"]),
                sizes=tuple((int(width), int(height)) for width, height in held["sizes"]),
                orientations=tuple(int(orientation) for orientation in held["orientations"]),
                times=None if words["times"] is None else tuple(words["times"]),
                graph=from_arrays(held),
                facts=words["facts"],
                request=words["request"],
                **{name: torch.from_numpy(held[name]) for name in ARRAYS},
            )

    @staticmethod
    def request_of(path: Path) -> dict[str, Any]:
        """Return what was asked for in a saved reconstruction, without reading the rest of it.

        Raises:
            ValueError: If it is none.
        """
        with _opened(path) as held:
            return _words(held)["request"]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a saved reconstruction; whatever its bytes lead to in the block is said in a sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"a saved reconstruction is needed, but {path} is no file")
    try:
        # A file that NumPy opens by itself stays open where its archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            yield held
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be a reconstruction as Reconstruction.save writes it, and is damaged or something else "
            f"({type(error).__name__}: {error})"
        ) from error


def _words(held: Any) -> dict[str, Any]:
    return json.loads(held["words"].tobytes())


def relative_names(photos: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return the folder that holds all photos, and their names relative to it, with slashes."""
    parents = [os.path.abspath(photo.parent) for photo in photos]
    folder = Path(os.path.commonpath(parents))
    return folder, tuple(Path(os.path.abspath(photo)).relative_to(folder).as_posix() for photo in photos)
