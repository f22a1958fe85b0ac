"""Numbers with their units, counts and file names as text."""

from __future__ import annotations


def milliseconds(value: float) -> str:
    """Return a time as `12.3 ms` or `4.56 s`."""
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def mebibytes(value: float | None) -> str:
    """Return an amount of memory as `123 MiB`."""
    return "not measured" if value is None else f"{value:.0f} MiB"


def percent(share: float) -> str:
    """Return a share as `12.3 %`."""
    return f"{100 * share:.3g} %"


def times(factor: float) -> str:
    """Return a factor as `3.4x`."""
    return f"{factor:.3g}x"


def count(number: int, noun: str) -> str:
    """Return `1 photo` or `3 photos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Return the text with escapes for what no encoding holds: those bytes of a file name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
