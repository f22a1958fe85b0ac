"""What blocks and heads compute beside their products, each in one pass over memory.

On NVIDIA GPUs since Ampere by Triton kernels, and by cuDNN what goes with a convolution; elsewhere by PyTorch: the same
formulas in float32, the result rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..packages import runs_triton


def layer_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """Normalise the rows of x `[..., C]`, in float32 or better inside, and return them in `dtype`."""
    if (kernels := _kernels(x)) is not None:
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)
    wide = _wide(x.dtype)
    return F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(dtype)


def add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, out: Tensor) -> Tensor:
    """Put x + gamma y, computed in float32 or better, into out, and return it.

    Args:
        x: The residual stream `[..., C]`.
        y: What is added to it, in any dtype.
        gamma: Factors of the columns `[C]`, or None for 1.
        out: Where the result goes, contiguous, of the shape and dtype of x; may be x.
    """
    if (kernels := _kernels(x)) is not None:
        return kernels.add_scaled(x.contiguous(), y.contiguous(), gamma, out)
    wide = _wide(x.dtype)
    return out.copy_(x.to(wide) + (y.to(wide) if gamma is None else gamma.to(wide) * y.to(wide)))


def add_scaled_and_normalise(
    x: Tensor, y: Tensor, gamma: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype, out: Tensor
) -> Tensor:
    """Put x + gamma y into out, as `add_scaled`, and return its rows normalised, as `layer_norm`, in `dtype`."""
    if (kernels := _kernels(x)) is not None:
        return kernels.add_scaled_and_normalise(
            x.contiguous(), y.contiguous(), gamma, norm.weight, norm.bias, norm.eps, dtype, out
        )
    return layer_norm(add_scaled(x, y, gamma, out), norm, dtype)


def gelu_(x: Tensor) -> Tensor:
    """Put x Phi(x), Phi the standard normal distribution, in the place of x, contiguous, and return it."""
    if (kernels := _kernels(x)) is not None:
        return kernels.gelu_(x)
    return x.copy_(F.gelu(x.to(_wide(x.dtype))))


def normalise_and_rotate_(
    qkv: Tensor,  # [B, N, 3, H, D]
    positions: Tensor | None,  # [B, N, 2]
    q_norm: nn.LayerNorm | None,
    k_norm: nn.LayerNorm | None,
    base: float | None,
    factor: float = 1.0,
) -> Tensor:
    """Normalise queries and keys over D and rotate them by their tokens' positions, in place; values stay.

    Rotary embedding in two dimensions, as VGGT and CroCo have it: the first half of D turns with the token's y, the
    second with its x; of each half, element i and element i + D / 4 form a pair that turns by `base ** (-4 i / D)` a
    step. All in float32 or better, rounded once.

    Args:
        qkv: Contiguous queries, keys and values `[B, N, 3, H, D]`, D a multiple of 4; with Triton D / 4 a power of 2.
        positions: Integer positions (y, x) of the tokens `[B, N, 2]`, or None to rotate nothing.
        q_norm: Normalises queries, or None.
        k_norm: Normalises keys, or None; None if q_norm is.
        base: Base of the frequencies; None if there are no positions.
        factor: By what queries are multiplied before they are rounded.

    Returns:
        qkv.
    """
    if (kernels := _kernels(qkv)) is not None:
        return kernels.normalise_and_rotate_(qkv, positions, q_norm, k_norm, base, factor)
    wide = _wide(qkv.dtype)
    for index, (norm, scale) in enumerate(((q_norm, factor), (k_norm, 1.0))):
        x = qkv[:, :, index].to(wide) if norm is None else layer_norm(qkv[:, :, index], norm, wide)
        if positions is not None:
            assert base is not None
            x = _rotated(x, positions, base)
        qkv[:, :, index] = (x * scale).to(qkv.dtype)
    return qkv


def convolve_relu(
    x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None
) -> Tensor:
    """Return max(0, conv(x) + bias + plus), by the strides, padding and groups of `conv`.

    Args:
        x: Maps `[N, C, H, W]`.
        conv: Says how to convolve, with zeros around the maps; its parameters are not read.
        weight: As that of `conv`, channels-last.
        bias: Of the outputs, or None.
        plus: What is added, `[N, C', H', W']`, or None.

    Returns:
        Maps `[N, C', H', W']`; channels-last, as is faster for all of these.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    plus = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
    if x.is_cuda and x.dtype != torch.float64 and torch.version.hip is None and torch.backends.cudnn.is_acceptable(x):
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if plus is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *how)  # type: ignore[arg-type]
        return torch.cudnn_convolution_add_relu(x, weight, plus, 1.0, bias, *how)  # type: ignore[arg-type]
    out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return (out if plus is None else out.add_(plus)).relu_()


