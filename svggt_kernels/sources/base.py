"""What every source of covisibility has, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..graph import AnyGraph, CovisibilityGraph

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


def joined(graph: CovisibilityGraph, reference_frame: int | None) -> CovisibilityGraph:
    """Return the graph in which the reference frame sees all frames and all see it; the same graph for None."""
    if reference_frame is None:
        return graph
    frames = graph.num_frames
    star = [(frame, reference_frame) for frame in range(frames) if frame != reference_frame]
    return graph | CovisibilityGraph.from_pairs(frames, star).symmetrized()


class Scene:
    """One sample of a forward: what a source may look at to tell which frames see each other.

    Args:
        num_frames: Frames S.
        images: `[S, 3, H, W]` as the model takes them; None if it takes none.
        images_are_normalised: Whether they come with ImageNet's mean and deviation taken out.
        tokens: The patch tokens that enter the first global attention, `[S, P, C]`, or a function that returns them.
        reference_frame: The model's reference frame, None if it has none, or a function that returns either.
        word_sums: What `fingerprint.word_sums` returned of the images, if it was called before; for sources that have
            `reads_fingerprints`.
        sample: Which sample this is, and of how many.
        step: Times what is done inside its context under a name.
        progress: Whether what takes long may show a bar on stderr.
        compare_once: Whether what frames are compared by is kept for further sources that use the same similarity; what
            the scene shows must then stay as it is.
    """

    def __init__(
        self,
        num_frames: int,
        *,
        images: Tensor | None = None,
        images_are_normalised: bool = False,
        tokens: Tensor | Callable[[], Tensor] | None = None,
        reference_frame: int | Callable[[], int | None] | None = None,
        word_sums: Tensor | None = None,
        sample: tuple[int, int] = (0, 1),
        step: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        progress: bool = False,
        compare_once: bool = False,
    ) -> None:
        self.num_frames = num_frames
        self.images = images
        self.images_are_normalised = images_are_normalised
        self.word_sums = word_sums
        self.sample = sample
        self.step = step
        self.progress = progress
        self._tokens = tokens
        self._reference_frame = reference_frame
        self._compared: dict[int, tuple[Any, Any]] | None = {} if compare_once else None

    @property
    def rgb(self) -> Tensor:
        """The images in [0, 1], `[S, 3, H, W]`, normalisation undone; for sources that need images."""
        if self.images is None:
            raise ValueError("a source that needs images is asked about a scene that has none; use one that needs none")
        if not self.images_are_normalised:
            return self.images
        precision = torch.promote_types(self.images.dtype, torch.float32)
        mean, deviation = (
            torch.tensor(values, dtype=precision, device=self.images.device).view(3, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
        )
        return self.images * deviation + mean

    @property
    def tokens(self) -> Tensor:
        """The patch tokens `[S, P, C]`, in the order of the images; for sources that need tokens."""
        tokens = self._tokens() if callable(self._tokens) else self._tokens
        if tokens is None:
            raise ValueError("a source that needs tokens is asked outside a model; patch a model with it")
        return tokens

    def compared_by(self, similarity: Any) -> Any:
        """Return what `similarity.compared` returns of this scene."""
        if self._compared is None:
            return similarity.compared(self)
        if id(similarity) not in self._compared:
            # Kept with it, so that no other object can have its id.
            self._compared[id(similarity)] = similarity, similarity.compared(self)
        return self._compared[id(similarity)][1]

    @property
    def reference_frame(self) -> int | None:
        """The frame that sets the model's coordinate system, in the order of the images; None if there is none."""
        return self._reference_frame() if callable(self._reference_frame) else self._reference_frame


def alike(one: object, other: object) -> bool:
    """Return whether two are the same object, or equal and of one type; what cannot be compared is not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return (one == other) is True
    except (RuntimeError, ValueError):  # equality of tensors or arrays that they hold is no plain bool
        return False


@runtime_checkable
class Source(Protocol):
    """Where covisibility graphs come from; `patch(covisibility=...)` takes any such object.

    A source may also have a method `opened()`. `patch` calls it once and uses the source that it returns: the place to
    load what is missing, and to begin with an empty cache.
    """

    @property
    def label(self) -> str:
        """How the graph is made, in words: "10 neighbours by MegaLoc"."""

    @property
    def needs(self) -> Literal["nothing", "images", "tokens"]:
        """What a scene must have."""

    def graph(self, scene: Scene) -> AnyGraph:
        """Return the graph over the frames of one scene, in the order of its images.

        A source that returns the same object for equal scenes spares the layout over tokens.
        """
