"""Pairs of photos that are known to share a view, read from a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def read_pairs(path: Path, photos: Sequence[Path], *, above: float = 0.0) -> Tensor:
    """Read which photos share a view from a CSV file: photo, photo, and a score such as matches or overlap.

    Sharing a view has no direction: a pair counts both ways as soon as one row names it with a score above the
    threshold. A first line whose third field is not a number is a heading. Without a third field every row counts.

    Args:
        path: The file.
        photos: The photos of the folder, in order; rows name them by file name, with or without the suffix.
        above: The score that a pair must exceed.

    Returns:
        Pairs of different frames, both (i, j) and (j, i), sorted, `[E, 2]` int64.

    Raises:
        ValueError: The file cannot be read as such a table, names a photo that is not there, or holds no pair.
        FileNotFoundError: The file does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--truth must be a CSV file, but {path} is none")
    frame_of = {photo.stem: i for i, photo in enumerate(photos)} | {photo.name: i for i, photo in enumerate(photos)}
    pairs = set()
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row or (number == 1 and _is_heading(row, frame_of)):
                continue
            first, second, score = _parse(path, number, row, frame_of)
            if score > above and first != second:
                pairs |= {(first, second), (second, first)}
    if not pairs:
        raise ValueError(f"{path} names no pair of two photos with a score above {above:g}; lower --truth-above")
    return torch.tensor(sorted(pairs))


def _is_heading(row: Sequence[str], frame_of: dict[str, int]) -> bool:
    if len(row) < 3:
        return row[0].strip() not in frame_of
    try:
        float(row[2])
    except ValueError:
        return True
    return False


def _parse(path: Path, number: int, row: Sequence[str], frame_of: dict[str, int]) -> tuple[int, int, float]:
    where = f"line {number} of {path}"
    if len(row) < 2:
        raise ValueError(f"{where} must hold photo, photo, score, got {','.join(row)!r}")
    names = [name.strip() for name in row[:2]]
    for name in names:
        if name not in frame_of:
            raise ValueError(f"{where} names {name!r}, which is no photo of the folder")
    try:
        score = float(row[2]) if len(row) > 2 else float("inf")
    except ValueError:
        raise ValueError(f"{where} must hold a number in its third field, got {row[2]!r}") from None
    return frame_of[names[0]], frame_of[names[1]], score
