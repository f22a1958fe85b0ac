"""Covisibility graphs as a model needs them: from its own tokens, in its own order of frames, causal where it is."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..graph import CovisibilityGraph
from .megaloc.network import SIZE, MegaLoc
from .megaloc.weights import PUBLISHED

__all__ = ["MegaLocSimilarity", "Similarity", "TokenSimilarity", "earlier_frames_only", "frame_order", "in_order"]


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
class TokenSimilarity(Similarity):
    """Finds covisibility in the tokens that enter a model's first global attention.

    The descriptor of a frame is the mean of its patch tokens minus the mean over all frames, in float32 (float64 for
    float64 tokens). What all frames share would otherwise make every pair look alike. No other network runs, and any
    model has such tokens. The attributes are those of `Similarity`.
    """

    def graph(
        self,
        tokens: Tensor,  # [S, P, C]
        reference_frame: int | None,
    ) -> CovisibilityGraph:
        """Return the graph of S frames.

        Args:
            tokens: Patch tokens of one scene, `[S, P, C]`, without special tokens.
            reference_frame: The model's own reference frame, used if this object says "model".

        Raises:
            ValueError: If tokens are NaN or infinite, or all zero.
        """
        pooled = tokens.detach().mean(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        broken = [frame for frame, sound in enumerate(pooled.isfinite().all(dim=1).tolist()) if not sound]
        if broken:
            raise ValueError(
                f"the tokens of every frame must be finite, but those of frames {broken[:8]} hold NaN or infinity; "
                "check these images, or the model's weights and dtype"
            )
        mean = pooled.mean(dim=0)
        centred = pooled - mean
        # A frame that equals the mean frame (one frame alone, one image repeated) would have no direction.
        descriptors = torch.where((centred == 0).all(dim=1, keepdim=True), mean, centred)
        return self.from_descriptors(descriptors, reference_frame)


@dataclass(frozen=True)
class MegaLocSimilarity(Similarity):
    """Finds covisibility in the images, by MegaLoc's descriptors: the default of `patch`.

    The other attributes are those of `Similarity`.

    Attributes:
        weights: Where MegaLoc's weights are, as `MegaLoc.from_pretrained` takes it, or a MegaLoc.
        size: Pixels on each side that MegaLoc sees.
        batch_size: Images that it describes at a time.
        dtype: Its precision; None for bfloat16 on CUDA and float32 elsewhere. Ignored if `weights` is a MegaLoc.
    """

    weights: str | Path | MegaLoc = PUBLISHED
    size: int = SIZE
    batch_size: int = 32
    dtype: torch.dtype | None = None


def in_order(
    graph: CovisibilityGraph,
    order: tuple[int, ...] | None,
) -> CovisibilityGraph:
    """Return the graph over frames in another order, in which place p holds frame `order[p]`.

    None stands for the order that the graph has, and returns the graph itself.
    """
    if order is None:
        return graph
    place = inverse(order)
    places = torch.tensor(place, device=graph.device)
    return CovisibilityGraph.from_pairs(
        graph.num_frames,
        torch.stack([places[graph.rows.long()], places[graph.indices.long()]], dim=1),
        num_key_frames=graph.num_key_frames,
    )


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the place of each frame in `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def earlier_frames_only(graph: CovisibilityGraph) -> CovisibilityGraph:
    """Return the graph without the edges from a frame to a later one."""
    keep = graph.indices <= graph.rows
    pairs = torch.stack([graph.rows[keep], graph.indices[keep]], dim=1)
    return CovisibilityGraph.from_pairs(graph.num_frames, pairs, num_key_frames=graph.num_key_frames)


def frame_order(
    before: Tensor,  # [S, K]
    after: Tensor,  # [S, K]
) -> tuple[int, ...] | None:
    """Return the order into which a model put its frames, read off samples of their tokens; None if it kept theirs.

    Where samples are equal bit for bit (one photo given twice), several orders fit. Then one frame was moved to the
    front and the rest stayed in order, if that fits; else equal frames are taken in the order in which they came.

    Args:
        before: Some values of each frame's tokens.
        after: The same values of the same tokens after the frames were reordered.

    Raises:
        RuntimeError: If the frames after are not those before in another order.
    """
    kept, moved = _bits(before), _bits(after)
    try:
        order = _one_to_the_front(kept, moved) or _as_they_came(kept, moved)
    except IndexError:
        raise RuntimeError(
            "the order of the frames inside the model could not be read: the tokens after it reorders its frames are "
            "not the tokens before in another order. This version of the model does more there than is known; "
            'use covisibility="tokens", which needs no order'
        ) from None
    return None if order == tuple(range(len(order))) else order


def _one_to_the_front(before: list[bytes], after: list[bytes]) -> tuple[int, ...] | None:
    for front, values in enumerate(before):
        order = (front, *(frame for frame in range(len(before)) if frame != front))
        if values == after[0] and [before[frame] for frame in order] == after:
            return order
    return None


def _as_they_came(before: list[bytes], after: list[bytes]) -> tuple[int, ...]:
    places: defaultdict[bytes, deque[int]] = defaultdict(deque)
    for frame, values in enumerate(before):
        places[values].append(frame)
    return tuple(places[values].popleft() for values in after)


def _bits(samples: Tensor) -> list[bytes]:
    return [row.tobytes() for row in samples.cpu().to(torch.float64).numpy()]
