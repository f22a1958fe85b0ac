"""How far a training is, by its clock or by its steps, and what follows from that."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

WARM_UP_STEPS = 300
WARM_UP_SHARE = 0.02
CONSTANT_UNTIL = 0.4
MATCH_FADES = (0.5, 0.75)
TUNING_RATE = 0.2
TUNING_WARM_UP_STEPS = 100


@dataclass
class Progress:
    """How much of a training is done, over all its sessions.

    Attributes:
        seconds: Time that the whole training may take, or None.
        steps: Steps that the whole training takes, or None; one of the two is set.
        step: Steps done.
        frames: Frames seen.
        elapsed: Seconds of earlier sessions.
        begin: When this session began; see `begin_session`.
    """

    seconds: float | None
    steps: int | None
    step: int = 0
    frames: int = 0
    elapsed: float = 0.0
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.steps is None):
            raise ValueError(f"a training takes seconds or steps, got seconds={self.seconds} and steps={self.steps}")

    def begin_session(self) -> None:
        """Begin the session now: what came before does not count."""
        self.begin = time.monotonic()

    def session(self) -> float:
        """Return the seconds of this session."""
        return time.monotonic() - self.begin

    def total(self) -> float:
        """Return the seconds of all sessions."""
        return self.elapsed + self.session()

    def share(self, ahead: int = 0) -> float:
        """Return the share that is done, or by steps will be `ahead` steps from now; 1 or more is the end."""
        if self.steps is not None:
            return (self.step + ahead) / self.steps
        assert self.seconds is not None
        return self.total() / (self.seconds - self.reserve())

    def reserve(self) -> float:
        """Return the seconds that the end takes: the last validation and the files."""
        assert self.seconds is not None
        return min(30.0, 0.05 * self.seconds)


def rate_factor(share: float, step: int, warm_up_steps: int = WARM_UP_STEPS) -> float:
    """Return by what the learning rates are multiplied: they warm up, stay, and fall to a hundredth by a cosine."""
    warm = min(1.0, (step + 1) / warm_up_steps, share / WARM_UP_SHARE + 0.01)
    if share < CONSTANT_UNTIL:
        return warm
    rest = min(1.0, (share - CONSTANT_UNTIL) / (1 - CONSTANT_UNTIL))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest)))


def tuning_factor(share: float, step: int) -> float:
    """Return the same for weights that are trained already: a small share of the rates, which falls to 0 by a line.

    The further heads of the training begin at random, and what they teach at first means little: hence a warm-up.
    """
    return TUNING_RATE * min(1.0, (step + 1) / TUNING_WARM_UP_STEPS) * max(0.0, 1 - share)


def match_factor(share: float) -> float:
    """Return by what the matching loss is multiplied: it fades, so that attention is free at the end."""
    start, end = MATCH_FADES
    return min(1.0, max(0.0, (end - share) / (end - start)))
