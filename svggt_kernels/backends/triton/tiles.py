"""The runs of a layout cut into the tiles that the Triton kernels walk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...layout import BlockLayout, owners


class Tiles(NamedTuple):
    """Tiles in the order in which kernels should launch them; int32 tensors.

    `rows[t]` is (group, start, length) of row tile `t`, see `BlockLayout.row_tiles`. A group sees its full tiles
    (`full_start`, each of the column block), its tails (`tail_start` and `tail_length`, the rest of each run of tokens
    in pieces of at most the tail block), and, unless it is the dense group, `dense_columns`.
    """

    rows: Tensor  # [T, 3]
    full_offsets: Tensor  # [S + 2]
    full_start: Tensor
    tail_offsets: Tensor  # [S + 2]
    tail_start: Tensor
    tail_length: Tensor
    dense_rows: Tensor  # [M]
    dense_columns: Tensor  # [M']


def make_tiles(layout: BlockLayout, row_block: int, column_block: int, tail_block: int) -> Tiles:
    """Return the runs cut into tiles of `row_block` x `column_block` tokens, and their rests into tails. No host sync.

    Raises:
        ValueError: If there could be 2^31 tiles or more.
    """
    runs, num_frames, num_edges = layout.runs, layout.graph.num_frames, len(layout.graph.indices)
    # Kernels walk the dense columns, which every frame sees, from a list of their own.
    tokens = runs.length.where(runs.start >= 0, 0)
    num_full, rest = tokens // column_block, tokens % column_block
    num_tails = (rest + tail_block - 1) // tail_block
    full_before, tail_before = (torch.nn.functional.pad(count.cumsum(0), (1, 0)) for count in (num_full, num_tails))
    full_offsets, tail_offsets = full_before[runs.offsets], tail_before[runs.offsets]

    # At most this many tokens at the ends of the edges: each key frame, the longest first, seen by all it can be.
    longest_first = np.sort(layout.keys.ordinary[1])[::-1]
    seen_by = np.clip(num_edges - num_frames * np.arange(len(longest_first)), 0, num_frames)
    most_full = (int((longest_first * seen_by).sum()) + layout.num_key_tokens) // column_block
    if most_full >= 2**31:
        raise ValueError(
            f"a layout may have fewer than 2^31 tiles of {column_block} tokens, this one needs up to {most_full}; "
            "split the query frames over several layouts"
        )
    # Of the long tables every pass counts: place i of a run starts at start + (i - first) * block.
    run, first = owners(num_full, most_full)
    full_start = (runs.start - first * column_block)[run]
    full_start += torch.arange(0, most_full * column_block, column_block, device=layout.device)
    most_tails = (num_edges + 1) * (-(-(column_block - 1) // tail_block))
    run, first = owners(num_tails, most_tails)
    before = (torch.arange(most_tails, device=layout.device) - first[run]) * tail_block
    tail_start = (runs.start + num_full * column_block)[run] + before
    tail_length = (rest[run] - before).clamp(max=tail_block)

    return Tiles(
        rows=layout.row_tiles(row_block),
        full_offsets=full_offsets.int(),
        full_start=full_start.int(),
        tail_offsets=tail_offsets.int(),
        tail_start=tail_start.int(),
        tail_length=tail_length.int(),
        dense_rows=runs.dense_rows,
        dense_columns=runs.dense_columns,
    )
