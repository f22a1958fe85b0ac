"""Covisibility from COLMAP: verified matches of a database, or shared points of a sparse model; read by pycolmap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from .graph import CovisibilityGraph

MIN_SHARED = 15  # COLMAP's own least number of inliers of a verified pair


def from_colmap(
    source: str | Path,
    images: Sequence[str | PurePath],
    *,
    min_shared: int = MIN_SHARED,
) -> CovisibilityGraph:
    """Build the graph of frames that share features, both ways.

    Args:
        source: A database (`database.db`), where inliers of two-view geometries count, or the folder of a sparse model
            (`sparse/0`), where points that both frames see count.
        images: The images in the order of the frames, by the names that COLMAP knows them by, or by file name if that
            is unique there. An image that is not in the source, or shares nothing, sees only itself.
        min_shared: Features that two frames must share at least.

    Raises:
        FileNotFoundError: If the source is not there.
        ValueError: If it cannot be read, or knows none of the images.
        ImportError: If pycolmap is not installed.
    """
    shared = shared_features(source, images)
    return CovisibilityGraph.from_dense(shared >= max(min_shared, 1), square=True)


def shared_features(source: str | Path, images: Sequence[str | PurePath]) -> Tensor:
    """Return how many features each two frames share, `[S, S]` int64, symmetric, 0 on the diagonal.

    The arguments are those of `from_colmap`.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"a COLMAP database or sparse model is needed, but {path} does not exist")
    try:
        import pycolmap
    except ImportError as error:
        raise ImportError("reading COLMAP needs pycolmap: pip install 'svggt-kernels[colmap]'") from error
    try:
        names, counts = (_of_model if path.is_dir() else _of_database)(pycolmap, path)
    except (RuntimeError, ValueError, IndexError) as error:
        kind = "a sparse model" if path.is_dir() else "a database"
        raise ValueError(f"{path} must be {kind} of COLMAP, and cannot be read: {error}") from error
    frame_of = _frames(path, names, [str(image) for image in images])
    shared = torch.zeros(len(images), len(images), dtype=torch.int64)
    for (first, second), count in counts.items():
        if first in frame_of and second in frame_of:
            i, j = frame_of[first], frame_of[second]
            shared[i, j] = shared[j, i] = count
    return shared


def _of_database(pycolmap: Any, path: Path) -> tuple[dict[int, str], Mapping[tuple[int, int], int]]:
    with path.open("rb") as file:
        if file.read(15) != b"SQLite format 3":
            raise ValueError("it is no SQLite file")
    with pycolmap.Database.open(path) as database:
        names = {image.image_id: image.name for image in database.read_all_images()}
        pairs, inliers = database.read_two_view_geometry_num_inliers()
    images = [tuple(pycolmap.pair_id_to_image_pair(pair)) for pair in pairs]
    return names, dict(zip(images, inliers, strict=True))


def _of_model(pycolmap: Any, path: Path) -> tuple[dict[int, str], Mapping[tuple[int, int], int]]:
    model = pycolmap.Reconstruction(path)
    names = {image.image_id: image.name for image in model.images.values()}
    counts: Counter[tuple[int, int]] = Counter()
    for point in model.points3D.values():
        counts.update(combinations(sorted({element.image_id for element in point.track.elements}), 2))
    return names, counts


def _frames(path: Path, names: Mapping[int, str], images: Sequence[str]) -> dict[int, int]:
    """Return the frame of each of COLMAP's images that is among `images`."""
    by_file = Counter(PurePath(name).name for name in names.values())
    known = dict(_known(names, by_file))
    frames = {known[image]: frame for frame, image in _asked(images, known)}
    if not frames:
        here, there = ", ".join(list(images)[:3]), ", ".join(list(names.values())[:3])
        raise ValueError(
            f"{path} knows none of the {len(images)} images ({here}, ...): it is of {len(names)} others ({there}, ...)"
            "; give the database or model of these images, or their names as COLMAP has them"
        )
    return frames


def _known(names: Mapping[int, str], by_file: Counter[str]) -> Iterator[tuple[str, int]]:
    for image, name in names.items():
        yield name, image
        if by_file[PurePath(name).name] == 1:
            yield PurePath(name).name, image


def _asked(images: Sequence[str], known: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    for frame, image in enumerate(images):
        name = image if image in known else PurePath(image).name
        if name in known:
            yield frame, name
