"""Graphs that follow from the order of the frames, or from their number alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

from ..graph import CovisibilityGraph
from .base import Scene
from .similarity import frames_around

GRAPHS_KEPT = 16


@dataclass(frozen=True)
class Sequential:
    """Frames see those before and after, and the model's reference frame, which sees all.

    Attributes:
        window: Frames before and after that each frame sees.
    """

    window: int = 10

    needs: ClassVar[Literal["nothing"]] = "nothing"

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        return f"{frames_around(self.window)}, and the model's reference frame"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene; the same object for as many frames and the same reference frame."""
        return _sequential(scene.num_frames, self.window, scene.reference_frame)


@dataclass(frozen=True)
class AllFrames:
    """Every frame sees every other, which is dense attention."""

    label: ClassVar[str] = "every frame sees every other"
    needs: ClassVar[Literal["nothing"]] = "nothing"

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the full graph of a scene; the same object for as many frames."""
        return _all_visible(scene.num_frames)


@lru_cache(GRAPHS_KEPT)
def _sequential(frames: int, window: int, reference_frame: int | None) -> CovisibilityGraph:
    graph = CovisibilityGraph.sequential(frames, window)
    if reference_frame is None:
        return graph
    star = [(frame, reference_frame) for frame in range(frames) if frame != reference_frame]
    return graph | CovisibilityGraph.from_pairs(frames, star).symmetrized()


_all_visible = lru_cache(GRAPHS_KEPT)(CovisibilityGraph.all_visible)
