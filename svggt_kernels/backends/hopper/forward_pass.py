"""Launches of csrc/hopper/forward.cu."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .._nvrtc import Kernel, launch, multiprocessors
from . import operands
from .operands import ColumnMaps, Layout, Tables, Tensor4, Weights, defines

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """Shape of the kernel: columns of a tile, tiles of the ring."""

    columns: int
    stages: int


CONSUMERS = 3
"""Warpgroups of 64 rows."""

ROWS = 64 * CONSUMERS
"""Rows of a tile."""

CONFIGS = {64: Config(96, 7), 128: Config(64, 4)}
"""By head size."""

SHARED_BYTES = {64: 223456, 128: 231600}
"""By head size; `Shared::BYTES` of forward.cu."""


class Parameters(ctypes.Structure):
    """`Parameters` of forward.cu."""

    _fields_ = (
        ("k_maps", ColumnMaps),
        ("v_maps", ColumnMaps),
        ("q", Tensor4),
        ("k", Tensor4),
        ("v", Tensor4),
        ("out", Tensor4),
        ("lse", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("failed", ctypes.c_void_p),
        ("layout", Layout),
        ("tokens", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("weighted", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("per_log2", ctypes.c_float),
    )


VARIANTS = ("bounded", "bounded-unit", "online")
"""Without a running maximum; also without a scale, for scores that come in units of log2; with a running maximum."""


def variant(scale: float, bounded: bool) -> str:
    """Return which of `VARIANTS` is launched first; what fails the proof of the bounded ones goes to "online"."""
    if not bounded:
        return "online"
    return "bounded-unit" if ctypes.c_float(scale * LOG2_E).value == 1.0 else "bounded"


def kernel(dtype: torch.dtype, head_size: int, variant: str, with_lse: bool, weighted: bool = False) -> Kernel:
    """Return the kernel for a dtype, a head size and one of `VARIANTS`; with or without the LSE, and weights."""
    macros = defines(dtype, head_size, Parameters, SHARED_BYTES[head_size])
    macros += tuple((name.upper(), value) for name, value in CONFIGS[head_size]._asdict().items())
    macros += {"bounded": (), "bounded-unit": (("UNIT_SCALE", 1),), "online": (("ONLINE", 1),)}[variant]
    macros += (("WITH_LSE", 1),) if with_lse else ()
    macros += (("WEIGHTED", 1),) if weighted else ()
    return operands.kernel("forward.cu", "forward", 128 * (CONSUMERS + 1), SHARED_BYTES[head_size], macros)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tables,
    weights: Weights | None,
    scale: float,
    bounded: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]`, laid out as `[B, N, H, D]`, and LSE `[B, H, N]`, without `with_lse` `[0]`.

    q, k and v are as `readable` gives them. The output has the same bits with and without the LSE.
    """
    B, H, N, D = q.shape
    config = CONFIGS[D]
    out = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty((B, H, N) if with_lse else (0,), dtype=torch.float32)
    layout = Layout.of(tables, ROWS, q)
    # The next item of each launch; which items have rows that failed, and whether any has.
    counters = q.new_zeros(2 + layout.items + 1 if bounded else 2, dtype=torch.int32)
    # Copies in which dense columns lie side by side; they live until both kernels are launched.
    k_dense, v_dense = (x.index_select(2, tables.dense_columns) if len(tables.dense_columns) else x for x in (k, v))
    parameters = Parameters(
        *(ColumnMaps.of(x, dense, config.columns) for x, dense in ((k, k_dense), (v, v_dense))),
        *map(Tensor4.of, (q, k, v, out)), lse.data_ptr(), counters[0:].data_ptr(),
        counters[2:].data_ptr() if bounded else None, layout, N, scale * LOG2_E,
    )  # fmt: skip
    if weights is not None:
        parameters.weighted, parameters.weight = (table.data_ptr() for table in weights)
        parameters.per_log2 = 1 / (scale * LOG2_E)
    weighted = weights is not None
    blocks = min(layout.items, multiprocessors(q.device))
    launch(kernel(q.dtype, D, variant(scale, bounded), with_lse, weighted), blocks, parameters, q.device)
    if bounded:
        parameters.next = counters[1:].data_ptr()
        launch(kernel(q.dtype, D, "online", with_lse, weighted), blocks, parameters, q.device)
    return out, lse
