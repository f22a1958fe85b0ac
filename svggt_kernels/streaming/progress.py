"""How far a long run is: told to a listener, else on stderr where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Says how many frames are done and how long the rest will take.

    Args:
        what: What is done, in words.
        total: Frames in all, if that is known.
        tell: Is told each time in one line; None shows it on stderr where that is a terminal.
    """

    def __init__(self, what: str, total: int | None, tell: Callable[[str], object] | None = None) -> None:
        self.what, self.total, self._tell = what, total, tell
        self._done = self._skipped = 0
        self._shown = tell is None and sys.stderr.isatty()
        self._start = time.perf_counter()

    def add(self, frames: int, skipped: bool = False) -> None:
        """Note that frames are done; such as were done before tell nothing of the speed."""
        self._done += frames
        self._skipped += frames * skipped
        if self._tell is not None:
            self._tell(str(self))
        elif self._shown:
            print(f"\r{self}\x1b[K", end="", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        ran, seconds = self._done - self._skipped, time.perf_counter() - self._start
        if self.total is None:
            return f"{self.what}: {self._done} frames"
        left = f", {seconds / ran * (self.total - self._done):.0f} s left" if ran else ""
        return f"{self.what}: {self._done} of {self.total} frames{left}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and self._done:
            print(file=sys.stderr)
