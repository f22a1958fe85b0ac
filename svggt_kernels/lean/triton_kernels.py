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
def _layer_norm(x, weight, bias, out, eps, row_stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < C
    values = tl.load(x + row * row_stride + column, mask=exists, other=0.0).to(tl.float32)
    mean = tl.sum(values) / C
    centred = tl.where(exists, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row * C + column, (centred * inverse * w + b).to(out.dtype.element_ty), mask=exists)


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
def _add_scaled(x, y, gamma, out, n, C: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n
    g = tl.load(gamma + place % C, mask=exists, other=0.0).to(tl.float32)
    total = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    total += g * tl.load(y + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=exists)


def add_scaled(x: Tensor, y: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """See `arithmetic.add_scaled`; x, y and out are contiguous."""
    block = 4096
    with _current(x.device):
        _add_scaled[(triton.cdiv(x.numel(), block),)](
            x, y, gamma, out, x.numel(), C=x.shape[-1], BLOCK=block, num_warps=8
        )
    return out


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
    H: tl.constexpr, QUARTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 4 * QUARTER
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < tokens
    stride = 3 * H * D
    # Frequency i turns by base^(-i / QUARTER) a step.
    frequency = tl.exp2(tl.arange(0, QUARTER).to(tl.float32) * (-log2_base / QUARTER))
    y = tl.load(positions + 2 * row, mask=exists, other=0).to(tl.float32)[:, None] * frequency
    x = tl.load(positions + 2 * row + 1, mask=exists, other=0).to(tl.float32)[:, None] * frequency
    cos_y, sin_y, cos_x, sin_x = tl.cos(y), tl.sin(y), tl.cos(x), tl.sin(x)
    for i in range(2 * H):
        is_key = i >= H
        head = qkv + i * D
        weight = q_weight
        bias = q_bias
        eps = q_eps
        scale = factor
        if is_key:
            weight = k_weight
            bias = k_bias
            eps = k_eps
            scale = 1.0
        at0, mask = _quarter(head, row, 0, stride, exists, QUARTER)
        at1, mask = _quarter(head, row, 1, stride, exists, QUARTER)
        at2, mask = _quarter(head, row, 2, stride, exists, QUARTER)
        at3, mask = _quarter(head, row, 3, stride, exists, QUARTER)
        a = tl.load(at0, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at1, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at2, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(at3, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(a + b + c + d, 1) / D
        m = mean[:, None]
        squares = (a - m) * (a - m) + (b - m) * (b - m) + (c - m) * (c - m) + (d - m) * (d - m)
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 1) / D + eps)
        a = _affine(a, mean, inverse, weight, bias, 0, QUARTER)
        b = _affine(b, mean, inverse, weight, bias, 1, QUARTER)
        c = _affine(c, mean, inverse, weight, bias, 2, QUARTER)
        d = _affine(d, mean, inverse, weight, bias, 3, QUARTER)
        kind = qkv.dtype.element_ty
        tl.store(at0, ((a * cos_y - b * sin_y) * scale).to(kind), mask=mask)
        tl.store(at1, ((b * cos_y + a * sin_y) * scale).to(kind), mask=mask)
        tl.store(at2, ((c * cos_x - d * sin_x) * scale).to(kind), mask=mask)
        tl.store(at3, ((d * cos_x + c * sin_x) * scale).to(kind), mask=mask)


def normalise_and_rotate_(
    qkv: Tensor,
    positions: Tensor,
    q_norm: nn.LayerNorm,
    k_norm: nn.LayerNorm,
    base: float,
    factor: float,
) -> Tensor:
    """See `arithmetic.normalise_and_rotate_`."""
    B, N, _, H, D = qkv.shape
    rows = 32
    with _current(qkv.device):
        _queries_and_keys[(triton.cdiv(B * N, rows),)](
            qkv, positions, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps, k_norm.eps,
            math.log2(base), factor, B * N, H=H, QUARTER=D // 4, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return qkv
