"""What the kernels of csrc/hopper are compiled and launched with: macros, strides, tensor maps, and the layout."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...coarse import CoarseLayout
from ...layout import DENSE, BlockLayout, on_device
from .._nvrtc import Kernel, checked, parameter_bytes
from ..contract import SOURCES

PIECE = 8
"""Tokens that the copy engine loads at a time where a tile spans runs."""


def kernel(file: str, name: str, threads: int, shared_bytes: int, macros: tuple[tuple[str, int], ...]) -> Kernel:
    """Return the kernel `name` of a file of csrc/hopper."""
    return Kernel(SOURCES / "hopper" / file, "sm_90a", name, threads, shared_bytes, macros)


class TensorMap(ctypes.Structure):
    """What the copy engine must know of a tensor: the driver's CUtensorMap."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)
    ALIGNMENT = 64


class Tensor4(ctypes.Structure):
    """A tensor `[B, H, N, D]` of which a kernel knows the strides of the first three axes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> Tensor4:
        """Describe x."""
        return cls(x.data_ptr(), *x.stride()[:3])


def defines(
    dtype: torch.dtype, head_size: int, parameters: type[ctypes.Structure], shared_bytes: int
) -> tuple[tuple[str, int], ...]:
    """Return the macros that every kernel takes; it checks its own sizes of parameters and shared memory by them."""
    sizes = (("PARAMETER_BYTES", parameter_bytes(parameters)), ("SHARED_BYTES", shared_bytes))
    return (("HEAD_SIZE", head_size), *((("BFLOAT16", 1),) if dtype == torch.bfloat16 else ()), *sizes)


def tensor_map(x: Tensor, tokens: int) -> TensorMap:
    """Return a map of x `[B, H, N, D]`, 16-bit, that reads boxes of `tokens` tokens and 64 columns of d.

    In shared memory they lie in the 128-byte swizzle. Tokens behind the last one read as zeros.
    """
    return _tensor_map(x.dtype, x.data_ptr(), tuple(x.shape), x.stride(), tokens)


# Making one takes longer than a launch, and from layer to layer tensors lie in the same places.
@lru_cache(maxsize=1024)
def _tensor_map(
    dtype: torch.dtype, address: int, shape: tuple[int, ...], strides: tuple[int, ...], tokens: int
) -> TensorMap:
    from cuda.bindings import driver

    B, H, N, D = shape
    # The stride of an axis of length 1 is never used, but must be valid.
    steps = [stride if n > 1 else D for n, stride in zip((N, H, B), (strides[i] for i in (2, 1, 0)), strict=True)]
    one = driver.cuuint32_t(1)
    # The second-level cache may fetch 256 bytes for the 128 of a box's row where the next belong to the same head.
    fetched = 256 if D > 64 or steps[0] == D else 128
    encoded = checked(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{str(dtype).removeprefix('torch.').upper()}"),
            4,
            address,
            [driver.cuuint64_t(n) for n in (D, N, H, B)],
            [driver.cuuint64_t(step * dtype.itemsize) for step in steps],
            [driver.cuuint32_t(n) for n in (64, tokens, 1, 1)],
            [one] * 4,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            getattr(driver.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_L2_{fetched}B"),
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(encoded.getPtr(), ctypes.sizeof(TensorMap)))


class Tables(NamedTuple):
    """A BlockLayout as the kernels walk it, row tiles and the runs of columns; int32, for `Layout` of work.cuh."""

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


class Weights(NamedTuple):
    """Which columns stand for n tokens each; for `Parameters` of forward.cu."""

    columns: Tensor  # int32 [S + 1], how many of the columns of a group, its first
    weight: Tensor  # float32 [2], n and log2 n


def make_coarse_tables(layout: CoarseLayout, row_block: int) -> tuple[Tables, Weights]:
    """Return the tables of all parts of a layout as one, and the weights of its last part. No host sync.

    A group sees its kept patches first, then special tokens of frames that it sees coarsely, then what it sees in full.
    Runs of what is packed in the parts are runs of dense columns: in one copy patches, special tokens, dense tokens.
    """
    whole, *special, patches = layout.parts
    # A copy, as what it keeps is made in the order of the streams of this layout, not in that of the part.
    whole_layout = BlockLayout(whole.layout.graph, whole.layout.queries, whole.layout.keys)
    packed = [patches, *special]
    runs = [part.find_runs(through_dense=True) for part in (*(part.layout for part in packed), whole_layout)]
    groups = len(runs[-1].columns)  # the other parts have one more where trailing tokens are dense
    num_packed, starts = 0, []
    for part, of_part in zip(packed, runs, strict=False):
        starts.append(of_part.start + (DENSE + num_packed))
        num_packed += part.layout.num_key_tokens
    in_full = runs[-1].start
    starts.append(torch.where(in_full < 0, in_full + num_packed, in_full))

    # Sorted by group, and in each by part; behind the last group those that are not used.
    places = [torch.arange(len(start), dtype=torch.int32, device=layout.device) for start in starts]
    group = [torch.searchsorted(r.offsets[1 : groups + 1], at, right=True) for r, at in zip(runs, places, strict=True)]
    order = torch.cat(group).argsort(stable=True)
    tokens = [part.tokens for part in packed if part.tokens is not None]
    tables = Tables(
        rows=whole_layout.row_tiles(row_block),
        columns=torch.stack([of_part.columns[:groups] for of_part in runs]).sum(0, dtype=torch.int32),
        run_offsets=torch.stack([of_part.offsets[: groups + 1] for of_part in runs]).sum(0, dtype=torch.int32),
        run_start=torch.cat(starts)[order],
        run_length=torch.cat([of_part.length for of_part in runs])[order],
        dense_rows=runs[-1].dense_rows,
        dense_columns=torch.cat([*tokens, runs[-1].dense_columns]).int(),
    )
    weight = np.array([patches.weight, math.log2(patches.weight)], dtype=np.float32)
    return tables, Weights(runs[0].columns[:groups].contiguous(), on_device(weight, layout.device))


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
