"""Depth maps from files, and what of them a frame shows."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .photos import crop_of, read_levels

DEPTH_SUFFIXES = (".png", ".npy")
LARGEST_DIFFERENCE = 0.02  # of the aspect ratios of a photo and its depth map

_one_at_a_time = threading.Lock()
"""NumPy reads the header as Python, and Python 3.11 fails now and then where two threads parse ("AST constructor
recursion depth mismatch")."""


def read_depth_map(path: Path, scale: float = 1.0, unknown: int | None = None) -> Tensor:
    """Read a depth map: a grey PNG of 16 bits, or a NumPy array `[H, W]` of numbers.

    Args:
        path: The file, .png or .npy.
        scale: By what its numbers are multiplied.
        unknown: A number that stands for no depth, beside 0.

    Returns:
        Depth `[H, W]`, float32; 0 where it is not known (0, negative, infinite or not a number in the file).

    Raises:
        ValueError: The file cannot be read as a depth map.
    """
    levels = read_array(path) if path.suffix.lower() == ".npy" else read_levels(path)
    if levels.ndim != 2 or levels.dtype.kind not in "fui" or levels.itemsize < 2 or levels.size == 0:
        raise ValueError(
            f"{path} must hold a depth map [H, W] of numbers of 16 bits or more, a picture of depth is none; got "
            f"{levels.dtype} {list(levels.shape)}"
        )
    return scaled(levels, scale, unknown)


def read_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file; runs no code from it.

    Raises:
        ValueError: The file cannot be read as an array.
    """
    try:
        with path.open("rb") as file, _one_at_a_time:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python and raises whatever that leads to
        raise ValueError(f"{path} cannot be read as an array of NumPy ({error}); write it with np.save") from error


def scaled(levels: np.ndarray, scale: float, unknown: int | None = None) -> Tensor:
    """Return the numbers of a depth map as `read_depth_map` does."""
    with np.errstate(over="ignore", invalid="ignore"):
        depth = (levels.astype(np.float64) * scale).astype(np.float32)
    known = np.isfinite(depth) & (depth > 0) & (levels != unknown)
    return torch.from_numpy(np.where(known, depth, np.float32(0)))


def depth_of_frame(
    depth: Tensor,  # [h, w]
    photo: tuple[int, int],
    frame: tuple[int, int],
) -> Tensor:
    """Return the depth at the middle of each pixel of a frame, `[H, W]`: the nearest pixel of the map, never a mean.

    The frame shows the part of the photo that `crop_of` names. The map shows what the whole photo shows, at any
    resolution.

    Args:
        depth: The depth map.
        photo: Width and height of the upright photo.
        frame: Width and height of the frame.

    Raises:
        ValueError: If the map has another aspect ratio than the photo.
    """
    height, width = depth.shape
    ratio = width / height * photo[1] / photo[0]
    if abs(ratio - 1) > LARGEST_DIFFERENCE:
        raise ValueError(
            f"a depth map must show what its photo shows, but it has {width} x {height} pixels and the upright photo "
            f"{photo[0]} x {photo[1]}; scale or crop it to that shape"
        )
    crop = crop_of(photo, frame)
    columns = _pixels_at((crop.left + crop.scale * _middles(frame[0])) / photo[0], width)
    rows = _pixels_at((crop.top + crop.scale * _middles(frame[1])) / photo[1], height)
    return depth[rows[:, None], columns]


def depth_of_photo(
    depth: Tensor,  # [H, W]
    photo: tuple[int, int],
) -> Tensor:
    """Return what the depth of a frame says of its whole photo, `[h, w]`, at the frame's scale; 0 outside the frame.

    Each pixel has the depth of the nearest one of the frame, nothing is averaged. Where the frame begins between two
    pixels of the map, `depth_of_frame` reads a row or a column twice and another not at all; else the frame's depth.

    Args:
        depth: Of a frame of the photo as `load_photos` makes it.
        photo: Width and height of the upright photo.
    """
    frame = depth.shape[1], depth.shape[0]
    crop = crop_of(photo, frame)
    shown = []
    for side, offset, pixels in zip(photo, (crop.left, crop.top), frame, strict=True):
        count = max(1, round(side / crop.scale))
        places = (_middles(count) * side / count - offset) / crop.scale
        shown.append((places.long().clamp(0, pixels - 1), (places >= 0) & (places < pixels)))
    (columns, beside), (rows, above) = shown
    return depth[rows[:, None], columns] * (above[:, None] & beside)


def _middles(pixels: int) -> Tensor:
    return torch.arange(pixels, dtype=torch.float64) + 0.5


def _pixels_at(shares: Tensor, pixels: int) -> Tensor:
    """Return the pixels that lie at these shares of a side of so many pixels."""
    return (shares * pixels).long().clamp(0, pixels - 1)
