"""The lean blocks: their arithmetic against its formulas, and doubles of VGGT run lean against themselves."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from doubles.vggt import VGGT, Aggregator, Attention
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels.demo.toy import ToyMultiViewTransformer
from svggt_kernels.inference import (
    blocks,
    memory,
    proof,
    within_frames,
)
from svggt_kernels.inference import (
    ops as arithmetic,
)

HAS_TRITON = arithmetic._HAS_TRITON
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
        return getattr(arithmetic, name)
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
    wide = torch.randn(6, 96, 192).to(DEVICE, dtype)
    for x in (wide.mT, wide[0].mT, wide[..., ::2]):
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


# The model


IMAGES = torch.rand(1, 6, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def model() -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval()


def outputs(network: nn.Module, **options: object) -> tuple[dict[str, Tensor], svggt_kernels.Patch]:
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", **options) as handle:
        return network(IMAGES), handle


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("keep", ["read", "all"])
def test_full_graph_is_the_unpatched_model(keep: str, cast: bool):
    network = model()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(IMAGES.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            plain = network(IMAGES)
            lean, handle = outputs(network, outputs=keep)
            again = network(IMAGES)
    report = handle.report()
    assert report.lean_blocks == 8 and report.not_lean == {}
    assert report.layers_kept == ((1, 3) if keep == "read" else None)
    for name, expected in exact.items():
        allowed = (plain[name].double() - expected).norm()
        assert (lean[name].double() - expected).norm() <= 2 * allowed, name
        assert torch.equal(again[name], plain[name]), name


class CroCoRotary(nn.Module):
    """VGGT's rotary embedding under the names of CroCo, which pi3 has."""

    def __init__(self, base: float = BASE, F0: float = 1.0) -> None:
        super().__init__()
        self.base, self.F0 = base, F0

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotated(x.transpose(1, 2), self.F0 * positions).transpose(1, 2).to(x.dtype)


def shaped(shape: str) -> VGGT:
    """A model whose blocks have another shape than VGGT's."""
    network = model()
    for block in (*network.aggregator.frame_blocks, *network.aggregator.global_blocks):
        if shape == "rotated, not normalised":  # pi3's heads
            block.attn.q_norm = block.attn.k_norm = nn.Identity()
        elif shape == "named as CroCo's":  # pi3
            block.attn.rope = CroCoRotary()
        elif shape == "no LayerScale":  # UniCeption
            block.ls1 = block.ls2 = nn.Identity()
        else:
            block.mlp = nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 128))
    return network.eval()


@pytest.mark.parametrize("at_once", [None, 7])
@pytest.mark.parametrize("shape", ["rotated, not normalised", "named as CroCo's", "no LayerScale", "another MLP"])
def test_blocks_of_other_shapes_run_lean(shape: str, at_once: int | None, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(memory, "TOKENS_AT_ONCE", at_once)
    network = shaped(shape)
    with torch.no_grad():
        plain = network(IMAGES)
    lean, handle = outputs(network)
    assert handle.report().lean_blocks == 8 and handle.report().not_lean == {}
    torch.testing.assert_close(lean, plain)


def test_a_rotary_embedding_of_another_formula_is_told_apart():
    network = model()
    for block in network.aggregator.frame_blocks:
        block.attn.rope = CroCoRotary(F0=2.0)
    for block in network.aggregator.global_blocks:
        block.attn.rope = CroCoRotary()
    network.eval()
    with torch.no_grad():
        plain = network(IMAGES)
    lean, handle = outputs(network)
    # No other block of their kind attends within frames: global blocks are proved by themselves.
    assert handle.report().lean_blocks == 4
    assert "no base_frequency" in handle.report().not_lean["Block"]
    torch.testing.assert_close(lean, plain)


class GlobalFirst(Aggregator):
    def _process_frame_attention(self, tokens, B, S, P, C, frame_idx, pos=None):
        if frame_idx == 0:
            self.global_blocks[0](tokens.reshape(B, S * P, C), pos=pos.reshape(B, S * P, 2))
        return super()._process_frame_attention(tokens, B, S, P, C, frame_idx, pos)


def test_a_global_block_may_come_first():
    network = model()
    network.aggregator.__class__ = GlobalFirst
    for _ in range(2):
        _, handle = outputs(network)
        assert handle.report().lean_blocks == 8


def faster_from(monkeypatch, backend: str, fewest: int) -> None:
    """Let a backend be faster than PyTorch's attention within frames from that many tokens on."""
    module = svggt_kernels.backends.load(backend)
    monkeypatch.setattr(module, "TRAITS", dataclasses.replace(module.TRAITS, beats_dense_from=fewest))


def test_frames_attend_by_pytorch_where_hopper_cannot_run():
    _, handle = outputs(model())
    assert handle.report().within_frames == ("pytorch",)
    assert "attention within frames by pytorch" in str(handle.report())


@pytest.mark.parametrize(
    ("backend", "fewest", "runs"), [(None, 66, True), (None, 67, False), ("reference", 66, True), ("cpu", 66, False)]
)
def test_frames_attend_by_the_operator_where_the_faster_backend_runs(
    monkeypatch, backend: str | None, fewest: int, runs: bool
):
    """The reference backend stands in for Hopper's, which needs its GPU; six frames have 66 tokens."""
    if backend == "cpu" and svggt_kernels.backends.load("cpu").unsupported(torch.device("cpu"), torch.float32, 64):
        pytest.skip("the CPU kernels are not built")
    network, layouts = model(), []
    plain, _ = outputs(network)

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: svggt_kernels.BlockLayout, **options: object) -> Tensor:
        layouts.append(layout)
        return svggt_kernels.block_sparse_attention(q, k, v, layout, **options)

    faster_from(monkeypatch, "reference", fewest)
    monkeypatch.setattr(within_frames, "block_sparse_attention", attention)
    lean, handle = outputs(network, backend=backend)
    assert handle.report().within_frames == (("reference",) if runs else ("pytorch",))
    assert len(layouts) == (4 if runs else 0)
    assert all(layout is layouts[0] and layout.num_tokens == 11 for layout in layouts)
    torch.testing.assert_close(lean, plain)


