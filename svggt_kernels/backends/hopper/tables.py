"""A BlockLayout as the kernels of csrc/hopper walk it: row tiles, and the runs of columns."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from ...layout import BlockLayout
from .operands import TensorMap, tensor_map

PIECE = 8
"""Tokens that the copy engine loads at a time where a tile spans runs."""


class Tables(NamedTuple):
    """What `Layout` of work.cuh points to; int32 tensors."""

    rows: Tensor  # [T, 3], see BlockLayout.row_tiles
    columns: Tensor  # [S + 1], how many a group sees
    run_offsets: Tensor  # [S + 2]
    run_start: Tensor  # as in Runs, like all that follow
    run_length: Tensor
    dense_rows: Tensor
    dense_columns: Tensor


def make_tables(layout: BlockLayout, row_block: int) -> Tables:
    """Return the tables for such row tiles as `BlockLayout.row_tiles` makes. No host sync.

    Runs go through dense columns, so that fewer tiles of columns span runs.
    """
    runs = layout.find_runs(through_dense=True)
    return Tables(
        layout.row_tiles(row_block), runs.columns, runs.offsets, runs.start, runs.length, runs.dense_rows,
        runs.dense_columns,
    )  # fmt: skip


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
