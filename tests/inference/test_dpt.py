"""DPT heads in few passes: their arithmetic against its formulas in float64, the heads against their own forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from doubles.dpt import ConvolutionalHead, Fusion, ResidualUnit, random_head
from live_bytes import Live
from tiers import every
from torch import Tensor, nn

from svggt_kernels.inference import dpt, memory, ops
from svggt_kernels.inference.heads import compared, run_fused
from svggt_kernels.inference.verification import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Arithmetic


@pytest.fixture(params=["torch", "triton"])
def kernels(request):
    if request.param == "torch":
        if DEVICE == "cuda":
            pytest.skip("on CUDA the kernels are Triton's")
        return ops
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
    every(
        2,
        [
            (20, (3, 4), (7, 11)),
            (64, (5, 7), (10, 14)),
            (6, (1, 2), (4, 1)),
            (256, (2, 9), (5, 19)),
            (8, (6, 5), (6, 3)),
        ],
    ),
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
        out = ops.convolve_relu(x, conv, conv.weight, conv.bias, plus)
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


# Heads


SPECIAL, DIM, PATCH = 5, 64, 9
Inputs = tuple[list[Tensor], Tensor, int]


def head(dtype: torch.dtype = torch.float32, **options: object) -> ConvolutionalHead:
    return random_head(dtype, **options).to(DEVICE)


def inputs(
    dtype: torch.dtype = torch.float32, samples: int = 1, frames: int = 3, grid: tuple[int, int] = (4, 5)
) -> Inputs:
    """Layer outputs, images and the first patch token."""
    generator = torch.Generator().manual_seed(1)
    layers = [
        torch.randn(samples, frames, SPECIAL + grid[0] * grid[1], DIM, generator=generator).to(DEVICE, dtype)
        for _ in range(4)
    ]
    return layers, torch.zeros(samples, frames, 3, PATCH * grid[0], PATCH * grid[1], device=DEVICE), SPECIAL


def fused(module: nn.Module, arguments: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return run_fused(module, *arguments)


def own(module: nn.Module, arguments: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return module(*arguments)


def exact(module: nn.Module, arguments: Inputs) -> tuple[Tensor, Tensor]:
    layers, *others = arguments
    return own(copy.deepcopy(module).double(), ([layer.double() for layer in layers], *others))


def distances(results: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> list[Tensor]:
    return [(result.double() - wide).norm() for result, wide in zip(results, reference, strict=True)]


def why_not(module: nn.Module, arguments: Inputs) -> str | None:
    """Return why a head must run as it is, or None."""
    return dpt.obstacle(module) or verify(module, run_fused, compared, arguments).reason


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("grid", [(1, 1), (4, 7)])
@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_fused_head_computes_what_its_forward_does(activation: str, grid, samples: int, frames: int):
    module, arguments = head(torch.float64, activation=activation), inputs(torch.float64, samples, frames, grid)
    for result, expected in zip(fused(module, arguments), own(module, arguments), strict=True):
        assert result.shape == expected.shape and result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{"pos_embed": False}, {"down_ratio": 2}, {"widths": (16, 4, 8, 12)}])
def test_heads_of_other_sizes(options: dict[str, object]):
    module, arguments = head(torch.float64, **options), inputs(torch.float64)
    torch.testing.assert_close(fused(module, arguments), own(module, arguments), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_fused_head_rounds_as_its_forward_does(activation: str):
    """On CUDA in TF32, as convolutions are there by default."""
    module, arguments = head(activation=activation), inputs(grid=(9, 7))
    reference = exact(module, arguments)
    theirs = distances(own(module, arguments), reference)
    ours = distances(fused(module, arguments), reference)
    assert all(our <= 2 * their for our, their in zip(ours, theirs, strict=True))
    assert why_not(module, arguments) is None


def test_maps_too_large_for_one_convolution_are_made_of_fewer_frames(monkeypatch: pytest.MonkeyPatch):
    module, arguments, counts = head(torch.float64), inputs(torch.float64, frames=5), []
    forward = dpt.ReadyHead._run

    def watched(self, tokens, *others):
        counts.append(len(tokens[0]))
        return forward(self, tokens, *others)

    monkeypatch.setattr(dpt.ReadyHead, "_run", watched)
    monkeypatch.setattr(dpt, "MOST_VALUES", 8 * (4 * PATCH) * (5 * PATCH) * 5 // 2)
    torch.testing.assert_close(fused(module, arguments), own(module, arguments), rtol=1e-11, atol=1e-11)
    assert counts == [2, 2, 1]


def test_a_fused_head_leaves_parameters_as_they_are():
    module = head()
    before = {name: (each.clone(), each.stride(), each.data_ptr()) for name, each in module.named_parameters()}
    fused(module, inputs())
    for name, each in module.named_parameters():
        values, stride, place = before[name]
        assert torch.equal(each, values) and each.stride() == stride and each.data_ptr() == place


def test_a_fused_head_holds_less_than_its_forward(monkeypatch: pytest.MonkeyPatch):
    """Of VGGT's size, without data: how many values are alive at once, with kernels that hold only their results."""

    def hold(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)

    def upsample(x: Tensor, size: tuple[int, int], *_: object, **__: object) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    monkeypatch.setattr(dpt, "convolve_relu", hold)
    monkeypatch.setattr(dpt, "upsample", upsample)
    with torch.device("meta"):
        module = ConvolutionalHead(2048, features=256, widths=(256, 512, 1024, 1024)).eval()
        layers = [torch.empty(1, 2, SPECIAL + 28 * 37, 2048) for _ in range(4)]
        images = torch.empty(1, 2, 3, 392, 518)
        tables = [(torch.empty(37, width), torch.empty(28, width)) for width in (256, 512, 1024, 1024)]
        ready = dpt.ReadyHead(module, [*tables, (torch.empty(518, 128), torch.empty(392, 128))], torch.float32)
    peaks = []
    for forward in (module, ready):
        live = Live([*module.parameters(), *layers, images])
        with torch.no_grad(), live:
            forward(layers, images, SPECIAL)
        peaks.append(live.peak / (2 * 392 * 518))
    assert peaks[1] < peaks[0] and peaks[1] < memory.BYTES_PER_PIXEL


