"""Trajectories: a line of numbers for each pose, camera to world. TUM's carry times, KITTI's carry none.

Which pose is that of which photo:

- TUM, where `rgb.txt` lies beside the trajectory: it gives the time of each photo.
- TUM, else, where the name of every photo is a number: that is its time.
- KITTI and TUM, else, where there are as many poses as photos: by order.
- KITTI, else, where the name of every photo is a whole number: that is its line, from 0.

A photo has the pose nearest in time, at most 0.02 s away; of several photos with one pose, the nearest has it.

Names that are numbers might be no times, but count photos. So they must give every photo a pose where there are as many
poses as photos, or where all of them are whole numbers. Nor may whole numbers, as numbers of lines from 0, give other
poses than as times. What breaks these rules is refused, unless no photo has a pose by time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...sources.names import ImageNames
from ..wording import count
from .base import Format, KnownPhoto, Reading, rigid, rigid_of_quaternion

TUM_COLUMNS, KITTI_COLUMNS = 8, 12
FARTHEST = 0.02  # seconds, as in the TUM benchmark's associate.py
NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


def read_trajectory(path: Path, photos: Sequence[Path]) -> Reading:
    """Read a trajectory of TUM (8 numbers a line) or of KITTI (12 numbers a line)."""
    lines = _lines(path)
    try:
        rows = np.array([line.split() for _, line in lines], dtype=np.float64)
    except ValueError:
        rows = np.empty((0, 0))
    if rows.ndim != 2 or rows.shape[1] not in (TUM_COLUMNS, KITTI_COLUMNS) or not np.isfinite(rows).all():
        raise ValueError(_fault(path, lines))
    is_tum = rows.shape[1] == TUM_COLUMNS
    places = [f"{path}, line {number}" for number, _ in lines]
    if is_tum:
        poses = [rigid_of_quaternion(where, row[4:], row[1:4]) for where, row in zip(places, rows, strict=True)]
        how, photo_of = _by_time(path, photos, rows[:, 0])
    else:
        poses = [rigid(where, row.reshape(3, 4)) for where, row in zip(places, rows, strict=True)]
        how, photo_of = _by_line(path, photos, len(rows))
    names = [os.path.abspath(photos[photo_of[i]]) if i in photo_of else where for i, where in enumerate(places)]
    label = f"{'TUM' if is_tum else 'KITTI'} trajectory, photos told by {how}"
    return Reading(label, [KnownPhoto(name, pose) for name, pose in zip(names, poses, strict=True)])


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are neither empty nor comments, with their numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a trajectory, and is no text ({error})") from error
    numbered = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _fault(path: Path, lines: Sequence[tuple[int, str]]) -> str:
    """Say what is wrong with the first line that is."""
    rule = f"{path} must hold a pose a line: TUM's 8 numbers (time tx ty tz qx qy qz qw) or KITTI's 12 (rows of [R t])"
    if not lines:
        return f"{rule}, and holds no line"
    columns = len(lines[0][1].split())
    columns = columns if columns in (TUM_COLUMNS, KITTI_COLUMNS) else 0
    for number, line in lines:
        fields = line.split()
        if len(fields) != columns:
            return f"{rule}, all lines alike; line {number} has {len(fields)}: {line!r}"
        try:
            sound = all(np.isfinite(float(field)) for field in fields)
        except ValueError:
            sound = False
        if not sound:
            return f"{rule}, all of them finite; line {number} is {line!r}"
    raise AssertionError("every line is as it must be")


def _by_time(path: Path, photos: Sequence[Path], times: np.ndarray) -> tuple[str, Mapping[int, int]]:
    """Return in words how photos are told, and the photo of each pose that has one."""
    if len(np.unique(times)) < len(times):
        repeated = next(time for time in times if (times == time).sum() > 1)
        raise ValueError(f"{path} must give each time once, but {repeated} stands there several times; take one out")
    table = path.parent / "rgb.txt"
    if table.is_file():
        return f"the times in {table}", _nearest(_times_in_table(table, photos), times)
    if all(NUMBER.fullmatch(photo.stem) for photo in photos):
        photo_of = _nearest({i: float(photo.stem) for i, photo in enumerate(photos)}, times)
        if photo_of and (doubt := _doubt(photos, len(times), photo_of)):
            raise ValueError(
                f"{path} holds {count(len(times), 'pose')} for {count(len(photos), 'photo')}, but {doubt}; give "
                "rgb.txt beside it (time and photo a line), or names that are the times, with a decimal point"
            )
        if photo_of:
            return "the times that are their names", photo_of
    if len(photos) == len(times):
        return "their order", {i: i for i in range(len(times))}
    raise ValueError(
        f"{path} holds {len(times)} poses for {len(photos)} photos whose names are not its times, so it cannot be told "
        "which is which; give rgb.txt beside it (time and photo a line), or names that are the times"
    )


def _doubt(photos: Sequence[Path], poses: int, photo_of: Mapping[int, int]) -> str:
    """Say why names that are numbers, and give these photos a pose by time, might be no times; else nothing."""
    are_whole = all("." not in photo.stem for photo in photos)
    if len(photo_of) < len(photos) and (are_whole or len(photos) == poses):
        return f"by the times that are their names only {len(photo_of)} of them have one"
    numbered = _numbered(photos, poses)
    if numbered and numbered != photo_of:
        return "the whole numbers that are their names give other poses as times than as numbers of lines from 0"
    return ""


def _by_line(path: Path, photos: Sequence[Path], lines: int) -> tuple[str, Mapping[int, int]]:
    if len(photos) == lines:
        return "their order", {i: i for i in range(lines)}
    photo_of = _numbered(photos, lines)
    if len(photo_of) == len(photos):
        return "the lines that are their names", photo_of
    raise ValueError(
        f"{path} holds {lines} poses for {len(photos)} photos whose names are not its lines (000000 for the first), so "
        "it cannot be told which is which; give as many photos as poses, or such names"
    )


def _numbered(photos: Sequence[Path], lines: int) -> dict[int, int]:
    """Return the photo of each line that names a photo; none if the name of some photo is no number of a line."""
    if not all(photo.stem.isascii() and photo.stem.isdigit() and int(photo.stem) < lines for photo in photos):
        return {}
    return {int(photo.stem): i for i, photo in enumerate(photos)}


def _times_in_table(table: Path, photos: Sequence[Path]) -> dict[int, float]:
    """Return the time of each photo that the table names."""
    rows = [line.split(maxsplit=1) for _, line in _lines(table)]
    if not all(len(row) == 2 and NUMBER.fullmatch(row[0]) for row in rows):
        raise ValueError(f"{table} must hold a time and a photo a line, separated by a space")
    names = ImageNames([os.path.abspath(photo) for photo in photos])
    return {place: float(time) for time, name in rows if (place := names.find(name)) is not None}


def _nearest(times_of_photos: Mapping[int, float], times: np.ndarray) -> dict[int, int]:
    """Return the photo of each pose that is the nearest of some photo and near enough; of several, the nearest."""
    nearest: dict[int, tuple[float, int]] = {}
    for photo, time in times_of_photos.items():
        pose = int(np.abs(times - time).argmin())
        distance = abs(times[pose] - time)
        if distance <= FARTHEST:
            nearest[pose] = min(nearest.get(pose, (np.inf, photo)), (distance, photo))
    return {pose: photo for pose, (_, photo) in nearest.items()}


TRAJECTORY = Format(
    "a TUM trajectory (8 numbers a line) or a KITTI trajectory (12 numbers a line)", Path.is_file, read_trajectory
)
