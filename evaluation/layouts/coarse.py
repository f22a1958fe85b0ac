"""Coarse keys: frames of which others see the special tokens and one patch in s x s, and still one exact softmax.

What is seen coarsely, and what it weighs, is what `svggt_kernels.CoarseLayout` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.attention import choose_backend
from svggt_kernels.coarse import patches_seen
from svggt_kernels.graph.core import spread_evenly
from svggt_kernels.sources.base import Scene

from .answered import Answered
from .base import Attended, Known, TokenGrid
from .graphs import Choice, choice_words, core_frames


def coarse(
    frames: int, stride: int, further: int | None = None, choice: Choice = "tokens", *, covering: bool = False
) -> Answered:
    """Return the layout in which every frame sees a few frames in full and others coarsely.

    Args:
        frames: Frames that are seen in full, frame 0 among them; may be 0.
        stride: s, 2 or more.
        further: Frames that are seen coarsely; None for all others. Frames of either kind then see both kinds and
            themselves alone, so that they are a closed core.
        choice: How the frames of both kinds are chosen. Those in full are the first that are chosen, or, of an even
            spread of both, an even spread.
        covering: As for `graphs.core`.

    Raises:
        ValueError: If there are fewer than 0 frames or none of either kind, or the stride is less than 2.
    """
    if frames < 0 or stride < 2 or (further is not None and further < 1):
        raise ValueError("a stride is 2 or more, and frames are seen by it: all others, or one or more")

    def make(scene: Scene, known: Known, grid: TokenGrid) -> CoarseKeys:
        in_full, coarsely = (torch.zeros(grid.frames, dtype=torch.bool) for _ in range(2))
        if further is None:
            coarsely[:] = True
            chosen = core_frames(max(frames, 1), choice, covering, scene, known)[:frames]
            in_full[chosen] = True
        else:
            both = core_frames(frames + further, choice, covering, scene, known)
            coarsely[both] = True
            first = torch.arange(min(frames, len(both)))
            if choice == "evenly" and frames:
                first = spread_evenly(len(both), frames)
            in_full[both[first]] = True
        return CoarseKeys.of_frames(in_full, coarsely, grid, stride, scene.tokens.device)

    words = f"core-{frames}{choice_words(choice, covering)}-stride{stride}" + f"of{further}" * (further is not None)
    return Answered(words, make)


def kept_patches(rows: int, columns: int, stride: int) -> Tensor:
    """Return the patches that a stride keeps, `[n]` int64, row by row."""
    return torch.from_numpy(patches_seen((rows, columns), stride))


@dataclass(frozen=True, eq=False)
class CoarseKeys:
    """Attention to some frames in full and to others coarsely.

    Attributes:
        layout: Which token sees which.
    """

    layout: BlockLayout | CoarseLayout

    @classmethod
    def of_frames(
        cls, in_full: Tensor, coarsely: Tensor, grid: TokenGrid, stride: int, device: torch.device
    ) -> CoarseKeys:
        """Return the attention in which every frame sees the same frames.

        Args:
            in_full: Whether all see a frame in full, `[S]` bool on the CPU.
            coarsely: Whether those that do not see it in full see it coarsely, likewise.
            grid: How tokens lie.
            stride: Of the patch grid.
            device: Where attention runs.
        """
        full, thin = (CovisibilityGraph.from_dense(x.expand(grid.frames, -1), square=True) for x in (in_full, coarsely))
        layout: BlockLayout | CoarseLayout
        if bool((thin.to_dense() & ~full.to_dense()).any()):
            graph = CoarseGraph.from_graphs(full, thin, stride=stride)
            layout = CoarseLayout.from_graph(graph, (grid.rows, grid.columns), special_tokens=grid.special)
        else:
            layout = BlockLayout.from_graph(full, grid.per_frame, dense_special=False)
        return cls(layout.to(device))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
        """See `Attention`."""
        out = block_sparse_attention(q, k, v, self.layout, scale=scale)
        assert isinstance(out, Tensor)
        return Attended(out, self.layout.visible_pairs, choose_backend(q.device, q.dtype, q.shape[-1]))
