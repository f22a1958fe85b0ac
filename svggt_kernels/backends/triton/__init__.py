"""The portable CUDA backend: Triton kernels for compute capability 8.0 and newer."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout, Tiles

NAME = "triton"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = (32, 64, 128)


class Config(NamedTuple):
    """Launch configuration of one kernel."""

    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """Tile sizes that all kernels share, and how each is launched."""

    rows: int
    columns: int
    forward: Config
    backward_queries: Config
    backward_keys: Config


def configs(device: torch.device, dtype: torch.dtype, head_size: int) -> Configs:
    """Return the launch configurations; those for head size 64 in 16 bits were measured on Hopper."""
    if dtype == torch.float32:
        # IEEE float32 products run on the plain units: small tiles keep the operands in registers.
        return Configs(32, 32, Config(4, 1), Config(4, 1), Config(4, 1))
    if not uses_descriptors(device, dtype):
        return Configs(64, 64, Config(4, 2), Config(4, 2), Config(4, 2))
    if head_size == 128:
        return Configs(128, 64, Config(8, 3), Config(8, 2), Config(8, 2))
    return Configs(128, 64, Config(4, 3), Config(8, 2), Config(8, 2))


def uses_descriptors(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if full tiles are read by descriptor: 16-bit types where there is TMA (capability 9.0, interpreter)."""
    return dtype.itemsize == 2 and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0))


def interpreted() -> bool:
    """Return True if Triton runs its kernels in Python on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why Triton cannot run such inputs, or None."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton (Linux)"
    if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
        return f"it needs a CUDA device, got {device.type}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it was written for NVIDIA GPUs, this is ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"it takes float16, bfloat16 and float32, got {dtype}"
    if interpreted() and dtype == torch.bfloat16:
        return "the interpreter computes bfloat16 products wrongly; use float16 or float32"
    if head_size not in HEAD_SIZES:
        return f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, got {head_size}"
    return None


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tiles of the layout for the block sizes of this dtype and head size."""
    config = configs(layout.device, dtype, head_size)
    return list(layout.tiles(config.rows, config.columns))


def forward(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    tables: list[Tensor],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]` and LSE `[B, H, N]`."""
    from . import kernels

    B, H, N, D = q.shape
    config = configs(q.device, q.dtype, D)
    q, k, v = (_readable(x) for x in (q, k, v))
    out = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    launch = _Launch(tables, B, H, config.rows)
    with launch.device:
        kernels.forward[launch.grid](
            q, k, v, _tiles_of(k, config.columns), _tiles_of(v, config.columns), out, lse,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out), N,
            *tables, *launch.counts, scale,
            ROWS=config.rows, COLUMNS=config.columns, D=D, DESCRIPTORS=uses_descriptors(q.device, q.dtype), **config.forward._asdict(),
        )  # fmt: skip
    return out, lse if need_lse else lse.new_empty(0)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: list[Tensor],
    transposed_tables: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; bitwise the same from run to run."""
    from . import kernels

    B, H, N, D = q.shape
    config = configs(q.device, q.dtype, D)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    q, k, v, grad = (_readable(x) for x in (q, k, v, grad_out))
    inner = torch.empty_like(lse)
    launch, transposed = _Launch(tables, B, H, config.rows), _Launch(transposed_tables, B, H, config.rows)
    with launch.device:
        kernels.inner_products[(-(-N // 64), B * H)](
            grad, out, lse if grad_lse is None else grad_lse.contiguous(), inner, *_strides(grad), *_strides(out), N, H,
            HAS_GRAD_LSE=grad_lse is not None, ROWS=64, D=D,
        )  # fmt: skip
        kernels.backward_queries[launch.grid](
            q, k, v, grad, _tiles_of(k, config.columns), _tiles_of(v, config.columns), lse, inner, dq,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(dq), N,
            *tables, *launch.counts, scale,
            ROWS=config.rows, COLUMNS=config.columns, D=D, DESCRIPTORS=uses_descriptors(q.device, q.dtype), **config.backward_queries._asdict(),
        )  # fmt: skip
        kernels.backward_keys[transposed.grid](
            q, k, v, grad, _tiles_of(q, config.columns), _tiles_of(grad, config.columns), lse, inner, dk, dv,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(dk), *_strides(dv), N,
            *transposed_tables, *transposed.counts, scale,
            ROWS=config.rows, COLUMNS=config.columns, D=D, DESCRIPTORS=uses_descriptors(q.device, q.dtype), **config.backward_keys._asdict(),
        )  # fmt: skip
    return dq, dk, dv


class _Launch:
    """Grid, counts and device context of a kernel that walks `tables`."""

    def __init__(self, tables: list[Tensor], batch: int, heads: int, row_block: int) -> None:
        tiles = Tiles(*tables)
        num_tiles, num_dense_tiles = len(tiles.rows), -(-len(tiles.dense_rows) // row_block)
        num_first = num_dense_tiles + -(-(num_tiles - num_dense_tiles) // 16)
        dense_group = len(tiles.full_offsets) - 2
        self.grid = (num_tiles * batch * heads,)
        self.counts = (num_tiles, num_first, dense_group, len(tiles.dense_columns), heads, batch * heads)
        device = tiles.rows.device
        self.device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _readable(x: Tensor) -> Tensor:
    """Return x, copied if tensor descriptors cannot read it: unit last stride, the others and the base 16-byte aligned."""
    unit = 16 // x.element_size()
    aligned = all(n == 1 or (s > 0 and s % unit == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    return x if x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _tiles_of(x: Tensor, columns: int):  # type: ignore[no-untyped-def]
    """Return a descriptor that reads tiles `[1, 1, columns, D]` of x `[B, H, N, D]`, or None where they are not used."""
    if not uses_descriptors(x.device, x.dtype):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    D = x.shape[-1]
    # The stride of an axis of length 1 is never used, but must be valid.
    strides = [s if n > 1 else D for n, s in zip(x.shape, x.stride(), strict=True)][:-1] + [1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, columns, D])


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]
