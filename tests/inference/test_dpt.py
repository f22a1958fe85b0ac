"""The arithmetic of lean DPT heads, PyTorch's and Triton's, against its formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svggt_kernels.inference import ops as arithmetic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    if request.param == "torch":
        if DEVICE == "cuda":
            pytest.skip("on CUDA the kernels are Triton's")
        return arithmetic
    pytest.importorskip("triton", reason="triton is not installed")
    from svggt_kernels.inference import ops_triton as triton_kernels

    return triton_kernels


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)


def interpolated(x: Tensor, size: int, dim: int) -> Tensor:
    """Linear interpolation over one dimension, corners on corners, in float64."""
    places = torch.linspace(0, x.shape[dim] - 1, size, dtype=torch.float64, device=x.device)
    first = places.floor().long().clamp(max=x.shape[dim] - 1)
    second = (first + 1).clamp(max=x.shape[dim] - 1)
    shape = [1] * x.dim()
    shape[dim] = -1
    share = (places - first).reshape(shape)
    return x.double().index_select(dim, first) * (1 - share) + x.double().index_select(dim, second) * share


@pytest.mark.parametrize("more", ["nothing", "plus", "positions"])
@pytest.mark.parametrize(
    ("channels", "small", "large"),
    [(64, (5, 7), (10, 14)), (20, (3, 4), (7, 11)), (6, (1, 2), (4, 1)), (256, (2, 9), (5, 19)), (8, (6, 5), (6, 3))],
)
def test_upsampling_is_bilinear_plus_all_that_is_added(kernels, channels: int, small, large, more: str):
    x, bias = maps(3, channels, *small), torch.randn(channels, device=DEVICE)
    plus = maps(3, channels, *large) if more == "plus" else None
    columns, rows = (torch.randn(length, channels, device=DEVICE) for length in reversed(large))
    out = kernels.upsample(x, large, bias, plus, (columns, rows) if more == "positions" else None)
    exact = interpolated(interpolated(x, large[0], 2), large[1], 3) + bias.double()[:, None, None]
    if plus is not None:
        exact += plus
    if more == "positions":
        exact += columns.double().mT[:, None] + rows.double().mT[:, :, None]
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=4e-6)


def test_upsampling_of_long_sides_is_off_by_no_more_than_places_in_float32_are(kernels):
    x = maps(1, 8, 3, 150)
    out = kernels.upsample(x, (4, 521), torch.zeros(8, device=DEVICE), None, None)
    exact = interpolated(interpolated(x, 4, 2), 521, 3)
    steepest = (x[..., 1:] - x[..., :-1]).abs().max()
    places = 150 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=float(places * steepest) + 1e-6)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("channels", "made"), [(32, 4), (8, 2), (12, 3)])
def test_predictions_are_the_formulas(kernels, channels: int, made: int, signed: bool):
    x, bias = maps(2, channels, 9, 37), torch.randn(made, device=DEVICE)
    weight = torch.randn(made, channels, 1, 1, device=DEVICE) * channels**-0.5
    values, confidence = kernels.predict(x, weight, bias, signed)
    y = torch.einsum("nchw,oc->nhwo", x.double(), weight[:, :, 0, 0].double()) + bias.double()
    exact = y.sign() * (y.abs().exp() - 1) if signed else y.exp()
    assert values.shape == (2, 9, 37, made - 1) and confidence.shape == (2, 9, 37)
    torch.testing.assert_close(values.double(), exact[..., :-1], rtol=4e-6, atol=4e-6)
    torch.testing.assert_close(confidence.double(), 1 + y[..., -1].exp(), rtol=4e-6, atol=0)


def test_values_near_zero_keep_their_digits(kernels):
    y = torch.cat([torch.logspace(-30, 4, 1200, base=2), torch.tensor([0.0, 0.4999, 0.5, 0.5001, math.nan])])
    y = torch.cat([y, -y]).to(DEVICE)
    x, weight = y[None, None, None], torch.tensor([1.0, 0.0], device=DEVICE)[:, None, None, None]
    values, _ = kernels.predict(
        x.contiguous(memory_format=torch.channels_last), weight, torch.zeros(2, device=DEVICE), True
    )
    exact = y.double().sign() * y.double().abs().expm1()
    torch.testing.assert_close(values[0, 0, :, 0].double(), exact, rtol=5e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("added", [False, True])
def test_convolutions_end_with_their_sum_and_relu(added: bool):
    conv = nn.Conv2d(6, 8, 3, padding=1, stride=2).to(DEVICE).requires_grad_(False)
    x, plus = maps(2, 6, 7, 9), maps(2, 8, 4, 5) if added else None
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), 2, 1)
    exact = (exact if plus is None else exact + plus).relu()
    before = None if plus is None else plus.clone()
    with torch.backends.cudnn.flags(allow_tf32=False):
        out = arithmetic.convolve_relu(x, conv, conv.weight, conv.bias, plus)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    assert plus is None or torch.equal(plus, before)


@pytest.mark.parametrize("start", [0, 3])
def test_some_tokens_of_each_frame_are_normalised_where_they_lie(start: int):
    triton_kernels = pytest.importorskip("svggt_kernels.inference.ops_triton", reason="triton is not installed")
    tokens, (weight, bias) = torch.randn(3, 8, 40, device=DEVICE), torch.randn(2, 40, device=DEVICE)
    for x in (tokens[:, start:], tokens[1, start:], tokens[:, :, ::2]):
        size = x.shape[-1]
        out = triton_kernels.layer_norm(x, weight[:size], bias[:size], 1e-5, torch.float32)
        exact = F.layer_norm(x.double(), (size,), weight[:size].double(), bias[:size].double(), 1e-5)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
