"""The layouts of the closed frames of a scene, and of chunks of further frames."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from ...coarse import CoarseLayout, patches_seen
from ...graph import CoarseGraph, CovisibilityGraph
from ...layout import BlockLayout
from ...models import ForwardInputs
from ...sources.cache import LRUCache
from ..plan import patch_grid_of

Layout = TypeVar("Layout", BlockLayout, CoarseLayout)

LAYOUTS_KEPT = 16


@dataclass(frozen=True)
class ClosedFrames:
    """The frames that all see, and that see one another alone: those in full first, the reference frame first of all.

    Attributes:
        full: Frames that are seen in full, the core.
        coarse: Frames that are seen at a stride of their patch grid.
        stride: That stride; without `coarse` it means nothing.
    """

    full: int
    coarse: int = 0
    stride: int = 1

    @property
    def count(self) -> int:
        """All of them."""
        return self.full + self.coarse

    def tokens_seen(self, per_frame: int, patch_grid: tuple[int, int]) -> int:
        """Return how many tokens of theirs all frames see."""
        rows, columns = patch_grid
        patches = len(patches_seen(patch_grid, self.stride))
        return self.full * per_frame + self.coarse * (per_frame - rows * columns + patches)


class FrameTokens(NamedTuple):
    """How the tokens of one attention call lie: so many of each frame, then the trailing ones."""

    frames: int
    per_frame: int
    trailing: int
    device: torch.device

    @property
    def total(self) -> int:
        """All tokens."""
        return self.frames * self.per_frame + self.trailing


class ChunkLayouts:
    """Makes the layouts of runs, and keeps those that come again."""

    def __init__(self) -> None:
        self._layouts: LRUCache[Any] = LRUCache(LAYOUTS_KEPT)

    def of_all(self, tokens: FrameTokens, keys: int) -> BlockLayout:
        """Return the layout in which all tokens see so many keys."""

        def new_layout() -> BlockLayout:
            return BlockLayout.from_graph(CovisibilityGraph.all_visible(1), tokens.total, key_tokens_per_frame=[keys])

        return self._get(("all", tokens, keys), new_layout, tokens.device)

    def of_earlier_frames(self, tokens: FrameTokens) -> BlockLayout:
        """Return the layout in which each frame sees itself and those before it."""

        def new_layout() -> BlockLayout:
            earlier = [(i, j) for i in range(tokens.frames) for j in range(i)]
            return BlockLayout.from_graph(CovisibilityGraph.from_pairs(tokens.frames, earlier), tokens.per_frame)

        return self._get(("earlier", tokens), new_layout, tokens.device)

    def of_frames_alone(self, tokens: FrameTokens) -> BlockLayout:
        """Return the layout in which each frame sees itself alone."""

        def new_layout() -> BlockLayout:
            return BlockLayout.from_graph(CovisibilityGraph.from_pairs(tokens.frames, []), tokens.per_frame)

        return self._get(("alone", tokens), new_layout, tokens.device)

    def of_closed(self, tokens: FrameTokens, closed: ClosedFrames, inputs: ForwardInputs, model: str) -> CoarseLayout:
        """Return the layout of closed frames of which some are seen at a stride.

        Raises:
            ValueError: If the patch grid of the model's frames is not known, or not all of a frame.
        """

        def new_layout() -> CoarseLayout:
            grid = patch_grid_of(inputs, tokens.per_frame, "the core", model)
            coarse = range(closed.full, closed.count)
            graph = CoarseGraph.core(closed.count, range(closed.full), coarse, stride=closed.stride)
            return CoarseLayout.from_graph(
                graph, grid, special_tokens=inputs.special_tokens, trailing_tokens=tokens.trailing
            )

        key = (tokens, closed, inputs.patch_grid, inputs.special_tokens)
        return self._get(key, new_layout, tokens.device)

    def of_chunk(self, tokens: FrameTokens, sees_itself: tuple[bool, ...], kept: int) -> BlockLayout:
        """Return the layout of a chunk, whose first key frame is all that is kept and stands for itself."""

        def new_layout() -> BlockLayout:
            lengths = [tokens.per_frame] * len(sees_itself) + [tokens.trailing] * (tokens.trailing > 0)
            pairs = [(row, 0) for row in range(len(lengths))]
            pairs += [(row, 1 + row) for row, itself in enumerate(sees_itself) if itself]
            graph = CovisibilityGraph.from_pairs(len(lengths), sorted(pairs), num_key_frames=1 + len(lengths))
            return BlockLayout.from_graph(graph, lengths, key_tokens_per_frame=[kept, *lengths], dense_special=False)

        return self._get((sees_itself, tokens, kept), new_layout, tokens.device)

    def _get(self, key: Hashable, new_layout: Callable[[], Layout], device: torch.device) -> Layout:
        layout: Layout = self._layouts.get(key, lambda: new_layout().to(device))
        return layout
