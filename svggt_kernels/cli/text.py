"""Plain text for the terminal: aligned tables, numbers with units, and a line for each stage of a long command."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Return rows as lines with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


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


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say on stderr what is being done, with a spinner on a terminal where rich is installed, and how long it took."""
    started = time.perf_counter()
    with _spinner(what):
        yield
    print(f"  {what}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


@contextmanager
def _spinner(what: str) -> Iterator[None]:
    try:
        from rich.console import Console
    except ImportError:
        yield
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what + " ..."):
        yield
