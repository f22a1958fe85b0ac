"""Random layouts for fuzzing: everything in which a layout can differ."""

from __future__ import annotations

import torch

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph


def random_layout(seed: int, *, max_frames: int = 5, max_tokens: int = 140, device: str = "cpu") -> BlockLayout:
    """Draw frames, tokens, special and trailing tokens, and a graph that may have empty rows and unseen frames."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    leading, closing = draw(0, 3) * draw(0, 1), draw(0, 2) * draw(0, 1)
    fewest = max(1, leading + closing)
    frames, rectangular, ragged = draw(1, max_frames), draw(0, 2) == 0, draw(0, 1) == 1
    key_frames = draw(1, max_frames) if rectangular else frames

    def lengths(count: int) -> int | list[int]:
        return [draw(fewest, max_tokens) for _ in range(count)] if ragged else draw(fewest, max_tokens)

    if rectangular:
        pairs = (torch.rand(frames, key_frames, generator=generator) < draw(0, 10) / 10).nonzero()
        graph = CovisibilityGraph.from_pairs(frames, pairs, num_key_frames=key_frames)
    else:
        visible = torch.rand(frames, frames, generator=generator) < draw(0, 10) / 10
        graph = CovisibilityGraph.from_dense(visible, square=True)
    query_lengths, dense_special = lengths(frames), draw(0, 3) > 0
    return BlockLayout.from_graph(
        graph.to(device),
        query_lengths,
        special_tokens=(leading, closing),
        dense_special=dense_special and not graph.is_causal(),
        trailing_tokens=draw(0, 2) * draw(0, 1),
        key_tokens_per_frame=lengths(key_frames) if rectangular else None,
    )


def random_coarse_layout(seed: int, *, max_frames: int = 5, max_side: int = 9, device: str = "cpu") -> CoarseLayout:
    """Draw a grid of patches, a stride, special and trailing tokens, and two graphs that may meet, one with a core."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    frames, stride = draw(2, max_frames), draw(1, 5)
    some = torch.rand(frames, frames, generator=generator) < draw(1, 10) / 10
    some[0, 1] = True
    coarse = CovisibilityGraph.from_dense(some, square=True)
    if draw(0, 1):
        full = CovisibilityGraph.core(frames, torch.randperm(frames, generator=generator)[: draw(1, frames)])
    else:
        full = CovisibilityGraph.from_dense(torch.rand(frames, frames, generator=generator) < 0.3, square=True)
    full_is_all = bool((full.to_dense() | ~coarse.to_dense()).all())
    if full_is_all:  # nothing would be left that is seen coarsely
        full = CovisibilityGraph.sequential(frames, 0)
    return CoarseLayout.from_graph(
        CoarseGraph.from_graphs(full.to(device), coarse.to(device), stride=stride),
        (draw(1, max_side), draw(1, max_side)),
        special_tokens=(draw(0, 3) * draw(0, 1), draw(0, 2) * draw(0, 1)),
        trailing_tokens=draw(0, 2) * draw(0, 1),
    )
