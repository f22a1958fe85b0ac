"""A BlockLayout as the shader walks it: tiles of rows, and the runs of columns that each sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...layout import DENSE, BlockLayout

ROWS = 32


class Work(NamedTuple):
    """What the shader's head describes; int32 tensors on the device, but for `columns`."""

    tiles: Tensor  # [T, 4] start, count, first run, end of runs
    runs: Tensor  # [>= 1, 2] start, count
    row_tokens: Tensor  # [>= 1], what a start below 0 names among the rows
    column_tokens: Tensor  # [>= 1], likewise among the columns
    columns: Tensor  # [T] on the CPU: how many columns a tile's rows see


def make_work(layout: BlockLayout, device: torch.device) -> Work:
    """Return the work of a layout, which is on the CPU, on a device."""
    runs, num_frames = layout.runs, layout.graph.num_frames
    group, start, count = layout.row_tiles(ROWS).numpy().T
    offsets, first = runs.offsets.numpy(), runs.start.numpy().astype(np.int64)
    spans = np.stack([np.where(first < 0, ~(first - DENSE), first), runs.length.numpy()], axis=1)[: offsets[-1]]
    tiles = np.stack([np.where(group == num_frames, ~start, start), count, offsets[group], offsets[group + 1]], axis=1)
    tables = (tiles, spans, runs.dense_rows.numpy(), runs.dense_columns.numpy())
    columns = runs.columns[torch.from_numpy(group).long()]
    return Work._make([*(_bindable(table).to(device) for table in tables), columns])


def _bindable(table: np.ndarray) -> Tensor:
    """Return the table as int32, with a row of zeros if it has none: an empty buffer cannot be bound."""
    return torch.from_numpy(np.array(table if len(table) else np.zeros((1, *table.shape[1:])), dtype=np.int32))


def pieces(columns: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut tiles, each with its number of columns, into pieces that see at most `most` columns or are one tile."""
    begin = seen = 0
    for tile, count in enumerate(columns):
        if tile > begin and seen + count > most:
            yield begin, tile
            begin, seen = tile, 0
        seen += count
    if columns:
        yield begin, len(columns)
