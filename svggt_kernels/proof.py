"""The one rule against float64: an error may be at most `BUDGET` times that of a plain computation in the same dtype.

So no tolerance is a number that somebody chose. `error_ratio` applies the rule to any result, `error_ratios_of` to
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .coarse import CoarseLayout
from .layout import BlockLayout

BUDGET = 2.0
QUANTITIES = ("out", "lse", "grad q", "grad k", "grad v")


def plain_attention(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    mask: Tensor,  # [N, N'] bool or floating
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute masked attention by its formula, every step in the dtype of q; differentiable.

    `scale` is `D ** -0.5` by default. A floating mask says how many keys each stands for, 0 where it is not seen.

    Returns:
        Output `[B, H, N, D]` and log-sum-exp `[B, H, N]`; 0 and -inf for a row that sees nothing.
    """
    scores = _scores(q, k, mask, scale)
    blind = ~mask.bool().any(-1, keepdim=True)
    p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return p @ v, scores.logsumexp(-1)


def plain_gradients(
    q: Tensor,  # [B, H, N, D]
    k: Tensor,  # [B, H, N', D]
    v: Tensor,  # [B, H, N', D]
    mask: Tensor,  # [N, N'] bool or floating, as in `plain_attention`
    grad_out: Tensor,  # [B, H, N, D]
    grad_lse: Tensor,  # [B, H, N]
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and the gradients of q, k and v by their formulas, every step in the dtype of q.

    As in every implementation that does not keep the softmax, the backward pass makes it again from the log-sum-exp.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = plain_attention(q, k, v, mask, scale)
    p = torch.where(mask.bool(), torch.exp(_scores(q, k, mask, scale) - lse[..., None]), 0)
    ds = p * (grad_out @ v.mT + (grad_lse - (grad_out * out).sum(-1))[..., None]) * scale
    return out, lse, ds @ k, ds.mT @ q, p.mT @ grad_out


def _scores(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Return the scores, with log of what each key stands for added, -inf where it is not seen."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.log().to(scores.dtype)


def error_ratios_of(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    layout: BlockLayout | CoarseLayout,
    dtype: torch.dtype,
    *,
    head_size: int,
    scale: float | None = None,
    batch: int = 1,
    heads: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the error of attention against float64 as a multiple of the error of plain attention in the same dtype.

    Inputs are normal random numbers, q, k and v views of one packed tensor as models have them. For the gradients of q
    and k the plain error counts as at least the float32 rounding of the terms whose difference they are.

    Args:
        attend: Takes q, k, v and the gradients of output and LSE; returns output, LSE and the gradients of q, k, v, or
            the first of them alone.
        layout: Which key tokens each query token sees; attention runs on its device. Small: its dense mask is formed.
        dtype: Dtype of the inputs.
        head_size: D.
        scale: As in `block_sparse_attention`.
        batch: B.
        heads: H; by default enough of them for 1000 rows or more, so that one row does not decide.
        seed: Seed of the inputs.

    Returns:
        `error_ratio` of each of `QUANTITIES` that `attend` returns.
    """
    if heads is None:
        heads = max(2, 1000 // min(layout.num_tokens, layout.num_key_tokens))
    inputs = _inputs(layout, dtype, head_size, batch, heads, seed)
    # Without float64 there, the rest happens on the CPU.
    device = torch.device("cpu") if layout.device.type == "mps" else layout.device
    on_device = layout.to(device)
    mask = on_device.to_weights() if isinstance(on_device, CoarseLayout) else on_device.to_dense()
    # A row that sees nothing has LSE -inf, which has no gradient.
    inputs[4].masked_fill_(~mask.bool().any(-1).to(layout.device), 0)

    results = [x.detach().to(device) for x in attend(*inputs)]
    q, k, v, grad_out, grad_lse = (x.to(device) for x in inputs)
    plain = plain_gradients(q, k, v, mask, grad_out, grad_lse, scale)
    q, k, v, grad_out, grad_lse = (x.double() for x in (q, k, v, grad_out, grad_lse))
    exact = plain_gradients(q, k, v, mask, grad_out, grad_lse, scale)
    floors = _cancellation(q, k, v, mask, grad_out, exact[0], exact[1], scale)
    named = zip(QUANTITIES, results, plain, exact, strict=False)
    return {name: error_ratio(*tensors, floor=floors.get(name, 0.0)) for name, *tensors in named}


def error_ratio(result: Tensor, plain: Tensor, exact: Tensor, *, floor: float = 0.0) -> float:
    """Return the error of a result as a multiple of the error of a plain computation; at most `BUDGET` is right.

    Errors are root mean squares over the whole tensor. The plain error counts as at least that of rounding the exact
    result once to the dtype of `result`.

    Args:
        result: What is judged, in the dtype in which it comes.
        plain: The same as it is usually computed with such inputs, of the same shape.
        exact: The same computed in float64.
        floor: What the plain error counts as at least, too.

    Returns:
        The ratio. NaN, which is never right, where a result is not finite but should be, or the other way round, or the
        plain error is not finite, which proves nothing.
    """
    finite = exact.isfinite()
    right, unbounded = exact[finite], exact[~finite]
    error, plain_error, rounding = (_rms(x.double()[finite] - right) for x in (result, plain, exact.to(result.dtype)))
    allowed = max(plain_error, rounding, floor)
    if not math.isfinite(plain_error) or not bool((result.double()[~finite] == unbounded).all()):
        return math.nan
    if error == 0:
        return 0.0
    return error / allowed if allowed else math.inf


def within_budget(ratios: dict[str, float]) -> bool:
    """Return True if every ratio is at most `BUDGET`; NaN never is."""
    return all(ratio <= BUDGET for ratio in ratios.values())


def _inputs(
    layout: BlockLayout | CoarseLayout, dtype: torch.dtype, head_size: int, batch: int, heads: int, seed: int
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
    p = torch.where(mask.bool(), torch.exp(_scores(q, k, mask, scale) - lse[..., None]), 0.0)
    terms = p * ((grad_out @ v.mT).abs() + (grad_out * out).abs().sum(-1, keepdim=True)) * abs(scale)
    epsilon = torch.finfo(torch.float32).eps
    return {"grad q": epsilon * _rms(terms @ k.abs()), "grad k": epsilon * _rms(terms.mT @ q.abs())}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
