"""What a transformer block computes beside its matrix products, each in one pass over memory.

On CUDA by Triton kernels, elsewhere by PyTorch: the same formulas in float32, the result rounded once.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HAS_TRITON = find_spec("triton") is not None


def layer_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Normalise the rows of x `[..., C]`, in float32 or better inside, and return them in `dtype`."""
    if x.is_cuda and _HAS_TRITON and x.dtype != torch.float64:
        from . import triton_kernels

        return triton_kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)
    wide = _wide(x.dtype)
    return F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(dtype)


def add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return x + gamma y in the dtype of x, `[..., C]`; computed in float32 or better.

    Args:
        x: The residual stream.
        y: What is added to it, in any dtype.
        gamma: Factors of the columns `[C]`, or None for 1.
        out: Where the result goes, of the shape and dtype of x, or None for a new tensor; may be x.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if gamma is None:
        return torch.add(x, y, out=out) if x.dtype == y.dtype else out.copy_(x + y)
    if x.is_cuda and _HAS_TRITON and x.dtype != torch.float64:
        from . import triton_kernels

        return triton_kernels.add_scaled(x.contiguous(), y.contiguous(), gamma, out)
    wide = _wide(x.dtype)
    return out.copy_(x.to(wide) + gamma.to(wide) * y.to(wide))


def normalise_and_rotate_(
    qkv: Tensor,  # [B, N, 3, H, D]
    positions: Tensor,  # [B, N, 2]
    q_norm: nn.LayerNorm,
    k_norm: nn.LayerNorm,
    base: float,
    factor: float = 1.0,
) -> Tensor:
    """Normalise queries and keys over D and rotate them by their tokens' positions, in place; values stay.

    Rotary embedding in two dimensions, as VGGT and CroCo have it: the first half of D turns with the token's y, the
    second with its x; of each half, element i and element i + D / 4 form a pair that turns by `base ** (-4 i / D)` a
    step. All in float32 or better, rounded once.

    Args:
        qkv: Contiguous queries, keys and values `[B, N, 3, H, D]`, D a multiple of 4; with Triton D / 4 a power of 2.
        positions: Integer positions (y, x) of the tokens `[B, N, 2]`.
        q_norm: Normalises queries.
        k_norm: Normalises keys.
        base: Base of the frequencies.
        factor: By what queries are multiplied before they are rounded.

    Returns:
        qkv.
    """
    if qkv.is_cuda and _HAS_TRITON and qkv.dtype != torch.float64:
        from . import triton_kernels

        return triton_kernels.normalise_and_rotate_(qkv, positions.contiguous(), q_norm, k_norm, base, factor)
    wide = _wide(qkv.dtype)
    quarter = qkv.shape[-1] // 4
    frequency = base ** (-torch.arange(quarter, device=qkv.device, dtype=wide) / quarter)
    angle = positions[:, :, None, :, None].to(wide) * frequency  # [B, N, 1, 2, D / 4]
    cos, sin = angle.cos(), angle.sin()
    for index, (norm, scale) in enumerate(((q_norm, factor), (k_norm, 1.0))):
        x = layer_norm(qkv[:, :, index], norm, wide)
        first, second = x.unflatten(-1, (2, 2, quarter)).unbind(-2)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2)
        qkv[:, :, index] = (turned.flatten(-3) * scale).to(qkv.dtype)
    return qkv


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