@pytest.mark.gpu
def test_frames_attend_by_hopper_within_the_error_of_bf16(monkeypatch):
    faster_from(monkeypatch, "hopper", 0)
    network = model().cuda()
    device, images = torch.device("cuda"), IMAGES.cuda()
    if (reason := svggt_kernels.backends.load("hopper").unsupported(device, torch.bfloat16, 64)) is not None:
        pytest.skip(reason)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(images.double())
        with torch.autocast("cuda", torch.bfloat16), svggt_kernels.patch(network, covisibility="all") as handle:
            lean = network(images)
        with torch.autocast("cuda", torch.bfloat16):
            plain = network(images)
    assert handle.report().within_frames == ("hopper",)
    for name, expected in exact.items():
        assert (lean[name].double() - expected).norm() <= 2 * (plain[name].double() - expected).norm(), name


def test_bf16_residuals_and_outputs_stay_near():
    network = model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = network(IMAGES)
        lean, _ = outputs(network, precision="bf16")
    for name, expected in plain.items():
        assert lean[name].dtype == expected.dtype
        assert (lean[name] - expected).norm() <= 0.05 * expected.norm(), name


def test_a_layer_that_was_not_kept_says_so():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all"):
        layers, _ = network.aggregator(IMAGES)
        assert len(layers) == 4 and layers[1].shape == layers[3].shape
        with pytest.raises(RuntimeError, match=r'layer 2 was not kept.*outputs="all"'):
            layers[2][:, :, 5:]
        for parts in ((0, 1), (1, 0), (1, 2)):
            with pytest.raises(RuntimeError, match=f"layer {2 if 2 in parts else 0} was not kept"):
                torch.cat([layers[part] for part in parts])
            with pytest.raises(RuntimeError, match="was not kept"):
                torch.add(*(layers[part] for part in parts))
        with pytest.raises(RuntimeError, match="was not kept"):
            torch.stack(tensors=[layers[0], layers[2]])
    with torch.no_grad(), svggt_kernels.patch(network.aggregator, covisibility="all"):
        assert all(isinstance(layer, Tensor) for layer in network.aggregator(IMAGES)[0])


def test_gradients_hooks_and_training_run_the_blocks_as_they_are():
    network = model()
    with svggt_kernels.patch(network, covisibility="all") as handle:
        network(IMAGES)["pose"].sum().backward()
        assert handle.report().lean_blocks == 0
        seen = []
        hook = network.aggregator.global_blocks[0].norm1.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            network(IMAGES)
        assert seen == [1] and handle.report().lean_blocks == 7
        hook.remove()
        norm2 = network.aggregator.frame_blocks[0].norm2
        norm2.forward = lambda x: seen.append(2) or nn.LayerNorm.forward(norm2, x)
        with torch.no_grad():
            network(IMAGES)
        assert seen == [1, 2] and handle.report().lean_blocks == 7


@pytest.mark.parametrize("inside", ["attn.qkv", "mlp", "mlp.act", "attn.proj"])
def test_a_hook_sees_what_it_sees_without_a_patch(inside: str):
    network, seen = model(), []
    for block in network.aggregator.global_blocks:
        block.get_submodule(inside).register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        network(IMAGES)
        with svggt_kernels.patch(network, covisibility="all") as handle:
            network(IMAGES)
    assert handle.report().lean_blocks == 4 and len(seen) == 8
    for plain, patched in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(patched, plain)


class CallsByKeywords(Aggregator):
    def _process_frame_attention(self, tokens, B, S, P, C, frame_idx, pos=None):
        tokens = self.frame_blocks[frame_idx](pos=pos, x=tokens.reshape(B * S, P, C))
        return tokens, frame_idx + 1, [tokens.view(B, S, P, C)]


