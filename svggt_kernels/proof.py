"""The error budget: how far a result may be from plain attention in float64, without tuned tolerances.

The error against float64 may be at most twice the error that a plain implementation makes in the same dtype. So a
tolerance is never a number that somebody chose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import BlockLayout

BUDGET = 2.0
QUANTITIES = ("out", "lse", "grad q", "grad k", "grad v")


def plain_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    mask: Tensor,  # [N, N'] bool
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute masked attention by its formula, every step in the dtype of q; differentiable.

    `scale` is `D ** -0.5` by default.

    Returns:
        Output `[B, H, N, D]` and log-sum-exp `[B, H, N]`; 0 and -inf for a row that sees nothing.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q @ k.mT * scale).masked_fill(~mask, float("-inf"))
    blind = ~mask.any(-1, keepdim=True)
    p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return p @ v, scores.logsumexp(-1)


def plain_gradients(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    mask: Tensor,  # [N, N'] bool
    grad_out: Tensor,  # [B, H, N, D]
    grad_lse: Tensor,  # [B, H, N]
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and the gradients of q, k and v by their formulas, every step in the dtype of q.

    As in every implementation that does not keep the softmax, the backward pass makes it again from the log-sum-exp.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = plain_attention(q, k, v, mask, scale)
    p = torch.where(mask, torch.exp(q @ k.mT * scale - lse[..., None]), 0)
    ds = p * (grad_out @ v.mT + (grad_lse - (grad_out * out).sum(-1))[..., None]) * scale
    return out, lse, ds @ k, ds.mT @ q, p.mT @ grad_out


def error_ratios_of(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    layout: BlockLayout,
    dtype: torch.dtype,
    *,
    head_size: int,
    scale: float | None = None,
    batch: int = 1,
    heads: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the errors of `attend` as `verify.error_ratios` does those of a backend.

    Args:
        attend: Takes q, k, v and the gradients of output and LSE; returns output, LSE and the gradients of q, k, v.
        layout: As in `verify.error_ratios`, like all that follow.
        dtype: Likewise.
        head_size: Likewise.
        scale: Likewise.
        batch: Likewise.
        heads: Likewise.
        seed: Likewise.
    """
    if heads is None:
        heads = max(2, 1000 // min(layout.num_tokens, layout.num_key_tokens))
    inputs = _inputs(layout, dtype, head_size, batch, heads, seed)
    # Without float64 there, the rest happens on the CPU.
    device = torch.device("cpu") if layout.device.type == "mps" else layout.device
    mask = layout.to(device).to_dense()
    # A row that sees nothing has LSE -inf, which has no gradient.
    inputs[4].masked_fill_(~mask.any(-1).to(layout.device), 0)

    ours = [x.detach().to(device).double() for x in attend(*inputs)]
    q, k, v, grad_out, grad_lse = (x.to(device) for x in inputs)
    plain = [x.double() for x in plain_gradients(q, k, v, mask, grad_out, grad_lse, scale)]
    q, k, v, grad_out, grad_lse = (x.double() for x in (q, k, v, grad_out, grad_lse))
    exact = plain_gradients(q, k, v, mask, grad_out, grad_lse, scale)
    floors = _cancellation(q, k, v, mask, grad_out, exact[0], exact[1], scale)
    ratios = {}
    for name, actual, low, reference in zip(QUANTITIES, ours, plain, exact, strict=True):
        finite = reference.isfinite()
        rounded = reference.to(torch.float32 if name == "lse" else dtype).double()
        allowed = max(_rms((low - reference)[finite]), _rms((rounded - reference)[finite]), floors.get(name, 0.0))
        error = _rms((actual - reference)[finite])
        same_infinities = bool((actual[~finite] == reference[~finite]).all())
        ratio = error / allowed if allowed else float("inf")
        ratios[name] = (ratio if error else 0.0) if same_infinities else float("nan")
    return ratios


def within_budget(ratios: dict[str, float]) -> bool:
    """Return True if every ratio is at most `BUDGET`; NaN never is."""
    return all(ratio <= BUDGET for ratio in ratios.values())


def _inputs(
    layout: BlockLayout, dtype: torch.dtype, head_size: int, batch: int, heads: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(layout.device, dtype)

    if layout.num_tokens == layout.num_key_tokens:
        q, k, v = random(batch, layout.num_tokens, 3, heads, head_size).permute(2, 0, 3, 1, 4)
    else:
        q = random(batch, layout.num_tokens, heads, head_size).transpose(1, 2)
        k, v = random(batch, layout.num_key_tokens, 2, heads, head_size).permute(2, 0, 3, 1, 4)
    grad_out = random(batch, layout.num_tokens, heads, head_size).transpose(1, 2)
    return q, k, v, grad_out, random(batch, heads, layout.num_tokens)


def _cancellation(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> dict[str, float]:
    """Return one float32 rounding of the terms that cancel in the gradients of q and k, p (dO.v) and p (dO.out)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = torch.where(mask, torch.exp(q @ k.mT * scale - lse[..., None]), 0.0)
    terms = p * ((grad_out @ v.mT).abs() + (grad_out * out).abs().sum(-1, keepdim=True)) * abs(scale)
    epsilon = torch.finfo(torch.float32).eps
    return {"grad q": epsilon * _rms(terms @ k.abs()), "grad k": epsilon * _rms(terms.mT @ q.abs())}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
