"""A BlockLayout as the kernels of csrc/hopper walk it: row tiles, and the runs as a stream of columns."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from torch import Tensor

from ...layout import BlockLayout


class Tables(NamedTuple):
    """What `Layout` of work.cuh points to; int32 tensors."""

    rows: Tensor  # [T, 3], see BlockLayout.row_tiles
    columns: Tensor  # the rest as in Runs
    run_offsets: Tensor
    run_start: Tensor
    run_length: Tensor
    dense_rows: Tensor
    dense_columns: Tensor


def make_tables(layout: BlockLayout, row_block: int, rest_block: int | None = None) -> Tables:
    """Return the tables for such row tiles as `BlockLayout.row_tiles` makes."""
    runs = layout.runs
    return Tables(
        layout.row_tiles(row_block, rest_block),
        runs.columns,
        runs.offsets,
        runs.start,
        runs.length,
        runs.dense_rows,
        runs.dense_columns,
    )


class Layout(ctypes.Structure):
    """`Layout` of work.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Tables._fields),
        ("num_row_tiles", ctypes.c_int),
        ("num_first", ctypes.c_int),
        ("dense_group", ctypes.c_int),
        ("num_dense", ctypes.c_int),
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
        return cls(*pointers, num_tiles, num_first, len(tables.columns) - 1, len(tables.dense_columns), H, B * H)

    @property
    def items(self) -> int:
        """Row tiles times heads."""
        return int(self.num_row_tiles * self.batch_heads)