# Other heads


def tf32(x: Tensor) -> Tensor:
    """Round to the 10 bits that tensor cores read of a float32."""
    return x if x.dtype != torch.float32 else ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolve as a GPU does in TF32."""
    for name in ("conv2d", "conv_transpose2d"):
        convolve = getattr(F, name)

        def by_tf32(x, weight, *arguments, convolve=convolve, **options):
            return convolve(tf32(x.contiguous()), tf32(weight.contiguous()), *arguments, **options)

        monkeypatch.setattr(F, name, by_tf32)


class AlmostTheSame(ConvolutionalHead):
    """Its fusions are 2 % larger than upstream's: more than TF32 rounds."""

    def scratch_forward(self, maps: list[Tensor]) -> Tensor:
        return 1.02 * super().scratch_forward(maps)


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA has TF32 itself")
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_head_is_verified_in_tf32_too_and_another_formula_told_apart(activation: str):
    for rows in (6, 7):
        arguments, module = inputs(grid=(rows, 7), frames=2), head(activation=activation)
        reference = exact(module, arguments)
        for error, whole in zip(distances(fused(module, arguments), reference), reference, strict=True):
            assert error > 50 * torch.finfo(torch.float32).eps * whole.norm()  # it is TF32
        assert why_not(module, arguments) is None
        module.__class__ = AlmostTheSame
        assert "something else" in why_not(module, arguments)


