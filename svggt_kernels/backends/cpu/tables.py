"""The layout as the CPU kernels walk it: row tiles, and column tiles that are packed once for all their rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...layout import DENSE, BlockLayout

PAD = 16  # tokens of a packed tile are padded to a multiple of this


class Walk(NamedTuple):
    """Who sees whom, int64 tensors.

    The columns are cut where a run begins or ends, so that every run is made of whole pieces; pieces are cut into
    tiles. The dense group sees every piece, and the dense columns are tiles of their own that come last.
    """

    row_tiles: Tensor  # [T, 3]: group, start, length; the costliest first
    offsets: Tensor  # [S + 2], the runs of each group
    runs: Tensor  # [R, 2], the first tile and the one after the last
    column_tiles: Tensor  # [C, 3]: start, length, and 1 where start counts entries of dense_columns
    dense_rows: Tensor  # [M]
    dense_columns: Tensor  # [M']


def walk(layout: BlockLayout, most_rows: int, most_columns: int) -> Walk:
    """Return the tables of a layout on the CPU, with tiles of at most `most_rows` x `most_columns` tokens."""
    runs = SimpleNamespace(**{name: table.numpy().astype(np.int64) for name, table in layout.runs._asdict().items()})
    group, start, length = _walked(layout, runs)
    # The dense columns are cut as if they lay behind the last token.
    start = np.where(start < 0, layout.num_key_tokens + start - DENSE, start)
    cuts = np.unique(np.concatenate([start, start + length]))
    first, last = np.searchsorted(cuts, start), np.searchsorted(cuts, start + length)
    seen = np.cumsum(np.bincount(first, minlength=len(cuts)) - np.bincount(last, minlength=len(cuts)))[:-1] > 0
    tiles, tiles_before = _cut(cuts[:-1], np.where(seen, np.diff(cuts), 0), most_columns)
    is_dense = tiles[:, 0] >= layout.num_key_tokens
    column_tiles = np.column_stack([tiles[:, 0] - is_dense * layout.num_key_tokens, tiles[:, 1], is_dense])

    row_tiles = layout.row_tiles(most_rows).numpy().astype(np.int64)
    cost = row_tiles[:, 2] * runs.columns[row_tiles[:, 0]]
    return Walk(
        row_tiles=_tensor(row_tiles[np.argsort(-cost, kind="stable")]),
        offsets=_tensor(np.pad(np.cumsum(np.bincount(group, minlength=len(runs.row_start))), (1, 0))),
        runs=_tensor(np.stack([tiles_before[first], tiles_before[last]], axis=1)),
        column_tiles=_tensor(column_tiles),
        dense_rows=_tensor(runs.dense_rows),
        dense_columns=_tensor(runs.dense_columns),
    )


def _tensor(table: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))


def _walked(layout: BlockLayout, runs: SimpleNamespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return group, start and length of every run that is not empty; the dense group has one for each key frame."""
    dense_group = len(runs.row_start) - 1
    group = np.repeat(np.arange(dense_group), np.diff(runs.offsets[:-1]))
    start, length = runs.start[: len(group)], runs.length[: len(group)]
    if len(runs.dense_rows):
        # As the frames have, so that nothing new is cut; the dense columns come last.
        frame_start, frame_length = layout.keys.ordinary
        group = np.append(group, np.full(len(frame_start) + 1, dense_group))
        start = np.concatenate([start, frame_start, [DENSE]])
        length = np.concatenate([length, frame_length, [len(runs.dense_columns)]])
    visible = length > 0
    return group[visible], start[visible], length[visible]


def _cut(start: np.ndarray, length: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut pieces into tiles of about the same length; return them as (start, length), and how many lie before each."""
    count = -(-length // most)
    size = -(-length // np.maximum(count, 1) // PAD) * PAD
    before = np.pad(np.cumsum(count), (1, 0))
    piece = np.repeat(np.arange(len(start)), count)
    skipped = (np.arange(len(piece)) - before[piece]) * size[piece]
    return np.stack([start[piece] + skipped, np.minimum(size[piece], length[piece] - skipped)], axis=1), before
