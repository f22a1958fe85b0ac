"""Checks that arguments of several rooms have in common."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_EDGES = 2**31 - 1


def integer(name: str, value: int, least: int, most: int | None = None) -> int:
    """Return an argument as an int.

    Args:
        name: What messages call it.
        value: The argument; anything that Python takes as an index, but for True and False.
        least: The least that it may be.
        most: The most; None for no limit.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    """Return an argument as a tensor, which may share its memory: read it only.

    Args:
        name: What messages call it.
        value: The argument; an array becomes a tensor on the CPU, and is copied where PyTorch cannot share it.

    Raises:
        TypeError: If it is neither a tensor nor an array of numbers that PyTorch knows.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        given = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be a tensor or a NumPy array of numbers, got {given}")
    array = np.asarray(value, dtype=value.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def first_true(flags: Tensor) -> int | None:
    """Return the first place of `[n]` bool where it is True, None if there is none; waits for the device."""
    places = flags.nonzero()
    return int(places[0]) if len(places) else None


def frames_tensor(name: str, frames: Sequence[Any] | Tensor | np.ndarray, dimensions: int, num_frames: int) -> Tensor:
    """Return indices of frames as an int64 tensor.

    Args:
        name: What messages call them.
        frames: The indices; a tensor stays on its device.
        dimensions: How many they must have.
        num_frames: What they must be below.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they have other dimensions, or one is out of range.
    """
    indices = tensor(name, frames if isinstance(frames, (Tensor, np.ndarray)) else np.asarray(frames))
    if indices.ndim != dimensions or 0 in indices.shape:
        raise ValueError(f"{name} must have {dimensions} dimensions, none of them 0, got shape {tuple(indices.shape)}")
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {indices.dtype}")
    outside = (indices < 0) | (indices >= num_frames)
    if bool(outside.any()):
        raise ValueError(f"{name} must be in [0, {num_frames}), got {int(indices[outside][0])}")
    return indices.to(torch.int64, copy=True)


def descriptors_tensor(descriptors: Tensor | np.ndarray) -> Tensor:
    """Return descriptors `[S, C]` as a tensor, which may share their memory.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If they are not `[S, C]`.
    """
    descriptors = tensor("descriptors", descriptors)
    if not descriptors.is_floating_point():
        raise TypeError(f"descriptors must be a floating point tensor or array, got {descriptors.dtype}")
    if descriptors.ndim != 2 or 0 in descriptors.shape:
        raise ValueError(f"descriptors must be [S, C] with S, C >= 1, got shape {tuple(descriptors.shape)}")
    return descriptors


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """Return x on another device; only CUDA is not waited for, others may read memory that is gone."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")


def pairs_tensor(pairs: Iterable[Sequence[int]] | Tensor | np.ndarray) -> Tensor:
    """Return the pairs as `[E, 2]` int64, on their device if they are a tensor."""
    pairs = tensor("pairs", pairs if isinstance(pairs, (Tensor, np.ndarray)) else _pairs_to_array(list(pairs)))
    if pairs.dtype.is_floating_point or pairs.dtype.is_complex or pairs.dtype == torch.bool:
        raise TypeError(
            f"pairs must hold integers, got {pairs.dtype}; frames are counted from 0; use from_dense for a boolean "
            "matrix"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [E, 2], one (query frame, key frame) a row, got shape {tuple(pairs.shape)}")
    return pairs.to(torch.int64)


def _pairs_to_array(pairs: list[Sequence[int]]) -> np.ndarray:
    """Return `[E, 2]` integers, or raises and names the first pair that does not fit."""
    if not pairs:
        return np.zeros((0, 2), dtype=np.int64)
    for at, pair in enumerate(pairs):
        try:
            i, j = pair
        except (TypeError, ValueError):
            raise ValueError(f"pair {at} must be (query frame, key frame), got {pair!r}") from None
        for index in (i, j):
            if not isinstance(index, int | np.integer) or isinstance(index, bool):
                raise TypeError(f"pair {at}, {pair!r}, must hold integers, got {type(index).__name__}")
    try:
        return np.array(pairs, dtype=np.int64)
    except OverflowError:
        raise ValueError("pairs hold an integer beyond 64 bits; frames are counted from 0") from None


def check_edge_count(edges: int) -> None:
    """Raise ValueError if a graph cannot hold so many edges."""
    if edges > MAX_EDGES:
        raise ValueError(f"a graph holds at most {MAX_EDGES} edges (int32 offsets), got {edges}; make it sparser")
