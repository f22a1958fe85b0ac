"""Coarse keys: frames of which others see the special tokens and one patch in s x s, and still one exact softmax.

A kept patch stands for n = patches / kept patches of its frame, so log n is added to its score; a special token stands
for itself. A frame sees itself in full, and no frame both in full and coarsely.

Keys that weigh 1 and kept patches are attended to by one call of the operator each. Their outputs are merged by their
LSE, to which log n is added for the patches: the softmax over both is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.attention import choose_backend
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
    """Return the patches that a stride keeps, `[n]` int64, row by row.

    They are the middle one of each square of `stride` x `stride` patches, of an even side the one behind the middle.
    Where a frame has too few for that, they are the middle of the frame's rows or columns.
    """
    first = stride // 2
    down, right = (torch.arange(first if first < side else side // 2, side, stride) for side in (rows, columns))
    return (down[:, None] * columns + right).flatten()


@dataclass(frozen=True, eq=False)
class CoarseKeys:
    """Attention to some frames in full and to others coarsely.

    Attributes:
        grid: How tokens lie.
        weigh_one: Over queries and [all tokens | special tokens of all frames once more].
        of_patches: Over queries and [kept patches of all frames].
        kept: Patches of a frame that are kept.
    """

    grid: TokenGrid
    weigh_one: BlockLayout
    of_patches: BlockLayout
    kept: Tensor

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
        frames, kept = grid.frames, kept_patches(grid.rows, grid.columns, stride)
        full = in_full.to(device) | torch.eye(frames, dtype=torch.bool, device=device)
        thin = coarsely.to(device) & ~full
        return cls(
            grid,
            _rectangular(torch.cat([full, thin], 1), grid, [grid.per_frame] * frames + [grid.special] * frames),
            _rectangular(thin, grid, [len(kept)] * frames),
            kept.to(device),
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tokens: Tensor) -> Attended:
        """See `Attention`."""

        def with_special(x: Tensor) -> Tensor:
            return torch.cat([x, self._frames(x)[..., : self.grid.special, :].flatten(2, 3)], 2)

        def patches(x: Tensor) -> Tensor:
            return self._frames(x)[..., self.grid.special + self.kept, :].flatten(2, 3)

        stands_for = self.grid.patches / len(self.kept)
        ones, ones_lse = _with_lse(q, with_special(k), with_special(v), self.weigh_one, scale)
        thin, thin_lse = _with_lse(q, patches(k), patches(v), self.of_patches, scale)
        share = torch.sigmoid(thin_lse + math.log(stands_for) - ones_lse)[..., None]
        out = torch.lerp(ones.to(share.dtype), thin.to(share.dtype), share).to(q.dtype)
        pairs = self.weigh_one.visible_pairs + self.of_patches.visible_pairs
        return Attended(out, pairs, choose_backend(q.device, q.dtype, q.shape[-1]))

    def _frames(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.grid.frames, self.grid.per_frame))


def _rectangular(visible: Tensor, grid: TokenGrid, key_lengths: list[int]) -> BlockLayout:
    graph = CovisibilityGraph.from_dense(visible, square=False)
    lengths = [grid.per_frame] * grid.frames
    return BlockLayout.from_graph(graph, lengths, key_tokens_per_frame=key_lengths)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = block_sparse_attention(q, k, v, layout, scale=scale, return_lse=True)
    return out, lse
