"""Plain text for the terminal: aligned tables, numbers with units, and a line for each stage of a long command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Tell = Callable[[str], None]


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


def count(number: int, noun: str) -> str:
    """Return `1 photo` or `3 photos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """Return the text with escapes for what no encoding holds: those bytes of a file name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def stage(what: str) -> Iterator[Tell]:
    """Say on stderr what is being done and how long it took; yield a function that says how far it is.

    On a terminal where rich is installed a spinner shows both, elsewhere each is a line.
    """
    started = time.perf_counter()
    with _spinner(what) as tell:
        yield tell
    print(f"  {what}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


@contextmanager
def _spinner(what: str) -> Iterator[Tell]:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        yield _line(what)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line(what)
        return
    # In a string rich would read markup, and a folder may be called [red].
    with console.status(Text(f"{what} ...")) as status:
        yield lambda progress: status.update(Text(f"{what}, {progress} ..."))


def _line(what: str) -> Tell:
    return lambda progress: print(f"  {what}, {progress}", file=sys.stderr)
