"""Launches of csrc/hopper/backward_*.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .runtime import Kernel, Tensor4, TensorMap, defines, launch, multiprocessors, tensor_map
from .tables import Layout, Tables

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
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
        ("unfolded", ctypes.c_void_p),
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
        *((name, Tensor4) for name in ("q", "out", "grad", "scaled_q", "folded_grad")),
        ("lse", ctypes.c_void_p),
        ("grad_lse", ctypes.c_void_p),
        ("shifts", ctypes.c_void_p * 2),
        ("unfolded", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("batch_heads", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
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


def kernel(name: str, dtype: torch.dtype, head_size: int, folds: bool, accumulate: bool = False) -> Kernel:
    """Return `backward_keys` (with `accumulate` it also adds to dQ) or `backward_queries`, see backward.cuh."""
    shared_bytes = SHARED_BYTES[name, accumulate][head_size]
    macros = defines(dtype, head_size, Parameters, shared_bytes) + ((("ACCUMULATE_QUERIES", 1),) if accumulate else ())
    return Kernel(f"{name}.cu", name, 384, shared_bytes, macros + ((("FOLDS", 1),) if folds else ()))


def token_kernel(name: str, dtype: torch.dtype, head_size: int, folds: bool = False) -> Kernel:
    """Return `backward_inner` or `backward_convert`."""
    parameters = InnerParameters if name == "backward_inner" else ConvertParameters
    macros = (*defines(dtype, head_size, parameters, 0), (name.upper(), 1), *((("FOLDS", 1),) if folds else ()))
    return Kernel("backward_tokens.cu", name, 256, 0, macros)


def kernels(dtype: torch.dtype, head_size: int, folds: bool, accumulate: bool) -> list[Kernel]:
    """Return all that `backward` launches."""
    walks = [("backward_keys", accumulate)] + ([] if accumulate else [("backward_queries", False)])
    return [
        token_kernel("backward_inner", dtype, head_size, folds),
        *(kernel(name, dtype, head_size, f, a) for f in ((True, False) if folds else (False,)) for name, a in walks),
        *([token_kernel("backward_convert", dtype, head_size)] if accumulate else []),
    ]


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
    folds: bool,
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
        folds: Whether the forward pass scaled and rounded Q where scores are moderate; bfloat16 only.
        accumulate: Whether dQ is added up in float32 in one pass (5 products, no fixed order) and not in a second pass
            of its own (7 products, bitwise repeatable).
    """
    B, H, N, D = q.shape
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    lse_shift, inner_shift = torch.empty_like(lse), torch.empty_like(lse)
    shifts = (ctypes.c_void_p * 2)(lse_shift.data_ptr(), inner_shift.data_ptr())
    scaled_q, folded_grad = (x.new_empty(B, H, N, D) if folds else x for x in (q, grad_out))
    # The next item of each launch; heads that are not folded after all, and whether any is.
    counters = q.new_zeros(4 + B * H + 1, dtype=torch.int32)
    unfolded = counters[4:].data_ptr() if folds else None
    per_token = (N, H, B * H)
    token_blocks = -(-B * H * N * (D // 8) // 256)
    launch(
        token_kernel("backward_inner", q.dtype, D, folds),
        token_blocks,
        InnerParameters(
            *map(Tensor4.of, (q, out, grad_out, scaled_q, folded_grad)), lse.data_ptr(),
            None if grad_lse is None else grad_lse.data_ptr(), shifts, unfolded, *per_token, scale * LOG2_E,
        ),
        q.device,
    )  # fmt: skip
    dq_sum = q.new_zeros(B * H * N * D if accumulate else 0, dtype=torch.float32)
    launches = 0

    def walk(
        name: str, tables: Tables, rows: tuple, columns: tuple, gradients: tuple, factor: float, folded: bool
    ) -> None:
        nonlocal launches
        layout = Layout.of(tables, ROWS, q)
        launch(
            kernel(name, q.dtype, D, folded, accumulate),
            min(layout.items, multiprocessors(q.device)),
            Parameters(
                (TensorMap * 2)(*(tensor_map(x, ROWS) for x in rows)),
                (TensorMap * 2)(*(tensor_map(x, COLUMNS[D]) for x in columns)),
                *((Tensor4 * 2)(*map(Tensor4.of, pair)) for pair in (rows, columns, gradients)),
                shifts, unfolded, counters[launches:].data_ptr(), dq_sum.data_ptr(), layout, N, scale * LOG2_E, factor,
            ),
            q.device,
        )  # fmt: skip
        launches += 1

    for folded in (True, False) if folds else (False,):
        # Q that was scaled comes back as its gradient times 1 / log2(e).
        queries, factor = (scaled_q, LN_2) if folded else (q, scale)
        walk("backward_keys", key_tables, (k, v), (queries, folded_grad), (dk, dv), factor, folded)
        if not accumulate:
            walk("backward_queries", query_tables, (queries, folded_grad), (k, v), (dq, dq), scale, folded)
    if accumulate:
        convert = ConvertParameters(dq_sum.data_ptr(), Tensor4.of(dq), *per_token, scale)
        launch(token_kernel("backward_convert", q.dtype, D), token_blocks, convert, q.device)
    return dq, dk, dv