def test_blocks_may_be_called_by_keywords_in_any_order():
    network = model()
    with torch.no_grad():
        plain = network(IMAGES)
    network.aggregator.__class__ = CallsByKeywords
    lean, handle = outputs(network)
    assert handle.report().lean_blocks == 8
    torch.testing.assert_close(lean, plain)


def test_graphs_of_tokens_are_the_same_with_lean_blocks():
    network = model()
    covisibility = svggt_kernels.TokenSimilarity(neighbours=2)
    graphs = []
    for options in ({"lean": False}, {}, {"precision": "bf16"}):
        with torch.no_grad(), svggt_kernels.patch(network, covisibility=covisibility, **options) as handle:
            network(IMAGES)
            graphs.append(handle.graph.to_dense())
    assert torch.equal(graphs[0], graphs[1]) and torch.equal(graphs[0], graphs[2])
    assert 0 < graphs[0].float().mean() < 1


def test_tokens_that_are_not_finite_prove_nothing():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        assert network(torch.full_like(IMAGES, math.nan))["pose"].isnan().all()
        assert handle.report().lean_blocks == 0
        assert handle.report().not_lean == {"Block": proof.UNFINISHED}
        network(IMAGES)
        assert handle.report().lean_blocks == 8 and handle.report().not_lean == {}


class Twisted(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q.flip(-1), k, v)


def test_a_block_that_computes_something_else_runs_as_it_is():
    network = model()
    for block in (*network.aggregator.frame_blocks, *network.aggregator.global_blocks):
        block.attn.__class__ = Twisted
    with torch.no_grad():
        plain = network(IMAGES)
    lean, handle = outputs(network)
    assert handle.report().lean_blocks == 0
    assert "something else" in handle.report().not_lean["Block"]
    torch.testing.assert_close(lean, plain)


@pytest.mark.parametrize("kind", ["frame_blocks", "global_blocks"])
def test_a_forward_that_others_put_on_a_block_still_runs(kind: str):
    """On the third block, so that the first proves the rest."""
    network, calls = model(), []
    block = getattr(network.aggregator, kind)[2]

    def wrapped(*args: object, **kwargs: object) -> Tensor:
        calls.append(1)
        return 1.5 * type(block).forward(block, *args, **kwargs)

    block.forward = wrapped
    with torch.no_grad():
        plain = network(IMAGES)
    lean, handle = outputs(network)
    assert len(calls) == 2 and handle.report().lean_blocks == 7
    torch.testing.assert_close(lean, plain)


class SlightlyMore(nn.Module):
    """An MLP whose output is 2 % larger than upstream's: more than float32 rounds, and less than bfloat16 may."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return 1.02 * self.fc2(self.act(self.fc1(x)))


class LessTheMean(nn.Linear):
    """An MLP that mixes the tokens of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


def test_what_bfloat16_lets_pass_does_not_pass_float32():
    network = model()
    for block in (*network.aggregator.frame_blocks, *network.aggregator.global_blocks):
        block.mlp = SlightlyMore(block.mlp)
    with torch.no_grad():
        plain = network(IMAGES)
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        with torch.autocast("cpu", torch.bfloat16):
            network(IMAGES)
        lean = network(IMAGES)
        assert handle.report().lean_blocks == 0
    torch.testing.assert_close(lean, plain)


def test_an_mlp_that_mixes_tokens_is_told_apart():
    network = model()
    for block in (*network.aggregator.frame_blocks, *network.aggregator.global_blocks):
        block.mlp = LessTheMean(128, 128)
    network.eval()
    with torch.no_grad():
        plain = network(IMAGES)
    lean, handle = outputs(network)
    assert handle.report().lean_blocks == 0
    torch.testing.assert_close(lean, plain)


def test_without_lean_nothing_but_attention_changes():
    network = model()
    _, handle = outputs(network, lean=False)
    assert handle.report().lean_blocks == 0 and handle.report().layers_kept is None
    with pytest.raises(ValueError, match="leave lean=True"):
        svggt_kernels.patch(network, precision="bf16", lean=False)
    with pytest.raises(ValueError, match=r"has none .Block: "):
        svggt_kernels.patch(ToyMultiViewTransformer.create(), covisibility="all", precision="bf16")
    with pytest.raises(ValueError, match='precision must be "upstream" or "bf16"'):
        svggt_kernels.patch(network, precision="fp8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "norm1", nn.Identity()), "norm1 and norm2"),
        (lambda block: setattr(block, "ls2", nn.Linear(2, 2)), "ls1 and ls2"),
        (lambda block: setattr(block.attn, "proj", nn.Identity()), "attn.qkv and attn.proj"),
        (lambda block: setattr(block.attn, "q_norm", nn.Identity()), "attn.q_norm and attn.k_norm"),
        (lambda block: delattr(block.attn.rope, "base_frequency"), "base_frequency"),
    ],
)
def test_blocks_of_another_shape_are_told_apart(change, reason: str):
    block = model().aggregator.frame_blocks[0]
    assert blocks.obstacle(block) is None
    change(block)
    assert reason in str(blocks.obstacle(block))
