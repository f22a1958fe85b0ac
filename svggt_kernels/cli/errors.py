"""Refusals: what a user can put right is one line on stderr, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CommandError(Exception):
    """The command cannot do what was asked; the message says what must hold, what was given and what to do."""


@contextmanager
def refusals() -> Iterator[None]:
    """Turns errors about the user's input into `CommandError`. Wrap only calls whose arguments come from the user."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
