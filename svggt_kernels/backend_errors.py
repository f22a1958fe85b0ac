"""Is a backend right? Compares the operator with plain attention in float64, by the rule in `proof`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import block_sparse_attention
from .coarse import CoarseLayout
from .layout import BlockLayout
from .proof import error_ratios_of


def error_ratios(
    layout: BlockLayout | CoarseLayout,
    dtype: torch.dtype,
    *,
    scale: float | None = None,
    backend: str | None = None,
    head_size: int = 64,
    gradients: bool = True,
    **sizes: Any,
) -> dict[str, float]:
    """Return the errors of a backend as `proof.error_ratios_of` states them.

    Args:
        layout: As in `proof.error_ratios_of`.
        dtype: Likewise.
        scale: As in `block_sparse_attention`.
        backend: Likewise.
        head_size: D.
        gradients: If False the output and the LSE alone, as they are where no gradient is needed: a backend may then
            compute them in another way.
        **sizes: The other arguments of `proof.error_ratios_of`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
        q, k, v = inputs = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
        out, lse = block_sparse_attention(q, k, v, layout, scale=scale, return_lse=True, backend=backend)
        if not gradients:
            return out, lse
        return out, lse, *torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse.to(lse.dtype)))

    return error_ratios_of(attend, layout, dtype, head_size=head_size, scale=scale, **sizes)
