"""Launches of csrc/hopper/backward_*.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .._nvrtc import Kernel, launch, multiprocessors
from . import operands
from .operands import Layout, Tables, Tensor4, TensorMap, defines, tensor_map

LOG2_E = 1.4426950408889634
ROWS = 128
COLUMNS = {64: 128, 128: 64}
"""Columns of a step, by head size."""

SHARED_BYTES = {
    ("backward_keys", False): {64: 201440, 128: 199376},
    ("backward_keys", True): {64: 201968, 128: 232432},
    ("backward_queries", False): {64: 199392, 128: 232144},
}
"""By kernel, whether it adds to dQ, and head size; `Memory::BYTES` of backward.cuh."""


class Parameters(ctypes.Structure):
    """`Parameters` of backward.cuh."""

    _fields_ = (
        ("row_maps", TensorMap * 2),
        ("column_maps", TensorMap * 2),
        ("rows", Tensor4 * 2),
        ("columns", Tensor4 * 2),
        ("gradients", Tensor4 * 2),
        ("shifts", ctypes.c_void_p * 2),
        ("next", ctypes.c_void_p),
        ("dq_sum", ctypes.c_void_p),
        ("layout", Layout),
        ("num_queries", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class InnerParameters(ctypes.Structure):
    """`InnerParameters` of backward_tokens.cu."""

    _fields_ = (
        ("out", Tensor4),
        ("grad", Tensor4),
        ("lse", ctypes.c_void_p),
        ("grad_lse", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p * 2),
        ("tokens", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("batch_heads", ctypes.c_int),
    )


class ConvertParameters(ctypes.Structure):
    """`ConvertParameters` of backward_tokens.cu."""

    _fields_ = (
        ("dq_sum", ctypes.c_void_p),
        ("dq", Tensor4),
        ("tokens", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("batch_heads", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def kernel(name: str, dtype: torch.dtype, head_size: int, accumulate: bool = False) -> Kernel:
    """Return `backward_keys` (with `accumulate` it also adds to dQ) or `backward_queries`."""
    shared_bytes = SHARED_BYTES[name, accumulate][head_size]
    macros = defines(dtype, head_size, Parameters, shared_bytes) + ((("ACCUMULATE_QUERIES", 1),) if accumulate else ())
    return operands.kernel(f"{name}.cu", name, 384, shared_bytes, macros)


def token_kernel(name: str, dtype: torch.dtype, head_size: int) -> Kernel:
    """Return `backward_inner` or `backward_convert`."""
    parameters = InnerParameters if name == "backward_inner" else ConvertParameters
    macros = (*defines(dtype, head_size, parameters, 0), (name.upper(), 1))
    return operands.kernel("backward_tokens.cu", name, 256, 0, macros)


def kernels(dtype: torch.dtype, head_size: int, accumulate: bool) -> list[Kernel]:
    """Return all that `backward` launches."""
    inner = token_kernel("backward_inner", dtype, head_size)
    keys = kernel("backward_keys", dtype, head_size, accumulate)
    if accumulate:
        return [inner, keys, token_kernel("backward_convert", dtype, head_size)]
    return [inner, keys, kernel("backward_queries", dtype, head_size)]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_tables: Tables,
    key_tables: Tables,
    scale: float,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, laid out as `[B, N, H, D]`; tensors as `readable` gives them.

    Args:
        grad_out: Gradient of the output `[B, H, N, D]`.
        grad_lse: Gradient of the LSE `[B, H, N]`, float32, contiguous, or None.
        q: Queries.
        k: Keys.
        v: Values.
        out: Output of the forward pass.
        lse: LSE of the forward pass, float32, contiguous.
        query_tables: Of the layout, in row tiles of `ROWS`.
        key_tables: Of the transposed layout, likewise.
        scale: Factor on the scores.
        accumulate: Whether dQ is added up in float32 in one pass (5 products, no fixed order) and not in a second pass
            of its own (7 products, bitwise repeatable).
    """
    B, H, N, D = q.shape
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    lse_shift, inner_shift = torch.empty_like(lse), torch.empty_like(lse)
    shifts = (ctypes.c_void_p * 2)(lse_shift.data_ptr(), inner_shift.data_ptr())
    next_items = q.new_zeros(2, dtype=torch.int32)
    per_token = (N, H, B * H)
    token_blocks = -(-B * H * N * (D // 8) // 256)
    launch(
        token_kernel("backward_inner", q.dtype, D),
        token_blocks,
        InnerParameters(
            Tensor4.of(out), Tensor4.of(grad_out), lse.data_ptr(),
            None if grad_lse is None else grad_lse.data_ptr(), shifts, *per_token,
        ),
        q.device,
    )  # fmt: skip
    dq_sum = q.new_zeros(B * H * N * D if accumulate else 0, dtype=torch.float32)

    def walk(name: str, tables: Tables, rows: tuple, columns: tuple, gradients: tuple, next_item: Tensor) -> None:
        layout = Layout.of(tables, ROWS, q)
        launch(
            kernel(name, q.dtype, D, accumulate),
            min(layout.items, multiprocessors(q.device)),
            Parameters(
                (TensorMap * 2)(*(tensor_map(x, ROWS) for x in rows)),
                (TensorMap * 2)(*(tensor_map(x, COLUMNS[D]) for x in columns)),
                *((Tensor4 * 2)(*map(Tensor4.of, pair)) for pair in (rows, columns, gradients)),
                shifts, next_item.data_ptr(), dq_sum.data_ptr(), layout, N, scale * LOG2_E, scale,
            ),
            q.device,
        )  # fmt: skip

    walk("backward_keys", key_tables, (k, v), (q, grad_out), (dk, dv), next_items[0:])
    if not accumulate:
        walk("backward_queries", query_tables, (q, grad_out), (k, v), (dq, dq), next_items[1:])
    else:
        convert = ConvertParameters(dq_sum.data_ptr(), Tensor4.of(dq), *per_token, scale)
        launch(token_kernel("backward_convert", q.dtype, D), token_blocks, convert, q.device)
    return dq, dk, dv
