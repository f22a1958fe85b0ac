"""Long work in threads: started, asked about, and its result fetched; one piece of work at a time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ..measure.compare import Stage
from ..measure.cost import Tell, is_out_of_memory

State = Literal["waiting", "running", "done", "failed"]
REFUSALS = (ValueError, TypeError, OSError, ImportError)
"""What a request that cannot be carried out raises, with words for whoever asked."""


class Job:
    """A piece of work.

    Attributes:
        number: What it is asked for by.
        what: What it does, in words.
        state: "waiting", "running", "done" or "failed".
        said: What was being done, in order.
        result: What came of it, once done.
        error: Why it failed.
    """

    def __init__(self, number: str, what: str) -> None:
        self.number, self.what = number, what
        self.state: State = "waiting"
        self.said: list[str] = []
        self.result: Any = None
        self.error: BaseException | None = None
        self._started = self._ended = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether it is done or has failed."""
        return self.state in ("done", "failed")

    @property
    def seconds(self) -> float:
        """Time since it was asked for, until it was over."""
        return (self._ended if self.is_over else time.monotonic()) - self._started

    @contextmanager
    def stage(self, what: str) -> Iterator[Tell]:
        """Note what is being done, as `measure.compare.Stage` wants it."""
        self.said.append(what)
        yield lambda progress: self.said.append(f"{what}, {progress}")

    def run(self, work: Callable[[Stage], Any], turn: threading.Lock) -> None:
        """Do the work when it is its turn."""
        with turn:
            self.state = "running"
            state: State = "failed"
            try:
                self.result, state = work(self.stage), "done"
            except BaseException as error:
                self.error = error
            finally:
                self._ended = time.monotonic()
                self.state = state


class Jobs:
    """All pieces of work of a process; models are too large, and patches not made, for two at a time."""

    def __init__(self) -> None:
        self._turn, self._numbers = threading.Lock(), itertools.count(1)
        self._jobs: dict[str, Job] = {}

    def start(self, what: str, work: Callable[[Stage], Any]) -> Job:
        """Start a piece of work in a thread, or have it wait for those before.

        Args:
            what: What it does, in words.
            work: Does it, and tells what it is doing to what it is given.
        """
        job = Job(f"job-{next(self._numbers)}", what)
        self._jobs[job.number] = job
        threading.Thread(target=job.run, args=(work, self._turn), name=job.number, daemon=True).start()
        return job

    def find(self, number: str) -> Job:
        """Return a piece of work.

        Raises:
            ValueError: There is none of that number.
        """
        if number not in self._jobs:
            raise ValueError(f"there is no job {number!r}; there are {', '.join(self._jobs) or 'none'}")
        return self._jobs[number]


def refusal(error: BaseException) -> str | None:
    """Return the words of an error for whoever asked; None if it is a fault of the program."""
    if is_out_of_memory(error):
        return "memory ran out; use fewer frames (max_frames) or smaller ones (long_side)"
    return str(error) if isinstance(error, REFUSALS) else None
