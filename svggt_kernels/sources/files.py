"""Graphs in files: our own, pairs of hloc, COLMAP databases and models, and poses with intrinsics.

| file | what it says | which frame is which |
|---|---|---|
| .npz | exactly who sees whom, by `graph_bytes` or of a saved reconstruction | by name, or by order if it has none |
| .txt | pairs of photos, two names a line, as hloc writes them; both ways | by name |
| .db, or the folder of a sparse model | photos that share features | by name |
| .json | transforms.json with poses and intrinsics: photos whose view frusta overlap | by name |

All but the first say what is covisible, so the model's reference frame is joined to all frames, as other sources do.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..graph import CovisibilityGraph
from ..graph.arrays import as_arrays, from_arrays
from ..io.transforms import TURNED_AXES, photo_name, read_frames
from .base import Scene, joined
from .colmap import from_colmap
from .names import ImageNames
from .poses import from_poses

UNIT = (1000, 1000)
"""Height and width to which pictures of any size are scaled in thought."""

KINDS = "an .npz graph, hloc's pairs.txt, a COLMAP database (.db) or model (its folder), or a transforms.json"


@dataclass(frozen=True)
class GraphFile:
    """A graph of a file as `covisibility`; read once the frames are known.

    Attributes:
        path: The file, or the folder of a sparse model; a str becomes a Path.
        photos: The files of the frames in their order; None takes the frames of an .npz without names in its order.
        depth_range: Nearest and farthest depth at which something may be seen, in the unit of the poses of a
            transforms.json; other files have none.
    """

    path: Path
    photos: tuple[Path, ...] | None = None
    depth_range: tuple[float, float] | None = None
    _read: dict[str, CovisibilityGraph] = field(default_factory=dict, init=False, repr=False, compare=False)

    needs: ClassVar[Literal["nothing"]] = "nothing"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        return f"a graph read from {self.path.name}"

    @property
    def is_exact(self) -> bool:
        """Whether the file says who sees whom, and not what is covisible."""
        return self.path.suffix.lower() == ".npz"

    def of(self, photos: Sequence[str | PurePath] | None) -> GraphFile:
        """Return the same for frames of these files."""
        return replace(self, photos=None if photos is None else tuple(map(Path, photos)))

    def opened(self) -> GraphFile:
        """Return the same, with the graph read.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be read, or says nothing of these photos.
            ImportError: A package is missing that reads it.
        """
        source = replace(self)
        source.read()
        return source

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene.

        Raises:
            ValueError: If it is over another number of frames.
        """
        graph = self.read()
        if graph.num_frames != scene.num_frames:
            raise ValueError(f"{self.path} is a graph over {graph.num_frames} frames, but there are {scene.num_frames}")
        if self.is_exact:
            return graph
        key = f"joined to {scene.reference_frame}"
        if key not in self._read:
            self._read[key] = joined(graph, scene.reference_frame)
        return self._read[key]

    def read(self) -> CovisibilityGraph:
        """Return the graph that the file says, read once; raises as `opened` does."""
        if "graph" not in self._read:
            self._read["graph"] = read_graph(self.path, self.photos, depth_range=self.depth_range)
        return self._read["graph"]


