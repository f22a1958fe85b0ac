"""Is a backend right? Compares it with plain attention in float64, within the error budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import block_sparse_attention
from .layout import BlockLayout
from .proof import (
    BUDGET,
    QUANTITIES,
    error_ratios_of,
    plain_attention,
    plain_gradients,
    within_budget,
)

__all__ = ["BUDGET", "QUANTITIES", "error_ratios", "plain_attention", "plain_gradients", "within_budget"]


def error_ratios(
    layout: BlockLayout,
    dtype: torch.dtype,
    *,
    head_size: int = 64,
    scale: float | None = None,
    backend: str | None = None,
    batch: int = 1,
    heads: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the error of a backend against float64 as a multiple of the error of plain attention in the same dtype.

    Inputs are normal random numbers, q, k and v views of one packed tensor as models have them. Errors are root mean
    squares over the whole tensor. The plain error counts as at least that of rounding the exact result once, and for
    the gradients of q and k as at least the float32 rounding of the terms whose difference they are.

    Args:
        layout: Who sees whom; where it lies, the backend runs. Small: its dense mask is formed.
        dtype: Dtype of the inputs.
        head_size: D.
        scale: As in `block_sparse_attention`.
        backend: As in `block_sparse_attention`.
        batch: B.
        heads: H; by default enough of them for 1000 rows or more, so that one row does not decide.
        seed: Seed of the inputs.

    Returns:
        For "out", "lse", "grad q", "grad k" and "grad v" the ratio; at most `BUDGET` is right. NaN where a result is
        not finite but should be, or the other way round.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(
            inputs[0], inputs[1], inputs[2], layout, scale=scale, return_lse=True, backend=backend
        )
        return out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse.to(lse.dtype)))

    return error_ratios_of(attend, layout, dtype, head_size=head_size, scale=scale, batch=batch, heads=heads, seed=seed)
