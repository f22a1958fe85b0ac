"""A closed core: every frame sees itself and the same few frames."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..graph import AnyGraph, CoarseGraph, CovisibilityGraph
from ..graph.arguments import integer
from ..graph.core import Choice, choose_core, nearest_frames, spread_evenly
from ..graph.pair_scores import PairScores
from .base import Scene
from .cache import LRUCache
from .megaloc import MegaLocSimilarity
from .similarity import Similarity, content_of
from .thumbnails import ThumbnailSimilarity
from .tokens import PatchSimilarity, TokenSimilarity

CORE_SIZE = 52
"""Frames of a core, however many photos there are; docs/accuracy.md has the study."""

STRIDE = 3
"""The stride at which frames are seen coarsely."""

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
    cost is linear in the number of frames. Up to `size` frames everything sees everything, and no frame is described.
    Special tokens are ordinary tokens of their frames unless `patch` is told otherwise.

    With `coarse`, all frames also see further ones at a stride of their patch grid (`CoarseGraph`); the core and these
    are closed together, unless all frames are seen so.

    Attributes:
        size: Frames of the core.
        by: What frames are compared by: "megaloc", "patches" or "tokens" of the model, "thumbnails", or a similarity of
            which nothing else is used; None takes frames at equal distances in their order.
        choice: How they are chosen; see `graph.core.choose_core`.
        nearest: Most similar frames that each frame outside the core sees besides.
        coarse: Further frames that all see coarsely, "all" for all others. Both are chosen together as a core of so
            many would be; those that come first are seen in full, or without descriptors an even spread of them.
        stride: The stride at which they are seen; another one than the usual needs `coarse`.
    """

    size: int = CORE_SIZE
    by: Similarity | PatchSimilarity | By | None = field(default="megaloc", compare=False)
    choice: Choice = "covering"
    nearest: int = 0
    coarse: int | Literal["all"] = 0
    stride: int = STRIDE
    _similarity: Similarity | PatchSimilarity | None = field(init=False, repr=False)  # what `by` means, compared for it
    _graphs: LRUCache[AnyGraph] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        integer("size", self.size, 1)
        integer("nearest", self.nearest, 0)
        integer("stride", self.stride, 1)
        if self.coarse != "all":
            integer("coarse", self.coarse, 0)
        if self.coarse == 0 and self.stride != STRIDE:
            raise ValueError(
                'a stride is that of frames that are seen coarsely, so coarse must be their number or "all", got '
                f"stride={self.stride} and coarse=0; give coarse, or leave stride out"
            )
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
        core = f"a core of {self.size} frame{'s' * (self.size != 1)} {how}{beside}"
        if self.coarse == 0:
            return core
        others = "all others" if self.coarse == "all" else f"{self.coarse} more"
        return f"{core}, and {others} at stride {self.stride}"

    @property
    def needs(self) -> Literal["nothing", "images", "tokens"]:
        """What a scene must have."""
        return "nothing" if self._similarity is None else self._similarity.needs

    @property
    def similarity(self) -> Similarity | PatchSimilarity | None:
        """What frames are compared by; None if the core is spread evenly."""
        return self._similarity

    @property
    def reads_fingerprints(self) -> bool:
        """Whether the images of a scene are looked up."""
        return getattr(self._similarity, "reads_fingerprints", False)

    def opened(self) -> Core:
        """Return the same source with a cache of its own, ready to be used by one patch."""
        opened = getattr(self._similarity, "opened", None)
        return replace(self, by=self._similarity if opened is None else opened())

    def graph(self, scene: Scene) -> AnyGraph:
        """Return the graph of a scene; the same object for the same images, or without descriptors for as many frames.

        Frames are described only where there are more than the core has.

        Raises:
            ValueError: If a descriptor is not finite or zero, or the scene has not what descriptors need.
        """
        frames, reference_frame = scene.num_frames, scene.reference_frame
        if frames <= self.size:
            return self._graphs.get((frames, reference_frame), lambda: _everything(frames, reference_frame or 0))
        if self._similarity is None:
            return self._graphs.get((frames, reference_frame), lambda: self._spread_evenly(scene))
        if self._similarity.needs == "images":
            return self._graphs.get(content_of(scene, self._similarity.by), lambda: self._chosen(scene))
        return self._chosen(scene)

    def coarse_frames(self, num_frames: int) -> tuple[int, int]:
        """Return how many of so many frames may be seen at a stride, and that stride."""
        others = max(0, num_frames - self.size) if self.coarse else 0
        return (others if self.coarse == "all" else min(others, self.coarse)), self.stride

    def chosen(self, compared: Tensor | PairScores, first: int) -> tuple[Tensor, Tensor]:
        """Return the frames of the core, and those that are seen at a stride, in the order of choice.

        Args:
            compared: What the similarity makes of all frames.
            first: The frame that is chosen first.
        """
        both = choose_core(compared, self.chosen_size, choice=self.choice, first=first)
        return both[: self.size], both[self.size :]

    def spread(self, num_frames: int, reference_frame: int | None) -> tuple[Tensor, Tensor]:
        """Return both at equal distances in the order of the frames; a reference frame takes the place next to it."""
        both = spread_evenly(num_frames, self.chosen_size)
        core = both[spread_evenly(len(both), self.size)]
        if reference_frame is not None:
            for frames in (both, core):
                frames[(frames - reference_frame).abs().argmin()] = reference_frame
        return core, both[~torch.isin(both, core)]

    @property
    def chosen_size(self) -> int:
        """Frames that are chosen, to be seen in full or, a number of them, at a stride."""
        return self.size + (0 if self.coarse == "all" else self.coarse)

    def _chosen(self, scene: Scene) -> AnyGraph:
        assert self._similarity is not None
        with scene.step("descriptors"):
            compared = scene.compared_by(self._similarity)
        with scene.step("graph"):
            core, others = self.chosen(compared, scene.reference_frame or 0)
            nearest = nearest_frames(compared, self.nearest) if self.nearest else None
            return self._core(scene.num_frames, core, others, nearest)

    def _spread_evenly(self, scene: Scene) -> AnyGraph:
        return self._core(scene.num_frames, *self.spread(scene.num_frames, scene.reference_frame))

    def _core(self, frames: int, core: Tensor, others: Tensor, nearest: Tensor | None = None) -> AnyGraph:
        """Return the graph of a core, and of others that are seen coarsely if there are any besides."""
        if self.coarse == 0:
            return CovisibilityGraph.core(frames, core, nearest=nearest)
        seen: Tensor | Literal["all"] = "all" if self.coarse == "all" else others
        return CoarseGraph.core(frames, core, seen, stride=self.stride, nearest=nearest)


def _everything(frames: int, first: int) -> CovisibilityGraph:
    """Return the graph of a core of all frames, one of them the first."""
    return CovisibilityGraph.core(frames, [first, *(frame for frame in range(frames) if frame != first)])
