"""Models of VGGT's shape through `patch(fused=True)`: fused they are what they are without."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from doubles import FAMILY
from doubles.fused import IMAGES, as_without, model, outputs
from doubles.vggt import DIM, HEADS, PATCH, Mlp
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels.inference import fused_forward, proofs, verification, within_frames

# What runs fused


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("keep", ["read", "all"])
def test_full_graph_is_the_unpatched_model(keep: str, cast: bool):
    network = model()
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(IMAGES.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            plain = network(IMAGES)
            with svggt_kernels.patch(network, covisibility="all", outputs=keep, fused=True) as handle:
                fused = network(IMAGES)
            again = network(IMAGES)
    report = handle.report().inference
    assert report.reason is None and report.verification.ratio <= 2
    assert report.layers_kept == ((1, 3) if keep == "read" else None)
    for name, expected in exact.items():
        assert (fused[name].double() - expected).norm() <= 2 * (plain[name].double() - expected).norm(), name
        assert torch.equal(again[name], plain[name]), name


@pytest.mark.parametrize(
    "covisibility", [svggt_kernels.CovisibilityGraph.sequential(6, 1), "tokens"], ids=["band", "tokens"]
)
@pytest.mark.parametrize("samples", [1, 2])
def test_sparse_graphs_are_those_of_the_attention_that_is_intercepted(covisibility, samples: int):
    network, pictures, results = model(), torch.rand(samples, 6, 3, 28, 42), []
    if covisibility == "tokens":
        covisibility = svggt_kernels.TokenSimilarity(neighbours=2)
        nn.init.normal_(network.aggregator.global_blocks[0].norm1.weight)
    for fused in (True, False):
        with torch.no_grad(), svggt_kernels.patch(network, covisibility=covisibility, fused=fused) as handle:
            out = network(pictures)
            results.append((out, [graph.to_dense() for graph in handle.graphs], handle.report().calls_last_forward))
    assert results[0][2] == results[1][2] == 4
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))
    assert all(0 < graph.float().mean() < 1 for graph in results[0][1])


def test_a_model_in_float64_runs_fused():
    network = model().double()
    with torch.no_grad():
        expected = network(IMAGES.double())
        with svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
            torch.testing.assert_close(network(IMAGES.double()), expected)
    assert handle.report().inference.reason is None


def test_bf16_residuals_and_outputs_stay_near():
    network = model()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            plain = network(IMAGES)
        actual, report = outputs(network, precision="bf16")
    assert report.reason is None
    for name, expected in plain.items():
        assert actual[name].dtype == expected.dtype
        assert (actual[name] - expected).norm() <= 0.05 * expected.norm(), name


def test_a_layer_that_was_not_kept_says_so():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        layers, _ = network.aggregator(IMAGES)
        assert len(layers) == 4 and layers[1].shape == layers[3].shape
        with pytest.raises(RuntimeError, match=r'layer 2 was not kept.*outputs="all"'):
            layers[2]
    with torch.no_grad(), svggt_kernels.patch(network.aggregator, covisibility="all", fused=True):
        assert all(isinstance(layer, Tensor) for layer in network.aggregator(IMAGES)[0])


def test_on_the_cpu_a_model_runs_as_it_is_if_not_asked():
    report = as_without(model(), fused=None)
    assert report.reason == fused_forward.ON_THE_CPU


def test_options_of_the_fused_forward_need_it():
    network = model()
    assert outputs(network, fused=False)[1] is None
    with pytest.raises(ValueError, match="leave fused=None"):
        svggt_kernels.patch(network, precision="bf16", fused=False)
    with pytest.raises(ValueError, match="needs a model of VGGT's shape, and Pi3 is none"):
        svggt_kernels.patch(FAMILY["pi3"].create(), covisibility="all", precision="bf16")
    with pytest.raises(ValueError, match='precision must be "upstream" or "bf16"'):
        svggt_kernels.patch(network, precision="fp8")


ENCODED: list[torch.Size] = []
"""Images that an encoder's own forward was given."""


class EncoderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = EncoderAttention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """DINOv2's names and formula."""

    def __init__(self) -> None:
        super().__init__()
        self.num_register_tokens = 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.register_tokens = nn.Parameter(torch.randn(1, 2, DIM))
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.blocks, self.norm = nn.ModuleList(EncoderBlock() for _ in range(2)), nn.LayerNorm(DIM)

    def prepare_tokens_with_masks(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).mT
        special = torch.cat([self.cls_token, self.register_tokens], 1).expand(len(patches), -1, -1)
        return torch.cat([special, patches], 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        ENCODED.append(images.shape)
        x = self.prepare_tokens_with_masks(images)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if hasattr(self, "gate"):
            x = x + self.gate
        return {"x_norm_patchtokens": x[:, 1 + self.num_register_tokens :]}


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_encoder_runs_fused_if_all_that_it_holds_is_known(gated: bool, cast: bool):
    """A gate of 0 has no effect yet, so the comparison does not tell."""
    network = model()
    network.aggregator.patch_embed = Encoder().eval()
    if gated:
        network.aggregator.patch_embed.gate = nn.Parameter(torch.zeros(1))
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(IMAGES.double())["pose"]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            plain = network(IMAGES)["pose"]
            with svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
                network(IMAGES)
                ENCODED.clear()
                actual = network(IMAGES)["pose"]
    assert handle.report().inference.reason is None and len(ENCODED) == gated
    assert (actual.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_the_former_name_of_the_option_is_told():
    network = model()
    with pytest.warns(DeprecationWarning, match="is called fused"):
        handle = svggt_kernels.patch(network, covisibility="all", lean=False)
    assert handle.report().inference is None and handle._own is None
    handle.undo()


# Attention within frames


def test_frames_attend_by_pytorch_where_hopper_cannot_run():
    _, report = outputs(model())
    assert report.within_frames == ("pytorch",)
    assert "attention within frames by pytorch" in str(report)


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

    reference = svggt_kernels.backends.load("reference")
    monkeypatch.setattr(reference, "TRAITS", dataclasses.replace(reference.TRAITS, beats_dense_from=fewest))
    monkeypatch.setattr(within_frames, "block_sparse_attention", attention)
    actual, report = outputs(network, backend=backend)
    assert report.within_frames == (("reference",) if runs else ("pytorch",))
    assert len(layouts) == (4 if runs else 0)
    assert all(layout is layouts[0] and layout.num_tokens == 11 for layout in layouts)
    torch.testing.assert_close(actual, plain)


@pytest.mark.gpu
def test_frames_attend_by_hopper_within_the_error_of_bf16(monkeypatch):
    hopper = svggt_kernels.backends.load("hopper")
    monkeypatch.setattr(hopper, "TRAITS", dataclasses.replace(hopper.TRAITS, beats_dense_from=0))
    network = model().cuda()
    device, pictures = torch.device("cuda"), IMAGES.cuda()
    if (reason := hopper.unsupported(device, torch.bfloat16, 64)) is not None:
        pytest.skip(reason)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(pictures.double())
        with torch.autocast("cuda", torch.bfloat16), svggt_kernels.patch(network, covisibility="all") as handle:
            fused = network(pictures)
        with torch.autocast("cuda", torch.bfloat16):
            plain = network(pictures)
    assert handle.report().inference.within_frames == ("hopper",)
    for name, expected in exact.items():
        assert (fused[name].double() - expected).norm() <= 2 * (plain[name].double() - expected).norm(), name


# Verifications


def test_equal_settings_are_verified_once_for_each_size(monkeypatch: pytest.MonkeyPatch):
    verified = []

    def counted(module: nn.Module, *given: object) -> verification.Verification:
        verified.append(type(module).__name__)
        return verification.verify(module, *given)

    monkeypatch.setattr(proofs, "verify", counted)
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        for pictures in (IMAGES, IMAGES, IMAGES[:, :4], IMAGES.repeat(2, 1, 1, 1, 1)):
            network(pictures)
        assert verified.count("Aggregator") == 1
        network(IMAGES[..., :28])
        network(IMAGES)
        assert verified.count("Aggregator") == 2
        with torch.autocast("cpu", torch.bfloat16):
            network(IMAGES)
        assert verified.count("Aggregator") == 3
        network.load_state_dict(network.state_dict())
        network.aggregator.frame_blocks[0].norm1 = nn.LayerNorm(DIM).eval()
        network(IMAGES)
        assert verified.count("Aggregator") == 3
        network.aggregator.frame_blocks[0].norm1 = nn.LayerNorm(DIM, eps=1e-3).eval()
        network(IMAGES)
        assert verified.count("Aggregator") == 4
        pickle.loads(pickle.dumps(network))(IMAGES)
        assert verified.count("Aggregator") == 5
        before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
        try:
            network(IMAGES)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
        assert verified.count("Aggregator") == 6
        network(IMAGES[:, :2])
        assert verified.count("Aggregator") == 7


REPLACED = {
    "a norm": lambda block: setattr(block, "norm2", nn.LayerNorm(DIM, eps=0.5).eval()),
    "a scale": lambda block: setattr(block.ls1, "gamma", nn.Parameter(3 * block.ls1.gamma)),
    "an MLP": lambda block: setattr(block, "mlp", nn.Linear(DIM, DIM).eval()),
    "a product's values": lambda block: block.attn.qkv.weight.mul_(2),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_what_is_replaced_between_forwards_is_what_runs(kind: str):
    def change(network: nn.Module) -> None:
        torch.manual_seed(1)
        REPLACED[kind](network.aggregator.frame_blocks[1])

    assert as_without(model(), change).reason is None


def test_tokens_that_are_not_finite_say_nothing_of_the_next():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
        assert network(torch.full_like(IMAGES, math.nan))["pose"].isnan().all()
        assert handle.report().inference.reason == verification.NOT_FINITE
        network(IMAGES)
        assert handle.report().inference.reason is None


def test_nothing_is_verified_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    class OnCuda:
        """Images whose device is said to be CUDA."""

        is_cuda, shape, dtype, device = True, IMAGES.shape, torch.float32, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    known, network = proofs.Proofs(), model()
    with torch.no_grad():
        assert known.obstacle(network.aggregator, lambda _: None) is None
        assert known.verify(network.aggregator, None, None, (), OnCuda()) == (proofs.CAPTURED, None)


# Traces


def test_undo_leaves_no_trace():
    network = model()

    def contents() -> list[dict[str, object]]:
        return [
            {**vars(module), **{name: dict(x) for name, x in vars(module).items() if isinstance(x, dict)}}
            for module in network.modules()
        ]

    before = contents()
    values = {name: each.clone() for name, each in network.state_dict().items()}
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        network(IMAGES)
    assert contents() == before
    for name, each in network.state_dict().items():
        assert torch.equal(each, values[name]), name


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"]
)
def test_a_copy_runs_fused_with_its_own_weights(duplicate):
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True):
        expected = network(IMAGES)["pose"]
        twin = duplicate(network)
        handle = svggt_kernels.Patch.of(twin)
        assert handle.report().inference is None
        assert torch.equal(twin(IMAGES)["pose"], expected) and handle.report().inference.reason is None
        twin.camera_head.pose.weight.zero_()
        twin.aggregator.camera_token.zero_()
        assert not torch.equal(twin(IMAGES)["pose"], expected)
        assert torch.equal(network(IMAGES)["pose"], expected)
        handle.undo()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in twin.modules())


def test_a_forward_that_was_replaced_is_named():
    network = model()
    handle = svggt_kernels.patch(network, covisibility="all", fused=True)
    before, network.camera_head.forward = network.camera_head.forward, lambda layers: layers
    with pytest.raises(RuntimeError, match="the forward of camera_head was replaced"):
        handle.undo()
    network.camera_head.forward = before
    handle.undo()
