"""Plain text for the terminal: aligned tables, and a line for each stage of a long command."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..measure.cost import Tell


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Return rows as lines with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


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
        console = None
    else:
        console = Console(stderr=True)
    if console is None or not console.is_terminal:
        yield lambda progress: print(f"  {what}, {progress}", file=sys.stderr)
        return
    # In a string rich would read markup, and a folder may be called [red].
    with console.status(Text(f"{what} ...")) as status:
        yield lambda progress: status.update(Text(f"{what}, {progress} ..."))
