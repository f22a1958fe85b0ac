"""The portable CUDA backend: Triton kernels for compute capability 8.0 and newer."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout
from ..contract import Traits, readable, unfit
from .tiles import Tiles, make_tiles

NAME = "triton"
TRAITS = Traits()

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = (32, 64, 128)

INSTALLED = find_spec("triton") is not None

# Set by tests, together with TRITON_INTERPRET=1, to run the kernels in Python on the CPU.
INTERPRETED = False


class Config(NamedTuple):
    """Launch configuration of one kernel."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """How each kernel is launched, and the length of the pieces into which the rest of a run is cut."""

    forward: Config
    backward_queries: Config
    backward_keys: Config
    tail: int


def configs(device: torch.device, dtype: torch.dtype, head_size: int) -> Configs:
    """Return the launch configurations for a device, chosen by its capability and never by timing."""
    if dtype == torch.float32:
        # IEEE float32 products run on the plain units: small tiles keep the operands in registers.
        return Configs(Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1), tail=32)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        # Ampere, Ada and the consumer Blackwells have no wgmma, and as little as 99 KiB of shared memory.
        return Configs(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 8, 2), tail=64)
    if head_size == 128:
        return Configs(Config(128, 128, 8, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2), tail=64)
    return Configs(Config(128, 128, 4, 2), Config(64, 64, 4, 2), Config(64, 128, 4, 2), tail=32)


def uses_descriptors(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if full tiles are read by descriptor: 16-bit types where there is TMA (and in the interpreter)."""
    return dtype.itemsize == 2 and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0))


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why Triton cannot run such inputs, or None."""
    if not INSTALLED:
        return "triton is not installed: pip install triton (Linux)"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it needs a CUDA device, got {device.type}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "it was written for NVIDIA GPUs, this is ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, this device has {capability[0]}.{capability[1]}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "the interpreter computes bfloat16 products wrongly; use float16 or float32"
    return unfit(dtype, DTYPES, head_size, HEAD_SIZES)


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tiles of the layout for the forward kernel."""
    config = configs(layout.device, dtype, head_size)
    return _tiles(layout, config.forward, config.tail)


def backward_tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the tiles of the layout for the gradient of q and those of its transpose for the gradients of k and v."""
    config = configs(layout.device, dtype, head_size)
    queries = _tiles(layout, config.backward_queries, config.tail)
    return queries + _tiles(layout.transposed(), config.backward_keys, config.tail)


def _tiles(layout: BlockLayout, config: Config, tail: int) -> list[Tensor]:
    return list(make_tiles(layout, config.rows, config.columns, tail))


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
    q, k, v = (readable(x) for x in (q, k, v))
    out = q.new_empty(B, N, H, D).transpose(1, 2)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    walk = _Walk(tables, q, config.forward, config.tail)
    with _on(q.device):
        kernels.forward[walk.grid](
            q, k, v, *walk.columns(k, v), out, lse,
            *_strides(q, k, v, out), N,
            *tables[:-1], *walk.counts, scale, **walk.options,
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v; bitwise the same from run to run."""
    from . import kernels

    B, H, N, D = q.shape
    config = configs(q.device, q.dtype, D)
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    q, k, v, grad, out = (readable(x) for x in (q, k, v, grad_out, out))
    lse = lse.contiguous()
    inner = torch.empty_like(lse)
    query_tables, key_tables = tables[: len(Tiles._fields)], tables[len(Tiles._fields) :]
    queries = _Walk(query_tables, q, config.backward_queries, config.tail)
    keys = _Walk(key_tables, q, config.backward_keys, config.tail)
    with _on(q.device):
        kernels.inner_products[(-(-N // 64) * B * H,)](
            grad, out, lse if grad_lse is None else grad_lse.contiguous(), inner,
            *_strides(grad, out), N, H, HAS_GRAD_LSE=grad_lse is not None, ROWS=64, D=D,
        )  # fmt: skip
        kernels.backward_queries[queries.grid](
            q, k, v, grad, *queries.columns(k, v), lse, inner, dq,
            *_strides(q, k, v, grad, dq), N,
            *query_tables[:-1], *queries.counts, scale, **queries.options,
        )  # fmt: skip
        kernels.backward_keys[keys.grid](
            q, k, v, grad, *keys.columns(q, grad), lse, inner, dk, dv,
            *_strides(q, k, v, grad, dk, dv), N,
            *key_tables, *keys.counts, scale, **keys.options,
        )  # fmt: skip
    return dq, dk, dv


class _Walk:
    """What every kernel that walks tiles is launched with."""

    def __init__(self, tables: list[Tensor], q: Tensor, config: Config, tail: int) -> None:
        B, H, _, D = q.shape
        tiles = Tiles(*tables)
        num_tiles, num_dense_tiles = len(tiles.rows), -(-len(tiles.dense_rows) // config.rows)
        # About the tiles that the layout puts first are launched for all heads before the others.
        num_first = num_dense_tiles + -(-(num_tiles - num_dense_tiles) // 16)
        dense_group = len(tiles.full_offsets) - 2
        self.grid = (num_tiles * B * H,)
        self.counts = (num_tiles, num_first, dense_group, len(tiles.dense_columns), H, B * H)
        self.dense_columns = tiles.dense_columns
        self.blocks = (config.columns, tail)
        self.options = {
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "TAIL": tail,
            "D": D,
            "DESCRIPTORS": uses_descriptors(q.device, q.dtype),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def columns(self, *tensors: Tensor) -> list[object | None]:
        """Return what a kernel reads columns from: compact copies of the dense ones, then descriptors of both."""
        if len(self.dense_columns):
            compact = [x.index_select(2, self.dense_columns) for x in tensors]
        else:
            compact = list(tensors)
        if not self.options["DESCRIPTORS"]:
            return [*compact, *[None] * (2 * len(tensors))]
        blocks = zip((tensors, compact), self.blocks, strict=True)
        return [*compact, *(_descriptor(x, block) for group, block in blocks for x in group)]


def _descriptor(x: Tensor, tokens: int) -> object:
    """Return a descriptor that reads tiles `[1, 1, tokens, D]` of x `[B, H, N, D]`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    D = x.shape[-1]
    # The stride of an axis of length 1 is never used, but must be valid.
    strides = [s if n > 1 else D for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, tokens, D])


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of batch, head and token of every tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
