"""Poses of a sparse model of COLMAP, text or binary. Points play no role and need not be there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...rigid_motions import inverse
from .base import Format, KnownPhoto, Reading, rigid_of_quaternion

IMAGE = struct.Struct("<I7dI")  # id, quaternion (w, x, y, z), translation, camera
POINTS = struct.Struct("<Q")
POINT_BYTES = 24


def is_model(path: Path) -> bool:
    """Tell whether a folder holds the images of a model."""
    return (path / "images.bin").is_file() or (path / "images.txt").is_file()


def read_model(path: Path, photos: Sequence[Path]) -> Reading:
    """Read `images.bin`, or else `images.txt`, as COLMAP itself chooses."""
    file = path / "images.bin"
    images = _binary(file) if file.is_file() else _text(file := path / "images.txt")
    known = []
    for name, numbers in images:
        w, x, y, z, *translation = numbers
        to_camera = rigid_of_quaternion(f"{file}, image {name!r}", (x, y, z, w), translation)
        known.append(KnownPhoto(name, inverse(to_camera)))
    return Reading("COLMAP model", known)


def _text(path: Path) -> Iterator[tuple[str, list[float]]]:
    """Yield name, quaternion and translation; every image has two lines, the second of which may be empty."""
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    while lines and not lines[-1].strip():
        lines.pop()
    for first in range(0, len(lines), 2):
        fields, points = lines[first].split(maxsplit=9), lines[first + 1 : first + 2]
        try:
            if len(fields) != 10:
                raise ValueError(f"{len(fields)} fields")
            if points and len(points[0].split()) % 3:
                raise ValueError("the line that follows holds no points x, y, id")
            numbers = [float(field) for field in fields[1:8]]
        except ValueError as error:
            raise ValueError(
                f"{path} must hold two lines an image: id, qw, qx, qy, qz, tx, ty, tz, camera, name, then its points "
                f"or nothing; image {first // 2 + 1} is {lines[first]!r} ({error})"
            ) from None
        yield fields[9].strip(), numbers


def _binary(path: Path) -> Iterator[tuple[str, list[float]]]:
    content, place = path.read_bytes(), POINTS.size
    try:
        [count] = POINTS.unpack_from(content)
        for _ in range(count):
            _, *numbers, _ = IMAGE.unpack_from(content, place)
            end = content.index(b"\0", place + IMAGE.size)
            name = content[place + IMAGE.size : end].decode("utf-8", errors="surrogateescape")
            [points] = POINTS.unpack_from(content, end + 1)
            place = end + 1 + POINTS.size + POINT_BYTES * points
            yield name, numbers
    except (struct.error, ValueError, OverflowError) as error:
        raise ValueError(f"{path} must be the images of a COLMAP model, and is cut off or damaged ({error})") from error
    if place != len(content):
        raise ValueError(f"{path} must be the images of a COLMAP model, but {len(content) - place} bytes do not fit")


COLMAP = Format("a COLMAP model (folder with images.txt or images.bin)", is_model, read_model)
