"""How a forward ran in chunks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunksReport:
    """How the last forward of a patched model ran in chunks.

    Attributes:
        reason: Why.
        chunk: Frames that ran together.
        chunks: How many times such ran, of all samples.
        core: Frames of the core, which ran before.
        coarse: Frames that ran with it and that all see at a stride.
        kept_gib: Memory of the keys and values that were kept of these, GiB.
        followers: Names of the modules that attended over the core too, where in one forward they attend over all
            frames.
    """

    reason: str
    chunk: int
    chunks: int
    core: int
    coarse: int
    kept_gib: float
    followers: tuple[str, ...]

    def __str__(self) -> str:
        coarse = f" and {self.coarse} frames at a stride" if self.coarse else ""
        return (
            f"in chunks ({self.reason}): a core of {self.core} frames{coarse}, {self.kept_gib:.2f} GiB kept, then "
            f"{self.chunks} chunk{'s' * (self.chunks != 1)} of up to {self.chunk} frames"
            + (f"; closed over the core: {', '.join(self.followers)}" if self.followers else "")
        )
