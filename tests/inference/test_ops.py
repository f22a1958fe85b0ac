"""What blocks and heads compute beside their products, against its formulas in float64."""

from __future__ import annotations

import math
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svggt_kernels import packages
from svggt_kernels.inference import ops

HAS_TRITON = find_spec("triton") is not None
BASE = 100.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def norm(size: int) -> nn.LayerNorm:
    layer = nn.LayerNorm(size)
    with torch.no_grad():
        layer.weight.normal_(1.0, 0.3)
        layer.bias.normal_(0.0, 0.3)
    return layer.requires_grad_(False).to(DEVICE)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding in two dimensions as a complex product, float64; x `[B, N, H, D]`."""
    quarter = x.shape[-1] // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64, device=x.device) / quarter)
    angles = positions[:, :, None, :, None].double() * frequency
    turns = torch.polar(torch.ones_like(angles), angles)
    real, imaginary = x.double().unflatten(-1, (2, 2, quarter)).unbind(-2)
    z = torch.complex(real, imaginary) * turns
    return torch.stack([z.real, z.imag], -2).flatten(-3)


@pytest.fixture(params=["torch", "triton"])
def kind(request) -> str:
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    if request.param == "torch" and DEVICE == "cuda":
        pytest.skip("on CUDA the kernels are Triton's")
    return request.param


def implementation(kind: str, name: str, dtype: torch.dtype):
    if kind == "torch":
        return getattr(ops, name)
    from svggt_kernels.inference import ops_triton as triton_kernels

    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 and does not round")
    return getattr(triton_kernels, name)


def rounded_once(actual: Tensor, exact: Tensor) -> None:
    """Assert that `actual` is `exact` rounded to its dtype, give or take float32's error before."""
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - exact).abs()
    assert bool((error <= 0.51 * eps * exact.abs() + 2e-6 * exact.abs().max()).all())


@pytest.mark.parametrize("kinds", ["normalised and rotated", "normalised", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_keys_are_normalised_rotated_and_rounded_once(kind: str, dtype: torch.dtype, kinds: str):
    function = implementation(kind, "normalise_and_rotate_", dtype)
    torch.manual_seed(0)
    B, N, H, D = 2, 37, 3, 64
    qkv = torch.randn(B, N, 3, H, D).to(DEVICE, dtype)
    before, positions = qkv.clone(), torch.randint(0, 40, (B, N, 2), device=DEVICE)
    q_norm, k_norm = (norm(D), norm(D)) if "normalised" in kinds else (None, None)
    at, base = (positions, BASE) if "rotated" in kinds else (None, None)
    factor = D**-0.5 / math.log(2)
    assert function(qkv, at, q_norm, k_norm, base, factor) is qkv
    for index, layer, scale in ((0, q_norm, factor), (1, k_norm, 1.0)):
        exact = before[:, :, index].double()
        if layer is not None:
            exact = F.layer_norm(exact, (D,), layer.weight.double(), layer.bias.double(), layer.eps)
        if base is not None:
            exact = rotated(exact, positions)
        rounded_once(qkv[:, :, index], exact * scale)
    assert torch.equal(qkv[:, :, 2], before[:, :, 2])


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_takes_any_strides(kind: str, dtype: torch.dtype, into: torch.dtype):
    torch.manual_seed(0)
    layer = norm(96)
    function = implementation(kind, "layer_norm", into)
    wide = torch.randn(2, 96, 12).to(DEVICE, dtype)
    for x in (wide.mT, wide[0].mT, torch.randn(2, 12, 192).to(DEVICE, dtype)[..., ::2]):
        assert x.stride(-1) != 1
        out = function(x, layer.weight, layer.bias, layer.eps, into) if kind == "triton" else function(x, layer, into)
        rounded_once(out, F.layer_norm(x.double(), (96,), layer.weight.double(), layer.bias.double(), layer.eps))


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_rounded_once(kind: str, dtype: torch.dtype, into: torch.dtype):
    torch.manual_seed(0)
    x, layer = torch.randn(3, 5, 96).to(DEVICE, dtype) * 3 + 2, norm(96)
    function = implementation(kind, "layer_norm", into)
    out = function(x, layer.weight, layer.bias, layer.eps, into) if kind == "triton" else function(x, layer, into)
    assert out.dtype == into
    rounded_once(out, F.layer_norm(x.double(), (96,), layer.weight.double(), layer.bias.double(), layer.eps))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_sum_is_rounded_once(kind: str, dtype: torch.dtype, scaled: bool, in_place: bool):
    function = implementation(kind, "add_scaled", dtype)
    torch.manual_seed(0)
    x, y = torch.randn(2, 700, 64).to(DEVICE, dtype), torch.randn(2, 700, 64).to(DEVICE, torch.bfloat16)
    gamma = torch.randn(64, device=DEVICE) if scaled else None
    exact = x.double() + y.double() * (1 if gamma is None else gamma.double())
    out = function(x, y, gamma, x if in_place else torch.empty_like(x))
    assert (out is x) == in_place
    rounded_once(out, exact)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_sum_and_its_norm_are_each_rounded_once(kind: str, dtype: torch.dtype, into: torch.dtype, scaled: bool):
    function = implementation(kind, "add_scaled_and_normalise", dtype)
    implementation(kind, "add_scaled_and_normalise", into)
    torch.manual_seed(0)
    x, y = torch.randn(70, 96).to(DEVICE, dtype), torch.randn(70, 96).to(DEVICE, torch.float16)
    gamma, layer, out = torch.randn(96, device=DEVICE) if scaled else None, norm(96), torch.empty_like(x)
    exact = x.double() + y.double() * (1 if gamma is None else gamma.double())
    given = (layer.weight, layer.bias, layer.eps) if kind == "triton" else (layer,)
    normed = function(x, y, gamma, *given, into, out)
    rounded_once(out, exact)
    assert normed.dtype == into
    rounded_once(normed, F.layer_norm(out.double(), (96,), layer.weight.double(), layer.bias.double(), layer.eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gelu_is_the_exact_one_rounded_once(kind: str, dtype: torch.dtype):
    function = implementation(kind, "gelu_", dtype)
    x = torch.linspace(-6, 6, 7001, device=DEVICE).to(dtype)
    exact = x.double() * torch.special.erfc(-x.double() / math.sqrt(2)) / 2
    assert function(x) is x
    rounded_once(x, exact)
    tanh = F.gelu(torch.linspace(-6, 6, 7001, device=DEVICE).to(dtype).double(), approximate="tanh")
    with pytest.raises(AssertionError):
        rounded_once(x, tanh)
    ends = torch.tensor([-65504.0, 65504.0, -0.0], device=DEVICE).to(dtype)
    assert torch.equal(function(ends.clone()), ends.clamp(min=0))
    assert function(torch.full((3,), math.nan, device=DEVICE, dtype=dtype)).isnan().all()
    if kind == "triton":  # PyTorch promises nothing of infinities
        ends = torch.tensor([-math.inf, math.inf], device=DEVICE, dtype=dtype)
        assert torch.equal(function(ends.clone()), ends.clamp(min=0))


@pytest.mark.parametrize(
    ("capability", "hip", "runs"),
    [((7, 0), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 4), "6", False)],
)
def test_triton_kernels_run_on_gpus_that_have_them(capability, hip, runs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packages.runs_triton.__wrapped__(torch.device("cuda", 0)) is runs
