"""Covisibility from COLMAP: verified matches of a database, or shared points of a sparse model.

A database is read by SQLite alone and never written to, whatever version of COLMAP made it; a model by pycolmap.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import combinations_with_replacement
from pathlib import Path, PurePath

import torch
from torch import Tensor

from ..graph.graph import CovisibilityGraph
from ..packages import optional
from ..user_warnings import warn
from .names import ImageNames

MIN_SHARED = 15  # COLMAP's own least number of inliers of a verified pair
MAX_IMAGES = 2**31 - 1  # pair_id = MAX_IMAGES * image_id1 + image_id2
WRITE_AHEAD = b"\x02\x02"  # bytes 18 and 19 of a database that is written through a log beside it

Shared = Counter[tuple[int, int]]


def from_colmap(
    source: str | Path,
    images: Sequence[str | PurePath],
    *,
    min_shared: int = MIN_SHARED,
) -> CovisibilityGraph:
    """Build the graph of frames that share features, both ways, on the CPU.

    Args:
        source: A database (`database.db`), where inliers of two-view geometries count, or the folder of a sparse model
            (`sparse/0`), where points that both frames see count.
        images: The images in the order of the frames, by the names that COLMAP knows them by, by paths that end with
            such a name, or by the end of such a name if that is unique there. An image that is not in the source, or
            shares nothing, sees only itself. An image that is given for several frames shares all its features with
            itself.
        min_shared: Features that two frames must share at least.

    Raises:
        FileNotFoundError: If the source is not there.
        ValueError: If it cannot be read, holds no verified pair or no shared point, or knows none of the images; if an
            image may be several of its own, or several images may be one of its own.
        ImportError: If the source is a model and pycolmap is not installed.

    Warns:
        UserWarning: If the source does not know some of the images, or no two of those that it knows share a feature.
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
    names, counts = _of_model(path) if path.is_dir() else _of_database(path)
    frames_by_place = ImageNames(list(names.values())).frames_by_image(str(path), images)
    ids = list(names)
    frames_of = {ids[place]: frames for place, frames in frames_by_place.items()}
    shared = torch.zeros(len(images), len(images), dtype=torch.int64, device="cpu")
    for (first, second), count in counts.items():
        for i in frames_of.get(first, ()):
            for j in frames_of.get(second, ()):
                shared[i, j] = shared[j, i] = count
    shared.fill_diagonal_(0)
    if len(frames_of) > 1 and not shared.any():
        warn(
            f"{path} holds no feature that two of the {len(images)} images share, so each sees only itself; match "
            "these images",
        )
    return shared


def _of_database(path: Path) -> tuple[dict[int, str], Shared]:
    """Return the name of each image, and the verified inliers of each two; of an image and itself, its keypoints."""
    log = Path(f"{path}-wal")
    has_log = log.exists() and log.stat().st_size > 0
    try:
        with closing(_opened(path, has_log)) as database:
            names = dict(database.execute("SELECT image_id, name FROM images"))
            pairs = dict(database.execute("SELECT pair_id, rows FROM two_view_geometries WHERE rows > 0"))
            keypoints = dict(database.execute("SELECT image_id, rows FROM keypoints"))
            [matched] = database.execute("SELECT count(*) FROM matches WHERE rows > 0").fetchone()
    except sqlite3.Error as error:
        advice = f"; copy it and {log.name} to a folder that can be written" if has_log else ""
        raise ValueError(f"{path} must be a database of COLMAP, and cannot be read: {error}{advice}") from error
    if not pairs:
        raise ValueError(
            f"{path} holds {matched} matched pairs of {len(names)} images and no verified pair; run COLMAP's geometric "
            "verification" + ("" if matched else " after matching")
        )
    counts = Counter({divmod(pair, MAX_IMAGES): inliers for pair, inliers in pairs.items()})
    counts.update({(image, image): count for image, count in keypoints.items()})
    return names, counts


def _opened(path: Path, has_log: bool) -> sqlite3.Connection:
    """Open a database for reading, so that neither it nor its folder changes.

    Some databases are written through a log beside them, whose files any plain connection makes. Without a log nothing
    is left to be read from it, and such a database is opened as a file that never changes.
    """
    with path.open("rb") as file:
        is_logged = file.read(20)[18:] == WRITE_AHEAD
    options = "mode=ro&immutable=1" if is_logged and not has_log else "mode=ro"
    database = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)
    database.text_factory = os.fsdecode  # a file name need not be UTF-8
    return database


def _of_model(path: Path) -> tuple[dict[int, str], Shared]:
    """Return the name of each image, and the points that each two see; of an image and itself, all that it sees."""
    pycolmap = optional("pycolmap", "reading a COLMAP model", "pycolmap", "'svggt-kernels[colmap]'")
    try:
        model = pycolmap.Reconstruction(path)
        names = {image.image_id: image.name for image in model.images.values()}
        tracks = [sorted({element.image_id for element in point.track.elements}) for point in model.points3D.values()]
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} must be a sparse model of COLMAP, and cannot be read: {error}") from error
    counts: Shared = Counter()
    for track in tracks:
        counts.update(combinations_with_replacement(track, 2))
    if all(first == second for first, second in counts):
        raise ValueError(
            f"{path} holds {len(tracks)} points and {len(names)} images, and no point that two images share; give a "
            "model with points, or the database"
        )
    return names, counts
