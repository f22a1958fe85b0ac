"""Graphs that follow from the order of the frames, or from their number alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..graph import CovisibilityGraph
from .base import Scene, joined
from .cache import LRUCache
from .similarity import frames_around


@dataclass(frozen=True)
class Sequential:
    """Frames see those before and after, and the model's reference frame, which sees all.

    Attributes:
        window: Frames before and after that each frame sees.
    """

    window: int = 10
    _graphs: LRUCache[CovisibilityGraph] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    needs: ClassVar[Literal["nothing"]] = "nothing"

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        return f"{frames_around(self.window)}, and the model's reference frame"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene; the same object for as many frames and the same reference frame."""
        frames, reference = scene.num_frames, scene.reference_frame

        return self._graphs.get(
            (frames, reference), lambda: joined(CovisibilityGraph.sequential(frames, self.window), reference)
        )


@dataclass(frozen=True)
class AllFrames:
    """Every frame sees every other, which is dense attention."""

    _graphs: LRUCache[CovisibilityGraph] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    label: ClassVar[str] = "every frame sees every other"
    needs: ClassVar[Literal["nothing"]] = "nothing"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the full graph of a scene; the same object for as many frames."""
        frames = scene.num_frames
        return self._graphs.get(frames, lambda: CovisibilityGraph.all_visible(frames))
