"""Refusals: what a user can put right is one line on stderr, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """The command cannot do what was asked; the message says what must hold, what was given and what to do."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turn errors about the user's input into `CommandError`. Wrap only calls whose arguments come from the user."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(sentence(error)) from error


def sentence(error: Exception) -> str:
    """Return what an error says; one of the operating system names the file and the reason, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    what = "the output" if error.filename is None else str(error.filename)
    return f"{what} cannot be read or written: {error.strerror[0].lower()}{error.strerror[1:]}"


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn a device that runs out of memory into a `CommandError` that says what to do."""
    from ..measure.cost import is_out_of_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CommandError(
            "memory ran out; use fewer frames (--max-frames; in demo --frames) or smaller ones (--long-side)"
        ) from error
