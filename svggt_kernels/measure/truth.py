"""Pairs of photos that are known to share a view, read from a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..io.photos import PHOTO_SUFFIXES
from ..sources.names import ImageNames


def read_pairs(path: Path, photos: Sequence[Path], *, above: float = 0.0) -> Tensor:
    """Read which photos share a view from a CSV file: photo, photo, and a score such as matches or overlap.

    Sharing a view has no direction: a pair counts both ways as soon as one row names it with a score above the
    threshold. A first line that names no photo and whose third field is not a number is a heading. Without a third
    field every row counts.

    Args:
        path: The file, in UTF-8.
        photos: The photos of the folder, in order; rows name them by file name or path, with or without the suffix.
        above: The score that a pair must exceed.

    Returns:
        Pairs of different frames, both (i, j) and (j, i), sorted, `[E, 2]` int64.

    Raises:
        ValueError: The file cannot be read as such a table, names a photo that is not there or that may be several, or
            holds no pair.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"a CSV file of pairs is needed, but {path} is none")
    known = ImageNames([photo.absolute() for photo in photos], stems=True)
    pairs = set()
    for number, row in _rows(path):
        if number == 1 and _is_heading(row, known):
            continue
        first, second, score = _parse(f"line {number} of {path}", row, known)
        if score > above and first != second:
            pairs |= {(first, second), (second, first)}
    if not pairs:
        raise ValueError(
            f"{path} must name a pair of two photos with a score above {above:g}, and names none; lower that score"
        )
    return torch.tensor(sorted(pairs), device="cpu")


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty, each with its number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if row:
                    yield number, row
    except (csv.Error, UnicodeError) as error:
        raise ValueError(f"{path} must be comma-separated values in UTF-8, and cannot be read: {error}") from error


def _is_heading(row: Sequence[str], known: ImageNames) -> bool:
    names = [Path(name.strip()) for name in row[:2]]
    if any(name.suffix.lower() in PHOTO_SUFFIXES for name in names):
        return False
    return _score(row) is None and all(known.find(name) is None for name in names)


def _score(row: Sequence[str]) -> float | None:
    """Return the third field, infinity where there is none, None where it is no number."""
    try:
        return float(row[2]) if len(row) > 2 else math.inf
    except ValueError:
        return None


def _parse(where: str, row: Sequence[str], known: ImageNames) -> tuple[int, int, float]:
    if len(row) < 2:
        raise ValueError(f"{where} must hold photo, photo, score, got {','.join(row)!r}")
    first, second = (_photo(where, name.strip(), known) for name in row[:2])
    score = _score(row)
    if score is None or math.isnan(score):
        raise ValueError(f"{where} must hold a number in its third field, got {row[2]!r}")
    return first, second, score


def _photo(where: str, name: str, known: ImageNames) -> int:
    try:
        photo = known.find(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if photo is None:
        raise ValueError(f"{where} names {name!r}, which is no photo of the folder")
    return photo
