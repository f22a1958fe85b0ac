"""The elementwise work of a transformer block as Triton kernels; `arithmetic` states each by its formula."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which launches go to `device`; on the CPU there is only Triton's interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _normalised(values, weight, bias, eps, column, exists, C: tl.constexpr):
    mean = tl.sum(values) / C
    centred = tl.where(exists, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    return centred * inverse * w + b


@triton.jit
def _layer_norm(x, weight, bias, out, eps, row_stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < C
    values = tl.load(x + row * row_stride + column, mask=exists, other=0.0).to(tl.float32)
    normed = _normalised(values, weight, bias, eps, column, exists, C)
    tl.store(out + row * C + column, normed.to(out.dtype.element_ty), mask=exists)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `arithmetic.layer_norm`."""
    C = x.shape[-1]
    rows = x.reshape(-1, C)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    with _current(x.device):
        _layer_norm[(len(rows),)](
            rows, weight, bias, out, eps, rows.stride(0), C=C, BLOCK=triton.next_power_of_2(C), num_warps=4
        )
    return out


@triton.jit
def _sum(x, y, gamma, place, column, exists):
    addend = tl.load(y + place, mask=exists, other=0.0).to(tl.float32)
    if gamma is not None:
        addend *= tl.load(gamma + column, mask=exists, other=0.0).to(tl.float32)
    return tl.load(x + place, mask=exists, other=0.0).to(tl.float32) + addend


