"""A trajectory of the TUM benchmark: `time tx ty tz qx qy qz qw` a line, camera to world.

The time of a video's frame is in seconds; photos have none, and are counted from 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...rigid_motions import quaternion_of
from .base import Files, Format, Material

TRAJECTORY = "trajectory.txt"


def _write(material: Material) -> Iterator[Files]:
    scene = material.scene
    lines = ["# time tx ty tz qx qy qz qw, camera to world"]
    times = scene.times or range(len(scene.names))
    for time, camera in zip(times, scene.cameras, strict=True):
        numbers = [*camera.pose[:3, 3].tolist(), *quaternion_of(camera.pose[:3, :3]).tolist()]
        lines.append(" ".join([f"{time:.6f}", *(f"{number:.12g}" for number in numbers)]))
    yield {TRAJECTORY: "\n".join([*lines, ""]).encode()}


TUM = Format("tum", "trajectory, TUM", TRAJECTORY, _write)
