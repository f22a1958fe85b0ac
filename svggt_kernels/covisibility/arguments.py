"""Checks that arguments of this folder have in common."""

from __future__ import annotations

import operator


def integer(name: str, value: int, least: int, most: int | None = None) -> int:
    """Return an argument as an int.

    Args:
        name: What messages call it.
        value: The argument; anything that Python takes as an index.
        least: The least that it may be.
        most: The most; None for no limit.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number
