"""A BlockLayout as the kernels of csrc/hopper walk it: row tiles, and the runs of columns."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout, on_device
from .._nvrtc import TensorMap, tensor_map

PIECE = 8
"""Tokens that the copy engine loads at a time where a tile spans runs."""

DENSE = -(2**31)
"""The highest bit: a run with it starts at a place among the dense columns, not at a token."""


class Tables(NamedTuple):
    """What `Layout` of work.cuh points to; int32 tensors."""

    rows: Tensor  # [T, 3], see BlockLayout.row_tiles
    columns: Tensor  # [S + 1], how many a group sees
    run_offsets: Tensor  # [S + 2]
    run_start: Tensor  # a token, or a place among the dense columns, see `DENSE`
    run_length: Tensor
    dense_rows: Tensor  # as in Runs, as are the dense columns
    dense_columns: Tensor


def make_tables(layout: BlockLayout, row_block: int) -> Tables:
    """Return the tables for such row tiles as `BlockLayout.row_tiles` makes."""
    rows, runs = layout.row_tiles(row_block), layout.runs
    return Tables(rows, runs.columns, *_runs(layout), runs.dense_rows, runs.dense_columns)


def _runs(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets, start and length of the runs of each group: of tokens, then of dense columns. No host sync.

    Other than in `BlockLayout.runs` a run goes on through the dense tokens between two frames that are both seen, and
    the runs of dense columns leave those out. So fewer tiles of columns span runs.
    """
    graph, keys, device = layout.graph, layout.keys, layout.device
    if len(keys.dense) == 0:
        return layout.runs.offsets, layout.runs.start, layout.runs.length
    starts, lengths = keys.ordinary
    # Of the key frame of each edge: its tokens, and how many dense columns come before them.
    first, end, before = (
        on_device(x, device)[graph.indices] for x in (starts, starts + lengths, starts - lengths.cumsum() + lengths)
    )
    num_edges, row = len(graph.indices), graph.rows.long()
    edge = torch.arange(num_edges, device=device)
    begins = torch.ones(num_edges + 1, dtype=torch.bool, device=device)
    begins[1:-1] = (row[1:] != row[:-1]) | (graph.indices[1:] != graph.indices[:-1] + 1)
    begins, ends = begins[:-1], begins[1:]
    left_out = before[torch.where(begins, edge, 0).cummax(0).values]  # the first that the run of an edge goes through
    goes_through = ends & (before > left_out)

    # A group has its runs of tokens, then, as each run that goes through dense columns parts them, one run more than
    # such runs of dense columns.
    runs, parting = begins.cumsum(0), goes_through.cumsum(0)
    runs_before, parting_before = (torch.nn.functional.pad(x, (1, 0))[graph.indptr] for x in (runs, parting))
    group = torch.arange(graph.num_frames + 1, device=device)
    offsets = torch.nn.functional.pad(runs_before + parting_before + group, (0, 1))
    offsets[-1] = offsets[-2] + 1  # the dense group's one run
    start, stop = torch.zeros(2, 2 * num_edges + len(offsets), dtype=torch.int64, device=device)
    unused = len(start) - 1

    def put(table: Tensor, values: Tensor, at: Tensor, where: Tensor | None = None) -> None:
        table.scatter_(0, at if where is None else torch.where(where, at, unused), values)

    at = runs - 1 + parting_before[row] + row
    put(start, first, at, begins)
    put(stop, end, at, ends)
    first_dense = runs_before[1:] + parting_before[:-1] + group[:-1]
    put(start, torch.full_like(first_dense, DENSE), first_dense)
    put(stop, torch.full_like(first_dense, DENSE + len(keys.dense)), offsets[1:-1] - 1)
    at = runs_before[row + 1] + row + parting
    put(start, DENSE + before, at, goes_through)
    put(stop, DENSE + left_out, at - 1, goes_through)
    last = offsets[-2:-1]
    put(start, torch.zeros_like(last), last)
    put(stop, torch.full_like(last, layout.num_key_tokens if len(layout.queries.dense) else 0), last)
    return offsets.int(), start.int(), (stop - start).int()


class ColumnMaps(ctypes.Structure):
    """`ColumnMaps` of work.cuh."""

    _fields_ = tuple((name, TensorMap) for name in ("tiles", "dense_tiles", "pieces", "dense_pieces"))

    @classmethod
    def of(cls, x: Tensor, dense: Tensor, columns: int) -> ColumnMaps:
        """Describe keys or values and their dense ones alone, both `[B, H, N, D]`, for tiles of so many columns."""
        return cls(*(tensor_map(tensor, tokens) for tokens in (columns, PIECE) for tensor in (x, dense)))


class Layout(ctypes.Structure):
    """`Layout` of work.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Tables._fields),
        ("num_row_tiles", ctypes.c_int),
        ("num_first", ctypes.c_int),
        ("dense_group", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("batch_heads", ctypes.c_int),
    )

    @classmethod
    def of(cls, tables: Tables, row_block: int, q: Tensor) -> Layout:
        """Describe the tables for q `[B, H, N, D]`.

        Raises:
            ValueError: If there are 2^29 row tiles of all heads or more, which the kernels could not count.
        """
        B, H = q.shape[:2]
        if len(tables.rows) * B * H >= 2**29:
            raise ValueError(
                f"there must be fewer than 2^29 row tiles of all heads, got {len(tables.rows)} for each of {B * H} "
                "heads; call with fewer heads at a time"
            )
        num_tiles, num_dense_tiles = len(tables.rows), -(-len(tables.dense_rows) // row_block)
        # About the tiles that the layout puts first are worked on for all heads before the others.
        num_first = num_dense_tiles + -(-(num_tiles - num_dense_tiles) // 16)
        pointers = (table.data_ptr() for table in tables)
        return cls(*pointers, num_tiles, num_first, len(tables.columns) - 1, H, B * H)

    @property
    def items(self) -> int:
        """Row tiles times heads."""
        return int(self.num_row_tiles * self.batch_heads)