class KeepsItsInput(nn.Module):
    """A residual unit that adds x and not max(0, x)."""

    def __init__(self, unit: ResidualUnit) -> None:
        super().__init__()
        self.conv1, self.conv2, self.activation = unit.conv1, unit.conv2, unit.activation
        self.norm1 = self.norm2 = None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x.relu()).relu()) + x


class MixesFrames(ConvolutionalHead):
    def scratch_forward(self, maps: list[Tensor]) -> Tensor:
        out = super().scratch_forward(maps)
        return out - out.mean(0, keepdim=True)


class AlongTheDiagonal(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        pixels = torch.arange(x.shape[2], device=x.device)[:, None] * torch.arange(x.shape[3], device=x.device)
        return x + ratio * pixels


class Scales(ConvolutionalHead):
    def forward(self, aggregated_tokens_list, images, patch_start_idx, frames_chunk_size=4):
        values, confidence = super().forward(aggregated_tokens_list, images, patch_start_idx, frames_chunk_size)
        return 10 * values, confidence


def replace_units(module: ConvolutionalHead) -> None:
    for level in (1, 2, 3):
        block = fusion(module, level)
        block.resConfUnit1 = KeepsItsInput(block.resConfUnit1)


def of_class(kind: type) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "__class__", kind)


def fusion(module: ConvolutionalHead, level: int = 2) -> Fusion:
    return getattr(module.scratch, f"refinenet{level}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_units, "something else"),
        (of_class(MixesFrames), "something else"),
        (of_class(AlmostTheSame), "something else"),
        (of_class(Scales), "something else"),
        (of_class(AlongTheDiagonal), "no sum over their columns and rows"),
        (lambda m: setattr(m.scratch.layer2_rn, "padding_mode", "reflect"), "something else"),
        (lambda m: setattr(m.scratch.refinenet1, "out_conv", nn.Conv2d(16, 16, 3, padding=1)), "could not be compared"),
        (lambda m: setattr(m, "feature_only", True), "returns feature maps"),
        (lambda m: setattr(m, "activation", "linear"), "activation is 'linear', not 'exp' or 'inv_log'"),
        (lambda m: setattr(m, "conf_activation", "sigmoid"), "conf_activation is 'sigmoid', not 'expp1'"),
        (lambda m: setattr(m, "_forward_impl", m._forward_impl), "methods was replaced"),
        (lambda m: setattr(m, "norm", nn.Identity()), "norm is not LayerNorm"),
        (lambda m: setattr(m, "norm", nn.LayerNorm(DIM, elementwise_affine=False)), "norm is not LayerNorm"),
        (lambda m: delattr(m, "patch_size"), "does not say its patch_size"),
        (lambda m: delattr(m, "down_ratio"), "could not be compared"),
        (lambda m: setattr(m.projects[1], "bias", None), "could not be compared"),
        (lambda m: delattr(m.scratch, "layer1_rn"), "could not be compared"),
        (lambda m: setattr(fusion(m).resConfUnit1, "activation", nn.GELU()), "activation holds a GELU"),
        (lambda m: setattr(fusion(m).resConfUnit2, "norm1", nn.BatchNorm2d(16)), "norm1 holds weight, bias"),
    ],
)
def test_a_head_that_computes_something_else_is_told_apart(change: Callable[[nn.Module], None], reason: str):
    module = head()
    assert why_not(module, inputs()) is None
    change(module)
    assert reason in why_not(module.to(DEVICE).eval(), inputs())


def test_a_fused_head_that_gives_nan_is_not_verified(monkeypatch: pytest.MonkeyPatch):
    predict = dpt.predict

    def broken(x: Tensor, *others: object) -> tuple[Tensor, ...]:
        factor = float("nan") if x.dtype == torch.float32 else 1
        return tuple(factor * each for each in predict(x, *others))

    monkeypatch.setattr(dpt, "predict", broken)
    assert "something else" in why_not(head(), inputs())
    monkeypatch.undo()
    layers, *others = inputs()
    assert "not finite" in why_not(head(), ([math.nan * layer for layer in layers], *others))
