"""The definition: each frame's queries attend to the keys they see, gathered; PyTorch only, any device, any dtype.

For a row with visible keys K, V and query q:

    s = scale * K q        lse = log sum exp s        p = softmax s        out = p V

and, with gradients dO and dLSE, D = dO . out:

    dV += p dO             ds = p * (V dO - D + dLSE)       dq = scale * ds K       dK += scale * ds q

A row that sees nothing gives out 0, lse -inf and gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import DENSE, BlockLayout, Runs
from .contract import Traits, unfit

NAME = "reference"
TRAITS = Traits(saves_lse=False)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Scores that one call of PyTorch's attention may form, and that the formulas here hold at once.
MAX_FUSED_SCORES = 2**31 - 1
MAX_SCORES = 2**28


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why PyTorch's attention cannot run such inputs, or None."""
    return unfit(dtype, DTYPES)


def tables(layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
    """Return the runs of the layout: ranges on the CPU, where they become slices, dense tokens on the device."""
    *ranges, dense_rows, dense_columns = layout.runs
    return [*(table.cpu() for table in ranges), dense_rows, dense_columns]


backward_tables = tables


def forward(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    tables: list[Tensor],
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out `[B, H, N, D]` and, if needed, LSE `[B, H, N]`; one SDPA call per frame over its gathered keys."""
    B, H, N, D = q.shape
    out = q.new_zeros(B, N, H, D).transpose(1, 2)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((B, H, N) if need_lse else (0,), -math.inf, dtype=accumulate)
    for rows, columns in _groups(tables, B * H, MAX_SCORES if need_lse else MAX_FUSED_SCORES):
        keys, values = k.index_select(2, columns), v.index_select(2, columns)
        out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], keys, values, scale=scale)
        if need_lse:
            scores = q[:, :, rows].to(accumulate) @ keys.to(accumulate).mT * scale
            lse[:, :, rows] = scores.logsumexp(-1)
    return out, lse


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
    """Return the gradients of q, k, v by the formula above, in float32 (float64 for float64 inputs)."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (x.new_zeros(x.transpose(1, 2).shape, dtype=accumulate).transpose(1, 2) for x in (q, k, v))
    inner = (grad_out.to(accumulate) * out.to(accumulate)).sum(-1)
    if grad_lse is not None:
        inner = inner - grad_lse
    for rows, columns in _groups(tables, q.shape[0] * q.shape[1], MAX_SCORES):
        keys, values = (x.index_select(2, columns).to(accumulate) for x in (k, v))
        queries, grad = q[:, :, rows].to(accumulate), grad_out[:, :, rows].to(accumulate)
        p = (queries @ keys.mT * scale).softmax(-1)
        ds = p * (grad @ values.mT - inner[:, :, rows, None]) * scale
        dq[:, :, rows] = ds @ keys
        dk.index_add_(2, columns, ds.mT @ queries)
        dv.index_add_(2, columns, p.mT @ grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _groups(tables: list[Tensor], batch: int, most_scores: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield, of every group of rows that sees something, some rows and the columns they see, int64 `[n]`.

    No part has more than `most_scores` scores in all of the batch, unless a single row has.
    """
    runs = Runs(*tables)
    device = runs.dense_rows.device
    offsets, starts, lengths = runs.offsets.tolist(), runs.start.tolist(), runs.length.tolist()
    groups = list(zip(runs.row_start.tolist(), runs.row_length.tolist(), strict=True))
    for group, (row, num_rows) in enumerate(groups):
        ranges = [
            torch.arange(starts[r], starts[r] + lengths[r], device=device)
            if starts[r] >= 0
            else runs.dense_columns.long()[starts[r] - DENSE :][: lengths[r]]
            for r in range(offsets[group], offsets[group + 1])
        ]
        columns = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *ranges])
        if num_rows == 0 or len(columns) == 0:
            continue
        step = max(1, most_scores // (batch * len(columns)))
        for begin in range(0, num_rows, step):
            end = min(begin + step, num_rows)
            is_dense = group == len(groups) - 1
            yield runs.dense_rows[begin:end].long() if is_dense else slice(row + begin, row + end), columns
