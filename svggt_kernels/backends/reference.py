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
from .contract import Traits

NAME = "reference"
TRAITS = Traits(saves_lse=False)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Scores that one call of PyTorch's attention may form, and that the formulas here hold at once.
MAX_FUSED_SCORES = 2**31 - 1
MAX_SCORES = 2**28


def unsupported(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why PyTorch's attention cannot run such inputs, or None."""
    return None if dtype in DTYPES else f"it takes float16, bfloat16, float32 and float64, got {dtype}"


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
    accumulate = _accumulator(q.dtype)
    lse = q.new_full((B, H, N) if need_lse else (0,), -math.inf, dtype=accumulate)
    for rows, columns in _groups(tables, B * H, MAX_SCORES if need_lse else MAX_FUSED_SCORES):
        keys, values = k.index_select(2, columns), v.index_select(2, columns)
        for part in rows:
            out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], keys, values, scale=scale)
            if need_lse:
                scores = q[:, :, part].to(accumulate) @ keys.to(accumulate).mT * scale
                lse[:, :, part] = scores.logsumexp(-1)
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
    accumulate = _accumulator(q.dtype)
    dq, dk, dv = (x.new_zeros(x.transpose(1, 2).shape, dtype=accumulate).transpose(1, 2) for x in (q, k, v))
    inner = (grad_out.to(accumulate) * out.to(accumulate)).sum(-1)
    if grad_lse is not None:
        inner = inner - grad_lse
    for rows, columns in _groups(tables, q.shape[0] * q.shape[1], MAX_SCORES):
        keys, values = (x.index_select(2, columns).to(accumulate) for x in (k, v))
        for part in rows:
            queries, grad = q[:, :, part].to(accumulate), grad_out[:, :, part].to(accumulate)
            p = (queries @ keys.mT * scale).softmax(-1)
            ds = p * (grad @ values.mT - inner[:, :, part, None]) * scale
            dq[:, :, part] = ds @ keys
            dk.index_add_(2, columns, ds.mT @ queries)
            dv.index_add_(2, columns, p.mT @ grad)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _groups(tables: list[Tensor], batch: int, most_scores: int) -> Iterator[tuple[list[slice | Tensor], Tensor]]:
    """Yield, for every group of rows that sees something, its rows in parts and the columns they see, int64 `[n]`.

    No part has more than `most_scores` scores in all of the batch, unless a single row has.
    """
    runs = Runs(*tables)
    device = runs.dense_rows.device
    offsets, starts, lengths = runs.offsets.tolist(), runs.start.tolist(), runs.length.tolist()
    groups = list(zip(runs.row_start.tolist(), runs.row_length.tolist(), strict=True))
    for group, (row, num_rows) in enumerate(groups):
        is_dense = group == len(groups) - 1
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
        bounds = [(a, min(a + step, num_rows)) for a in range(0, num_rows, step)]
        if is_dense:
            yield [runs.dense_rows[a:b].long() for a, b in bounds], columns
        else:
            yield [slice(row + a, row + b) for a, b in bounds], columns
