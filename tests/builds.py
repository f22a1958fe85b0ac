"""What tests compile: once in a run, whichever of pytest-xdist's workers asks first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

FOLDER = Path()
"""The folder of what is compiled, the same for all workers of a run; conftest.py sets it."""


def once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the file `name` in FOLDER; unless it is there, `build(path)` writes it, while others wait.

    Others are processes and threads that ask for the same name.
    """
    import fcntl  # not on Windows, where nothing is compiled

    target = FOLDER / name
    target.parent.mkdir(exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a worker that dies
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.unfinished")
            build(unfinished)
            unfinished.rename(target)
    return target
