"""A closed core: every frame sees itself and the same few frames."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ..graph import CovisibilityGraph
from ..graph.arguments import integer
from ..graph.core import Choice, choose_core, nearest_frames, spread_evenly
from .base import Scene
from .cache import LRUCache
from .megaloc import MegaLocSimilarity
from .similarity import Similarity, content_of
from .thumbnails import ThumbnailSimilarity
from .tokens import PatchSimilarity, TokenSimilarity

CORE_SIZE = 52
"""Frames of a core, however many photos there are; docs/accuracy.md has the study."""

By = Literal["megaloc", "patches", "tokens", "thumbnails"]
SIMILARITIES: dict[By, type[Similarity] | type[PatchSimilarity]] = {
    "megaloc": MegaLocSimilarity,
    "patches": PatchSimilarity,
    "tokens": TokenSimilarity,
    "thumbnails": ThumbnailSimilarity,
}


@dataclass(frozen=True)
class Core:
    """Every frame sees itself and a core of frames that represent all; frames of the core see the core alone.

    All frames answer to the same frames, the model's reference frame among them, and so in one coordinate system; the
    cost is linear in the number of frames. Up to `size` frames everything sees everything. Special tokens are ordinary
    tokens of their frames unless `patch` is told otherwise.

    Attributes:
        size: Frames of the core.
        by: What frames are compared by: "megaloc", "patches" or "tokens" of the model, "thumbnails", or a similarity of
            which nothing else is used; None takes frames at equal distances in their order.
        choice: How they are chosen; see `graph.core.choose_core`.
        nearest: Most similar frames that each frame outside the core sees besides.
    """

    size: int = CORE_SIZE
    by: Similarity | PatchSimilarity | By | None = "megaloc"
    choice: Choice = "covering"
    nearest: int = 0
    _similarity: Similarity | PatchSimilarity | None = field(init=False, repr=False, compare=False)
    _graphs: LRUCache[CovisibilityGraph] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        integer("size", self.size, 1)
        integer("nearest", self.nearest, 0)
        if not (self.by is None or isinstance(self.by, Similarity | PatchSimilarity) or self.by in SIMILARITIES):
            words = ", ".join(f'"{word}"' for word in SIMILARITIES)
            raise ValueError(f"by must be {words}, a similarity or None, got {self.by!r}")
        if self.choice not in get_args(Choice):
            raise ValueError(f"choice must be one of {', '.join(get_args(Choice))}, got {self.choice!r}")
        if self.by is None and self.nearest:
            raise ValueError(f"nearest={self.nearest} frames need descriptors; give `by`, or leave nearest=0")
        similarity = SIMILARITIES[self.by]() if isinstance(self.by, str) else self.by
        if isinstance(similarity, Similarity) and (similarity.also is not None or similarity.window):
            raise ValueError("a core has no window and no pairs that are known; leave `window` and `also` of `by` out")
        object.__setattr__(self, "_similarity", similarity)

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        words = {"covering": "that resemble most others by", "farthest": "that differ most by"}
        how = "at equal distances" if self._similarity is None else f"{words[self.choice]} {self._similarity.by}"
        beside = f", and {self.nearest} nearest frames" if self.nearest else ""
        return f"a core of {self.size} frame{'s' * (self.size != 1)} {how}{beside}"

    @property
    def needs(self) -> Literal["nothing", "images", "tokens"]:
        """What a scene must have."""
        return "nothing" if self._similarity is None else self._similarity.needs

    @property
    def reads_fingerprints(self) -> bool:
        """Whether the images of a scene are looked up."""
        return getattr(self._similarity, "reads_fingerprints", False)

    def opened(self) -> Core:
        """Return the same source with a cache of its own, ready to be used by one patch."""
        opened = getattr(self._similarity, "opened", None)
        return replace(self, by=self._similarity if opened is None else opened())

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene; the same object for the same images, or without descriptors for as many frames.

        Raises:
            ValueError: If a descriptor is not finite or zero, or the scene has not what descriptors need.
        """
        if self._similarity is None:
            return self._graphs.get((scene.num_frames, scene.reference_frame), lambda: self._spread_evenly(scene))
        if self._similarity.needs == "images":
            return self._graphs.get(content_of(scene, self._similarity.by), lambda: self._chosen(scene))
        return self._chosen(scene)

    def _chosen(self, scene: Scene) -> CovisibilityGraph:
        assert self._similarity is not None
        with scene.step("descriptors"):
            compared = self._similarity.compared(scene)
        with scene.step("graph"):
            core = choose_core(compared, self.size, choice=self.choice, first=scene.reference_frame or 0)
            nearest = nearest_frames(compared, self.nearest) if self.nearest else None
            return CovisibilityGraph.core(scene.num_frames, core, nearest=nearest)

    def _spread_evenly(self, scene: Scene) -> CovisibilityGraph:
        core, reference_frame = spread_evenly(scene.num_frames, self.size), scene.reference_frame
        if reference_frame is not None:
            core[(core - reference_frame).abs().argmin()] = reference_frame
        return CovisibilityGraph.core(scene.num_frames, core)


@dataclass(frozen=True)
class PatchCore(Core):
    """A core chosen by patches of the model unless told otherwise: the word "patches" of `patch`."""

    by: Similarity | PatchSimilarity | By | None = "patches"
