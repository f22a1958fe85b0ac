"""What blocks and heads compute beside their products, as Triton kernels; `ops` states each by its formula."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from .ops import frequencies

UPSAMPLED_AT_ONCE = 4096
"""Values of the output that one program makes, of pixels that lie side by side in a row."""


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which launches go to `device`; on the CPU there is only Triton's interpreter."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def set_up() -> None:
    """Let Triton compile and load what it calls the driver by."""
    triton.runtime.driver.active.get_current_device()


@triton.jit
def _normalised(values, weight, bias, eps, column, exists, C: tl.constexpr):
    mean = tl.sum(values) / C
    centred = tl.where(exists, values - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / C + eps)
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)
    return centred * inverse * w + b


# Counts differ from call to call, and no load or store is wider where one of them is a multiple of 16.
@triton.jit(do_not_specialize=["rows"])
def _layer_norm(
    x, weight, bias, out, eps, rows, group_stride, row_stride, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0)
    group, row = (place // rows).to(tl.int64), (place % rows).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < C
    values = tl.load(x + group * group_stride + row * row_stride + column, mask=exists, other=0.0).to(tl.float32)
    normed = _normalised(values, weight, bias, eps, column, exists, C)
    tl.store(out + place.to(tl.int64) * C + column, normed.to(out.dtype.element_ty), mask=exists)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `ops.layer_norm`."""
    C = x.shape[-1]
    groups = x if x.dim() == 3 else x.reshape(1, -1, C)
    if groups.stride(2) != 1:
        groups = groups.contiguous()
    rows = groups.shape[1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    with _current(x.device):
        _layer_norm[(len(groups) * rows,)](
            groups, weight, bias, out, eps, rows, groups.stride(0), groups.stride(1),
            C=C, BLOCK=triton.next_power_of_2(C), num_warps=4,
        )  # fmt: skip
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
    """See `ops.add_scaled`; x, y and out are contiguous."""
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
    """See `ops.add_scaled_and_normalise`; x, y and out are contiguous."""
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
    """See `ops.gelu_`; x is contiguous."""
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


@triton.jit(do_not_specialize=["tokens"])
def _queries_and_keys(
    qkv, positions, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, frequencies, factor, tokens,
    NORMALISE: tl.constexpr, ROTATE: tl.constexpr, H: tl.constexpr, QUARTER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 4 * QUARTER
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < tokens
    stride = 3 * H * D
    if ROTATE:
        frequency = tl.load(frequencies + tl.arange(0, QUARTER))
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
    """See `ops.normalise_and_rotate_`."""
    B, N, _, H, D = qkv.shape
    rows = 32
    norms = [(None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps) for norm in (q_norm, k_norm)]
    (q_weight, q_bias, q_eps), (k_weight, k_bias, k_eps) = norms
    table = None if base is None else frequencies(base, D // 4, torch.float32, qkv.device)
    with _current(qkv.device):
        _queries_and_keys[(triton.cdiv(B * N, rows),)](
            qkv, None if positions is None else positions.expand(B, N, 2).contiguous(),
            q_weight, q_bias, k_weight, k_bias, q_eps, k_eps, table, factor, B * N,
            NORMALISE=q_norm is not None, ROTATE=positions is not None, H=H, QUARTER=D // 4, ROWS=rows, num_warps=4,
        )  # fmt: skip
    return qkv


@triton.jit
def _between(place, scale, size):
    """Return the two source places that an output place lies between, and how near it is to the second."""
    position = place.to(tl.float32) * scale
    first = position.to(tl.int32)
    return first, tl.minimum(first + 1, size - 1), position - first.to(tl.float32)


@triton.jit
def _line(at, left, right, share, channel, exists, C: tl.constexpr):
    """Return a line of the source between its pixels."""
    a = tl.load(at + left[:, None] * C + channel, mask=exists, other=0.0)
    b = tl.load(at + right[:, None] * C + channel, mask=exists, other=0.0)
    return (1.0 - share)[:, None] * a + share[:, None] * b


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def _upsample(
    x, bias, plus, columns, rows, out, height, width, out_height, out_width, y_scale, x_scale,
    C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(out_width, PIXELS)
    line = tl.program_id(0) // parts
    frame, y = line // out_height, line % out_height
    column = tl.program_id(0) % parts * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    in_channel = channel < C
    exists = (column < out_width)[:, None] & in_channel
    top, bottom, down = _between(y, y_scale, height)
    left, right, share = _between(column, x_scale, width)
    first_line = frame.to(tl.int64) * height
    upper = _line(x + (first_line + top) * width * C, left, right, share, channel, exists, C)
    lower = _line(x + (first_line + bottom) * width * C, left, right, share, channel, exists, C)
    values = (1.0 - down) * upper + down * lower
    values += tl.load(bias + channel, mask=in_channel, other=0.0)
    at = column[:, None] * C + channel
    if columns is not None:
        values += tl.load(columns + at, mask=exists, other=0.0)
        values += tl.load(rows + y * C + channel, mask=in_channel, other=0.0)
    start = line.to(tl.int64) * out_width * C
    if plus is not None:
        values += tl.load(plus + start + at, mask=exists, other=0.0)
    tl.store(out + start + at, values, mask=exists)


def upsample(
    x: Tensor, size: tuple[int, int], bias: Tensor, plus: Tensor | None, positions: tuple[Tensor, Tensor] | None
) -> Tensor:
    """See `ops.upsample`; all maps are float32 and channels-last."""
    N, C, height, width = x.shape
    out = torch.empty((N, C, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    columns, rows = positions or (None, None)
    y_scale, x_scale = ((given - 1) / max(made - 1, 1) for given, made in zip((height, width), size, strict=True))
    block = triton.next_power_of_2(C)
    pixels = max(1, UPSAMPLED_AT_ONCE // block)
    with _current(x.device):
        _upsample[(N * size[0] * triton.cdiv(size[1], pixels),)](
            x, bias, plus, columns, rows, out, height, width, *size, y_scale, x_scale,
            C=C, BLOCK=block, PIXELS=pixels, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["n"])
def _predict(
    x, weight, bias, values, confidence, n,
    SIGNED: tl.constexpr, VALUES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, BLOCK)
    exists, in_channel = pixel < n, channel < C
    features = tl.load(x + pixel[:, None] * C + channel, mask=exists[:, None] & in_channel, other=0.0)
    for i in tl.static_range(VALUES + 1):
        w = tl.load(weight + i * C + channel, mask=in_channel, other=0.0)
        made = tl.sum(features * w, 1) + tl.load(bias + i)
        if i == VALUES:
            tl.store(confidence + pixel, 1.0 + tl.exp(made), mask=exists)
        else:
            if SIGNED:
                size = tl.abs(made)
                # exp(size) - 1, by its series where the difference would lose digits: to 1e-8 below 0.5.
                series = 1.0 + size / 8
                for k in tl.static_range(7, 1, -1):
                    series = 1.0 + size / k * series
                grown = tl.where(size < 0.5, size * series, tl.exp(size) - 1.0)
                made = tl.where(made < 0, -grown, grown)
            else:
                made = tl.exp(made)
            tl.store(values + pixel * VALUES + i, made, mask=exists)


def predict(x: Tensor, weight: Tensor, bias: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """See `ops.predict`; x is float32 and channels-last."""
    N, C, H, W = x.shape
    values = torch.empty((N, H, W, len(weight) - 1), dtype=x.dtype, device=x.device)
    confidence = torch.empty((N, H, W), dtype=x.dtype, device=x.device)
    block, n = triton.next_power_of_2(C), confidence.numel()
    pixels = max(1, 4096 // block)
    with _current(x.device):
        _predict[(triton.cdiv(n, pixels),)](
            x, weight, bias, values, confidence, n,
            SIGNED=signed, VALUES=len(weight) - 1, C=C, BLOCK=block, PIXELS=pixels, num_warps=8,
        )  # fmt: skip
    return values, confidence
