"""Checks that arguments of several rooms have in common."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor


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
