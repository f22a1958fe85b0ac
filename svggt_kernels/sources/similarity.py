"""Graphs from one descriptor per frame: what all similarities have in common."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..graph import CovisibilityGraph
from .base import Scene
from .cache import LRUCache
from .fingerprint import fingerprint


@dataclass(frozen=True)
class Similarity:
    """What becomes of one descriptor per frame; see `CovisibilityGraph.from_descriptors` for the steps.

    Attributes:
        neighbours: Most similar frames that each frame sees at least.
        window: Frames before and after that each frame sees; for ordered input, such as video.
        anchors: Frames that everyone sees; None for a number that grows with the frames.
        bridge: Whether to join parts of the graph that do not see each other.
        reference_frame: A frame that sees all and is seen by all: "model" for the one the model has, an index, or None.
        also: A graph over the same frames, in the order of the images, whose edges are added before parts are joined:
            from COLMAP, from poses, or several by `|`.
    """

    neighbours: int = 10
    window: int = 0
    anchors: int | None = None
    bridge: bool = True
    reference_frame: int | Literal["model"] | None = "model"
    also: CovisibilityGraph | None = None

    by: ClassVar[str]
    needs: ClassVar[Literal["images", "tokens"]]

    @property
    def label(self) -> str:
        """How the graph is made, in words."""
        beside = f", {frames_around(self.window)}" if self.window else ""
        reference = {"model": ", and the model's reference frame", None: ""}.get(
            self.reference_frame,  # type: ignore[arg-type]
            f", and frame {self.reference_frame}",
        )
        return f"{self.neighbours} neighbour{'s' * (self.neighbours != 1)} by {self.by}{beside}{reference}"

    def descriptors(self, scene: Scene) -> Tensor:
        """Return one descriptor per frame, `[S, C]` floating point."""
        raise NotImplementedError

    def compared(self, scene: Scene) -> Tensor:
        """Return what a core is chosen by: the descriptors."""
        return self.descriptors(scene)

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene, on the device of its descriptors.

        Raises:
            ValueError: If a descriptor is not finite or zero, or `also` is over other frames.
        """
        with scene.step("descriptors"):
            descriptors = scene.compared_by(self)
        with scene.step("graph"):
            return self.from_descriptors(descriptors, scene.reference_frame)

    def from_descriptors(
        self,
        descriptors: Tensor,  # [S, C]
        reference_frame: int | None,
    ) -> CovisibilityGraph:
        """Return the graph of S frames, on the device of their descriptors.

        Args:
            descriptors: One per frame, `[S, C]` floating point.
            reference_frame: The model's own reference frame, used if this object says "model".

        Raises:
            ValueError: If a descriptor is not finite or zero, or `also` is over other frames.
        """
        return CovisibilityGraph.from_descriptors(
            descriptors,
            neighbours=self.neighbours,
            window=self.window,
            reference_frame=reference_frame if self.reference_frame == "model" else self.reference_frame,
            anchors=self.anchors,
            bridge=self.bridge,
            also=self.also,
        )


@dataclass(frozen=True)
class ImageSimilarity(Similarity):
    """A similarity of images; images of the same content give the same graph object again, described once."""

    _graphs: LRUCache[CovisibilityGraph] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    needs: ClassVar[Literal["images"]] = "images"
    reads_fingerprints: ClassVar[bool] = True

    def opened(self) -> ImageSimilarity:
        """Return the same source with a cache of its own."""
        return replace(self)

    def graph(self, scene: Scene) -> CovisibilityGraph:
        """Return the graph of a scene's images.

        Raises:
            ValueError: If the scene has no images, a descriptor is not finite, or `also` is over other frames.
        """
        return self._graphs.get(content_of(scene, self.by), lambda: super(ImageSimilarity, self).graph(scene))


def content_of(scene: Scene, by: str) -> Hashable:
    """Return what tells the images of a scene and its reference frame from others.

    Raises:
        ValueError: If the scene has no images, which `by` compares.
    """
    if scene.images is None:
        raise ValueError(f"{by} compares images, but the scene has none")
    with scene.step("look-up"):
        return fingerprint(scene.images, scene.word_sums), scene.images_are_normalised, scene.reference_frame


def frames_around(window: int) -> str:
    """Say in words which frames a window holds."""
    return f"the {window} frame{'s' * (window != 1)} before and after"