def upsample(
    x: Tensor,  # [N, C, h, w]
    size: tuple[int, int],
    bias: Tensor,  # [C]
    plus: Tensor | None = None,  # [N, C, H, W]
    positions: tuple[Tensor, Tensor] | None = None,  # [W, C], [H, C]
) -> Tensor:
    """Return maps interpolated to another size, corners on corners, plus a bias and more; channels-last.

    Args:
        x: Maps.
        size: H and W.
        bias: Of the channels.
        plus: Maps to add, or None.
        positions: What to add to each column, and to each row; contiguous, or None.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    plus = None if plus is None else plus.contiguous(memory_format=torch.channels_last)
    if (kernels := _kernels(x)) is not None:
        return kernels.upsample(x, size, bias, plus, positions)
    out = F.interpolate(x, size, mode="bilinear", align_corners=True).add_(bias[:, None, None])
    if positions is not None:
        columns, rows = positions
        out.add_(columns.mT[:, None]).add_(rows.mT[:, :, None])
    return out if plus is None else out.add_(plus)


def predict(x: Tensor, weight: Tensor, bias: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the values of each pixel `[N, H, W, K]`, and its confidence `[N, H, W]`.

    Of y, the product of weight and pixel plus the bias, the last is the logarithm of the confidence less 1. The others
    are logarithms of the values, or if they are `signed`, log(1 + |value|) with the sign of the value.

    Args:
        x: Maps `[N, C, H, W]`.
        weight: `[K + 1, C, 1, 1]`, contiguous.
        bias: `[K + 1]`.
        signed: Whether values have a sign.
    """
    if (kernels := _kernels(x)) is not None:
        return kernels.predict(x.contiguous(memory_format=torch.channels_last), weight, bias, signed)
    made = F.conv2d(x, weight, bias).permute(0, 2, 3, 1)
    values, confidence = made[..., :-1], made[..., -1]
    return values.sign() * values.abs().expm1() if signed else values.exp(), 1 + confidence.exp()


@functools.lru_cache(maxsize=16)
def frequencies(base: float, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return by what angle each of `count` pairs of elements turns at one step, base ** (-i / count), `[count]`.

    Computed as upstream does, to the bit: at position 100 another rounding of a frequency is 100 of the angle.
    """
    return 1.0 / base ** (torch.arange(count, dtype=dtype, device=device) / count)


def _rotated(x: Tensor, positions: Tensor, base: float) -> Tensor:
    quarter = x.shape[-1] // 4
    frequency = frequencies(base, quarter, x.dtype, x.device)
    angle = positions[:, :, None, :, None].to(x.dtype) * frequency  # [B, N, 1, 2, D / 4]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.unflatten(-1, (2, 2, quarter)).unbind(-2)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -2).flatten(-3)


def set_up(device: torch.device) -> None:
    """Let Triton prepare itself to compile, once; it must not do so in several threads at a time."""
    if runs_triton(device):
        from . import ops_triton

        ops_triton.set_up()


def _kernels(x: Tensor) -> Any:
    """Return the module of Triton kernels where they can run on x, or None."""
    if not _by_triton(x):
        return None
    from . import ops_triton

    return ops_triton


def _by_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and runs_triton(x.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
