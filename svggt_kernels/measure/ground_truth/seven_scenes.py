"""7-Scenes: a folder `seq-XX` with frame-XXXXXX.color.png, .depth.png and .pose.txt.

Poses are camera to world. Depth is in millimetres, and unknown where it is 65535 or 0. The depth camera was not brought
into the view of the colour camera, so the two differ by a few centimetres of baseline. All sequences have the same file
names, and all scenes a `seq-01`: the name of a photo is `chess/seq-01/frame-000000.color.png`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...io.depth_maps import read_depth_map
from .base import Format, KnownPhoto, Reading, rigid

UNKNOWN = 65535
MILLIMETRES = 0.001
DEPTH_MAP = re.compile(r"frame-[0-9]+\.depth.*\.png")


def is_depth_map(path: Path) -> bool:
    """Tell whether a picture of such a folder is a depth map."""
    return DEPTH_MAP.fullmatch(path.name) is not None


def is_sequence(path: Path) -> bool:
    """Tell whether a folder is a sequence."""
    return path.is_dir() and any(path.glob("frame-*.pose.txt"))


def read_sequence(path: Path, photos: Sequence[Path]) -> Reading:
    """Read every pose, and the depth map of each frame that has one."""
    known = []
    for file in sorted(path.glob("frame-*.pose.txt")):
        frame = file.name.removesuffix(".pose.txt")
        depth = path / f"{frame}.depth.png"
        reader = partial(read_depth_map, depth, MILLIMETRES, UNKNOWN) if depth.is_file() else None
        rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
        try:
            numbers = [[float(field) for field in row] for row in rows]
        except ValueError as error:
            raise ValueError(f"{file} must hold a matrix of 4 x 4 numbers ({error})") from None
        name = str(Path(*path.parts[-2:], f"{frame}.color.png"))
        known.append(KnownPhoto(name, rigid(str(file), numbers), reader))
    return Reading("7-Scenes", known)


SEVEN_SCENES = Format(
    "a sequence of 7-Scenes (folder with frame-XXXXXX.pose.txt)",
    is_sequence,
    read_sequence,
    beside=lambda folder: folder,
)