def read_graph(
    path: str | Path,
    photos: Sequence[str | PurePath] | None = None,
    *,
    depth_range: tuple[float, float] | None = None,
) -> CovisibilityGraph:
    """Read who sees whom from a file, told by what it is (the table above).

    A photo that the file does not know sees itself alone, and a warning says so.

    Args:
        path: The file, or the folder of a sparse model.
        photos: The files of the frames in their order; None for an .npz without names.
        depth_range: Nearest and farthest depth for a transforms.json.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, is damaged, or knows none of the photos.
        ImportError: A package is missing that reads it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the graph must be a file, or the folder of a COLMAP model, but {path} does not exist")
    suffix = path.suffix.lower()
    if depth_range is not None and suffix != ".json":
        raise ValueError(f"a range of depth goes with the poses of a transforms.json, not with {path}; leave it out")
    if suffix == ".npz":
        return _of_arrays(path, photos)
    if photos is None:
        raise ValueError(f"{path} knows photos by name, and the frames of a video have none; give an .npz, or photos")
    if path.is_dir() or suffix == ".db":
        return from_colmap(path, photos)
    if suffix == ".txt":
        return _of_pairs(path, photos)
    if suffix == ".json":
        return _of_transforms(path, photos, depth_range)
    raise ValueError(f"the graph must be {KINDS}, got {path}")


def graph_bytes(graph: CovisibilityGraph, names: Sequence[str] | None) -> bytes:
    """Return the content of an .npz that `read_graph` reads, without pickle.

    Args:
        graph: Over the frames.
        names: Of the photos; None for the frames of a video, which are told by their order.
    """
    words = json.dumps({"names": None if names is None else list(names)}).encode()
    arrays: dict[str, Any] = {**as_arrays(graph), "words": np.frombuffer(words, np.uint8)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def hloc_pairs(graph: CovisibilityGraph, names: Sequence[str]) -> str:
    """Return the pairs of photos of which one sees the other, as hloc has them: two names a line, each pair once.

    Raises:
        ValueError: If a name holds white space, which that format cannot say.
    """
    spaced = [name for name in names if name.split() != [name]]
    if spaced:
        raise ValueError(f"names in hloc's pairs must hold no white space, got {spaced[0]!r}; rename the photos")
    either = {
        (min(i, j), max(i, j)) for i, j in zip(graph.rows.tolist(), graph.indices.tolist(), strict=True) if i != j
    }
    return "".join(f"{names[i]} {names[j]}\n" for i, j in sorted(either))


def _of_arrays(path: Path, photos: Sequence[str | PurePath] | None) -> CovisibilityGraph:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            graph, names = from_arrays(held), json.loads(held["words"].tobytes())["names"]
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be a graph as `layout` writes it, or a saved reconstruction, and is damaged or something "
            f"else ({type(error).__name__}: {error})"
        ) from error
    if photos is None or names is None:
        if photos is not None and len(photos) != graph.num_frames:
            raise ValueError(
                f"{path} is a graph over {graph.num_frames} frames without names, but there are {len(photos)} photos"
            )
        return graph
    frames_by_image = ImageNames(names).frames_by_image(str(path), photos)
    place = torch.full((graph.num_frames,), -1)
    for image, frames in frames_by_image.items():
        place[image] = frames[0]
    edges = torch.stack([place[graph.rows.long()], place[graph.indices.long()]], 1)
    edges = edges[(edges >= 0).all(1)]
    mine = CovisibilityGraph.from_pairs(len(photos), edges[edges[:, 0] != edges[:, 1]])
    core = graph.core_frames
    is_whole = core is not None and len(photos) == graph.num_frames and bool((place >= 0).all())
    return mine.with_core(place[core]) if is_whole else mine


def _of_pairs(path: Path, photos: Sequence[str | PurePath]) -> CovisibilityGraph:
    # A file name need not be UTF-8.
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    pairs = [line.split() for line in lines if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if len(pair) in (8, 12) and all(map(_is_number, pair)):
            raise ValueError(
                f"{path} is a trajectory, which tells no fields of view; give a transforms.json with intrinsics"
            )
        if len(pair) != 2:
            raise ValueError(
                f"{path} must hold two names of photos a line, as hloc writes pairs; pair {number} is "
                f"{' '.join(pair)!r}"
            )
    if not pairs:
        raise ValueError(f"{path} must hold two names of photos a line, and holds no line")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    frames = {names[image]: frames for image, frames in ImageNames(names).frames_by_image(str(path), photos).items()}
    edges = {(i, j) for one, other in pairs for i in frames.get(one, ()) for j in frames.get(other, ()) if i != j}
    return CovisibilityGraph.from_pairs(len(photos), sorted(edges)).symmetrized()


def _of_transforms(
    path: Path, photos: Sequence[str | PurePath], depth_range: tuple[float, float] | None
) -> CovisibilityGraph:
    if depth_range is None:
        raise ValueError(
            f"{path} tells where cameras look, but not how far; give the nearest and the farthest depth at which "
            "something may be seen, in its unit (--depth-range NEAR FAR)"
        )
    content, frames = read_frames(path)
    try:
        cameras = [_camera({**content, **frame}) for frame in frames]
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"frames of {path} must have transform_matrix, fl_x, fl_y, cx, cy, w and h, or share some of these "
            f"({type(error).__name__}: {error})"
        ) from error
    names = ImageNames([photo_name(path, frame) for frame in frames])
    known = {frame: image for image, same in names.frames_by_image(str(path), _whole(photos)).items() for frame in same}
    places = sorted(known)
    poses, intrinsics = (torch.stack([cameras[known[place]][part] for place in places]) for part in (0, 1))
    overlap = from_poses(poses, intrinsics, depth_range, UNIT)
    edges = torch.tensor(places)[torch.stack([overlap.rows.long(), overlap.indices.long()], 1)]
    return CovisibilityGraph.from_pairs(len(photos), edges[edges[:, 0] != edges[:, 1]])


def _camera(stated: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return a pose, camera to world with axes as in OpenCV, and intrinsics of a picture scaled to the size `UNIT`."""
    fx, fy, cx, cy, width, height = (float(stated[name]) for name in ("fl_x", "fl_y", "cx", "cy", "w", "h"))
    pose = torch.tensor(stated["transform_matrix"], dtype=torch.float64) * TURNED_AXES
    across, down = UNIT[1] / width, UNIT[0] / height
    intrinsics = [[fx * across, 0, cx * across], [0, fy * down, cy * down], [0, 0, 1]]
    return pose, torch.tensor(intrinsics, dtype=torch.float64)


def _whole(photos: Sequence[str | PurePath]) -> list[str]:
    """Return whole paths: a photo that a file names by the way there is told only so."""
    return [os.path.abspath(photo) for photo in photos]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