@triton.jit
def _add_scaled(x, y, gamma, out, n, C: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n
    total = _sum(x, y, gamma, place, place % C, exists)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


def add_scaled(x: Tensor, y: Tensor, gamma: Tensor | None, out: Tensor) -> Tensor:
    """See `arithmetic.add_scaled`; x, y and out are contiguous."""
    block = 4096
    with _current(x.device):
        _add_scaled[(triton.cdiv(x.numel(), block),)](
            x, y, gamma, out, x.numel(), C=x.shape[-1], BLOCK=block, num_warps=8
        )
    return out


@triton.jit
def _add_scaled_and_normalise(
    x, y, gamma, weight, bias, eps, out, normed, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    exists = column < C
    place = tl.program_id(0).to(tl.int64) * C + column
    total = _sum(x, y, gamma, place, column, exists).to(out.dtype.element_ty)
    tl.store(out + place, total, mask=exists)
    values = _normalised(total.to(tl.float32), weight, bias, eps, column, exists, C)
    tl.store(normed + place, values.to(normed.dtype.element_ty), mask=exists)


def add_scaled_and_normalise(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    out: Tensor,
) -> Tensor:
    """See `arithmetic.add_scaled_and_normalise`; x, y and out are contiguous."""
    C = x.shape[-1]
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    with _current(x.device):
        _add_scaled_and_normalise[(x.numel() // C,)](
            x, y, gamma, weight, bias, eps, out, normed, C=C, BLOCK=triton.next_power_of_2(C), num_warps=4
        )
    return normed


@triton.jit
def _gelu(x, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n
    values = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    size = tl.abs(values)
    # The normal distribution's tail beyond |x|, to 1e-7: Abramowitz and Stegun 7.1.26, fewer instructions than erf.
    t = 1.0 / (1.0 + 0.23164189 * size)
    tail = (((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796
    tail *= t * tl.exp2(-0.7213475204 * size * size)
    values = tl.maximum(values, 0.0) - tl.minimum(size, 64.0) * tail
    tl.store(x + place, values.to(x.dtype.element_ty), mask=exists)


def gelu_(x: Tensor) -> Tensor:
    """See `arithmetic.gelu_`; x is contiguous."""
    block = 4096
    with _current(x.device):
        _gelu[(triton.cdiv(x.numel(), block),)](x, x.numel(), BLOCK=block, num_warps=8)
    return x


@triton.jit
def _quarter(head, row, part: tl.constexpr, stride, exists, QUARTER: tl.constexpr):
    column = part * QUARTER + tl.arange(0, QUARTER)
    return head + row[:, None] * stride + column, exists[:, None]


@triton.jit
def _affine(x, mean, inverse, weight, bias, part: tl.constexpr, QUARTER: tl.constexpr):
    column = part * QUARTER + tl.arange(0, QUARTER)
    w = tl.load(weight + column).to(tl.float32)
    b = tl.load(bias + column).to(tl.float32)
    return (x - mean[:, None]) * inverse[:, None] * w + b


@triton.jit
def _queries_and_keys(
    qkv, positions, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, log2_base, factor, tokens,
    NORMALISE: tl.constexpr, ROTATE: tl.constexpr, H: tl.constexpr, QUARTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 4 * QUARTER
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < tokens
    stride = 3 * H * D
    if ROTATE:
        # Frequency i turns by base^(-i / QUARTER) a step.
        frequency = tl.exp2(tl.arange(0, QUARTER).to(tl.float32) * (-log2_base / QUARTER))
        y = tl.load(positions + 2 * row, mask=exists, other=0).to(tl.float32)[:, None] * frequency
        x = tl.load(positions + 2 * row + 1, mask=exists, other=0).to(tl.float32)[:, None] * frequency
        cos_y, sin_y, cos_x, sin_x = tl.cos(y), tl.sin(y), tl.cos(x), tl.sin(x)
    for i in range(2 * H):
        is_key = i >= H
        head = qkv + i * D
        scale = factor
        if is_key:
            scale = 1.0
        at0, mask = _quarter(head, row, 0, stride, exists, QUARTER)
        at1, mask = _quarter(head, row, 1, stride, exists, QUARTER)
        at2, mask = _quarter(head, row, 2, stride, exists, QUARTER)
        at3, mask = _quarter(head, row, 3, stride, exists, QUARTER)
        a = tl.load(at0, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at1, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at2, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(at3, mask=mask, other=0.0).to(tl.float32)
        if NORMALISE:
            weight = q_weight
            bias = q_bias
            eps = q_eps
            if is_key:
                weight = k_weight
                bias = k_bias
                eps = k_eps
            mean = tl.sum(a + b + c + d, 1) / D
            m = mean[:, None]
            squares = (a - m) * (a - m) + (b - m) * (b - m) + (c - m) * (c - m) + (d - m) * (d - m)
            inverse = 1.0 / tl.sqrt(tl.sum(squares, 1) / D + eps)
            a = _affine(a, mean, inverse, weight, bias, 0, QUARTER)
            b = _affine(b, mean, inverse, weight, bias, 1, QUARTER)
            c = _affine(c, mean, inverse, weight, bias, 2, QUARTER)
            d = _affine(d, mean, inverse, weight, bias, 3, QUARTER)
        if ROTATE:
            a, b = a * cos_y - b * sin_y, b * cos_y + a * sin_y
            c, d = c * cos_x - d * sin_x, d * cos_x + c * sin_x
        kind = qkv.dtype.element_ty
        tl.store(at0, (a * scale).to(kind), mask=mask)
        tl.store(at1, (b * scale).to(kind), mask=mask)
        tl.store(at2, (c * scale).to(kind), mask=mask)
        tl.store(at3, (d * scale).to(kind), mask=mask)


def normalise_and_rotate_(
    qkv: Tensor,
    positions: Tensor | None,
    q_norm: nn.LayerNorm | None,
    k_norm: nn.LayerNorm | None,
    base: float | None,
    factor: float,
) -> Tensor:
    """See `arithmetic.normalise_and_rotate_`."""
    B, N, _, H, D = qkv.shape
    rows = 32
    norms = [(None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps) for norm in (q_norm, k_norm)]
    (q_weight, q_bias, q_eps), (k_weight, k_bias, k_eps) = norms
    with _current(qkv.device):
        _queries_and_keys[(triton.cdiv(B * N, rows),)](
            qkv, None if positions is None else positions.expand(B, N, 2).contiguous(),
            q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, 0.0 if base is None else math.log2(base), factor, B * N,
            NORMALISE=q_norm is not None, ROTATE=positions is not None, H=H, QUARTER=D // 4, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return qkv
