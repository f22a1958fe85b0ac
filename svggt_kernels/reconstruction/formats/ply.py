"""Points with colours as a binary PLY, in the axes and the unit of the poses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .base import Files, Format, Material

POINTS = "points.ply"
VERTEX = np.dtype([*((axis, "<f4") for axis in "xyz"), *((colour, "u1") for colour in ("red", "green", "blue"))])


def _write(material: Material) -> Iterator[Files]:
    cloud = material.cloud
    vertices = np.empty(len(cloud), VERTEX)
    for axis, values in zip("xyz", cloud.points.numpy().T, strict=True):
        vertices[axis] = values
    for colour, levels in zip(("red", "green", "blue"), cloud.colours.numpy().T, strict=True):
        vertices[colour] = levels
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(cloud)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
        "end_header",
    ]
    yield {POINTS: "\n".join([*header, ""]).encode() + vertices.tobytes()}


PLY = Format("ply", "points, PLY", POINTS, _write, has_points=True)
