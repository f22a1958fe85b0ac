"""Values of options: each reads the text of one, or says what it must be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return a function that reads an integer of at least so much."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return read


natural, positive = at_least(0), at_least(1)


def number(text: str) -> float:
    """Read a number, NaN refused."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def above_zero(text: str) -> float:
    """Read a number above 0."""
    value = number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def percentage(text: str) -> float:
    """Read a number from 0 to below 100."""
    value = number(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"must be 0 or more and below 100, got {text}")
    return value


def budget(text: str) -> float | str:
    """Read a number of GiB, or the word auto."""
    return text if text == "auto" else above_zero(text)
