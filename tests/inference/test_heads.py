"""Heads of a patched model: fused or as they are, some frames at a time; camera heads on special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles.dpt import ConvolutionalHead, random_head
from doubles.vggt import DIM, PATCH, VGGT, CameraHead
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels.inference import dpt, memory, proofs
from svggt_kernels.inference.layer_outputs import LayerOutputs
from svggt_kernels.inference.report import InferenceReport

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pictures(rows: int = 2, columns: int = 3, frames: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, frames, 3, PATCH * rows, PATCH * columns, generator=generator).to(DEVICE)


IMAGES = pictures()


def model(**options: object) -> VGGT:
    torch.manual_seed(0)
    network = VGGT()
    network.depth_head = random_head(dim=2 * DIM, patch_size=PATCH, **options)
    return network.eval().to(DEVICE)


def patched(network: nn.Module, **options: object) -> svggt_kernels.Patch:
    return svggt_kernels.patch(network, **{"covisibility": "all", "fused": True, **options})


def run(network: nn.Module, images: Tensor = IMAGES, **options: object) -> tuple[dict[str, Tensor], InferenceReport]:
    with torch.no_grad(), patched(network, **options) as handle:
        return network(images), handle.report().inference


def why_not(network: nn.Module, handle: svggt_kernels.Patch, images: Tensor = IMAGES) -> str | None:
    """Return why the DPT head of a patched model runs as it is, or None."""
    with torch.no_grad():
        network(images)
    return handle.report().inference.heads["depth_head"]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames run together in fused heads, each time."""
    counts: list[int] = []
    forward = dpt.ReadyHead._run

    def watched(self, tokens, *others):
        counts.append(len(tokens[0]))
        return forward(self, tokens, *others)

    monkeypatch.setattr(dpt.ReadyHead, "_run", watched)
    return counts


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Classes of the modules that are verified, each time."""
    kinds: list[str] = []
    verify = proofs.verify

    def watched(module, *others):
        kinds.append(type(module).__name__)
        return verify(module, *others)

    monkeypatch.setattr(proofs, "verify", watched)
    return kinds


# Fused


@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_patched_model_runs_its_heads_fused_and_undo_restores_them(activation: str):
    network = model(activation=activation)
    with torch.no_grad():
        plain = network(IMAGES)
        exact = copy.deepcopy(network).double()(IMAGES.double())
        ours, report = run(network)
        again = network(IMAGES)
    assert report.heads == {"depth_head": None}
    assert "depth_head: fused" in str(report)
    assert "forward" not in vars(network.depth_head)
    for name, expected in exact.items():
        allowed = (plain[name].double() - expected).norm()
        assert (ours[name].double() - expected).norm() <= 2 * allowed, name
        assert torch.equal(again[name], plain[name]), name


def test_a_model_in_float64_runs_its_heads_fused():
    network = model().double()
    with torch.no_grad():
        plain = network(IMAGES.double())
    ours, report = run(network, IMAGES.double())
    assert report.heads == {"depth_head": None}
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("asked", "most", "expected"), [(2, 8, [2, 2, 1]), (None, 8, [5]), (None, 3, [3, 2]), (4, 3, [3, 2])]
)
def test_no_more_frames_run_together_than_asked_or_may(asked, most: int, expected: list[int], together, monkeypatch):
    network, images = model(), pictures(frames=5)
    monkeypatch.setattr(memory, "FRAMES_TOGETHER", most)
    with torch.no_grad(), patched(network):
        layers, first = network.aggregator(images)
        for _ in range(2):
            together.clear()
            network.depth_head(layers, images, first, frames_chunk_size=asked)
    assert together == expected


@pytest.mark.parametrize("options", [{"memory_budget": 8.0}, {"precision": "bf16"}, {"outputs": "all"}])
def test_heads_run_fused_wherever_layer_outputs_are(options: dict[str, object], together, monkeypatch):
    monkeypatch.setattr(memory, "FRAMES_TOGETHER", 2)
    monkeypatch.setattr(memory, "DEVICES", ("cuda", "cpu"))
    network = model()
    with torch.no_grad():
        plain = network(IMAGES)
    ours, report = run(network, **options)
    assert report.heads == {"depth_head": None}
    assert together[-3:] == [2, 2, 2]
    for name, expected in plain.items():
        assert (ours[name] - expected).norm() <= (0.05 if "precision" in options else 1e-3) * expected.norm(), name


def test_hooks_on_a_head_itself_run_around_it():
    network, seen = model(), []
    network.depth_head.register_forward_hook(lambda module, arguments, out: seen.append(out[0]))
    ours, report = run(network)
    assert report.heads == {"depth_head": None} and len(seen) == 1 and seen[0] is ours["depth"]


def test_weights_that_changed_are_read():
    network = model().double()
    with torch.no_grad(), patched(network):
        network(IMAGES.double())
        network.depth_head.scratch.refinenet1.resConfUnit2.conv2.bias.add_(0.3)
        network.depth_head.scratch.refinenet3.out_conv.weight.data *= 1.5
        ours = network(IMAGES.double())
    with torch.no_grad():
        torch.testing.assert_close(ours, network(IMAGES.double()), rtol=1e-9, atol=1e-9)


def test_a_copy_of_a_patched_model_runs_its_own_heads():
    network = model()
    with torch.no_grad(), patched(network) as handle:
        expected = network(IMAGES)
        duplicate = copy.deepcopy(network)
        duplicate.depth_head.scratch.output_conv2[2].bias.data += 1
        assert not torch.equal(duplicate(IMAGES)["depth"], expected["depth"])
        assert torch.equal(network(IMAGES)["depth"], expected["depth"])
        for each in (handle, svggt_kernels.Patch.of(duplicate)):
            assert each.report().inference.heads == {"depth_head": None}


def test_heads_of_a_compiled_model_run_fused():
    network = model()
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad(), patched(network) as handle:
        expected = network(IMAGES)
        torch.testing.assert_close(compiled(IMAGES), expected)
        assert handle.report().inference.heads == {"depth_head": None}


# Verification


def test_a_head_is_verified_once_for_each_size_of_images(verified: list[str]):
    network, by_size = model(), ["Aggregator", "ConvolutionalHead"]
    with torch.no_grad(), patched(network):
        network(IMAGES)
        assert sorted(verified) == ["Aggregator", "CameraHead", "ConvolutionalHead"]
        for images, expected in ((IMAGES, []), (pictures(3, 2), by_size), (IMAGES, []), (pictures(frames=9), [])):
            verified.clear()
            network(images)
            assert verified == expected


class BySize(ConvolutionalHead):
    def _forward_impl(self, layers, images, first, start=None, end=None):
        values, confidence = super()._forward_impl(layers, images, first, start, end)
        return (values if images.shape[-1] <= 3 * PATCH else 2 * values), confidence


def test_a_head_that_computes_something_else_for_some_sizes_runs_as_it_is_for_these():
    network = model()
    network.depth_head.__class__ = BySize
    with patched(network) as handle:
        assert why_not(network, handle) is None
        assert "something else" in why_not(network, handle, pictures(2, 4))
        assert why_not(network, handle) is None


def test_a_class_that_is_changed_after_the_verification_is_seen(monkeypatch: pytest.MonkeyPatch):
    network, forward = model(), ConvolutionalHead.scratch_forward
    with patched(network) as handle:
        assert why_not(network, handle) is None
        monkeypatch.setattr(ConvolutionalHead, "scratch_forward", lambda self, maps: 1.02 * forward(self, maps))
        assert "something else" in why_not(network, handle)


class Counts(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        ADDED.append((height, width))
        return super()._apply_pos_embed(x, width, height)


ADDED: list[tuple[int, int]] = []


def test_what_is_added_to_pixels_is_computed_once_for_each_size_after_the_verification():
    network = model()
    network.depth_head.__class__ = Counts
    with torch.no_grad(), patched(network):
        for images in (IMAGES, pictures(3, 2)):
            network(images)
        ADDED.clear()
        for images in (IMAGES, pictures(3, 2), IMAGES[:, :5]):
            network(images)
    assert ADDED == []


class AddsByItsOwnRatio(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(x, width, height, self.own_ratio)


def test_heads_that_differ_in_an_attribute_share_nothing():
    network = model().double()
    network.depth_head.__class__ = AddsByItsOwnRatio
    network.point_head = copy.deepcopy(network.depth_head)
    images = IMAGES.double()
    with torch.no_grad(), patched(network) as handle:
        layers, first = network.aggregator(images)
        for head, ratio in ((network.depth_head, 0.1), (network.point_head, 3.0), (network.depth_head, 5.0)):
            head.own_ratio = ratio
            expected = ConvolutionalHead.forward(head, layers, images, first)
            torch.testing.assert_close(head(layers, images, first), expected, rtol=1e-9, atol=1e-9)
        assert handle.report().inference.heads == {"depth_head": None, "point_head": None}


def test_a_failure_in_the_verification_is_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("unable to find an engine")

    network = model()
    monkeypatch.setattr(dpt, "convolve_relu", fail)
    with patched(network) as handle:
        assert "unable to find an engine" in why_not(network, handle)
        monkeypatch.undo()
        assert "unable to find an engine" in why_not(network, handle)


# As they are


class Learned(ConvolutionalHead):
    """What it adds to pixels is as strong as a parameter, a buffer or a tensor says."""

    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(x, width, height, self.strength)


def strength(kind: str) -> Callable[[nn.Module], None]:
    def change(head: nn.Module) -> None:
        tensor = torch.tensor(0.1, device=DEVICE)
        head.__class__ = Learned
        if kind == "buffer":
            head.register_buffer("strength", tensor)
        else:
            head.strength = nn.Parameter(tensor) if kind == "parameter" else tensor

    return change


class WithAnAdapter(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(self.adapter(x) if x.shape[1] == 12 else x, width, height)


def adapt(head: nn.Module) -> None:
    head.__class__ = WithAnAdapter
    head.adapter = nn.Linear(2, 2).to(DEVICE)
    head.adapter = nn.BatchNorm2d(12).to(DEVICE).eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (strength("parameter"), "it holds strength, which the fused head does not know"),
        (strength("buffer"), "it holds strength, which the fused head does not know"),
        (strength("tensor"), "it holds strength of Tensor"),
        (adapt, "adapter holds weight, bias, running_mean, running_var, num_batches_tracked, which the fused head"),
        (lambda head: setattr(head, "adapter", nn.Softplus()), "adapter holds a Softplus, which the fused head"),
        (lambda head: setattr(head, "table", {0: object()}), "it holds table of dict"),
        (lambda head: setattr(head, "_forward_impl", head._forward_impl), "one of its methods was replaced"),
        (lambda head: setattr(head, "activation", "linear"), "its activation is 'linear'"),
        (lambda head: head.scratch.train(), "scratch is in training mode"),
        (lambda head: head.norm.register_forward_pre_hook(lambda *_: None), "a hook on norm"),
        (lambda head: setattr(head.projects[0], "forward", head.projects[0].forward), "forward was put on projects.0"),
    ],
)
def test_what_a_fused_head_does_not_know_keeps_a_head_as_it_is(change: Callable[[Any], None], reason: str):
    """Though it may compute what upstream's does as long as values are what they are; also when it comes later."""
    network = model()
    with patched(network) as handle:
        assert why_not(network, handle) is None
        change(network.depth_head)
        assert reason in why_not(network, handle)
        assert f"depth_head: runs as it is: {handle.report().inference.heads['depth_head']}" in str(handle.report())


def test_a_head_that_runs_as_it_is_gives_the_same_bits():
    network, seen = model(), []
    network.depth_head.scratch.output_conv1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), patched(network) as handle:
        layers, first = network.aggregator(IMAGES)
        ours = network.depth_head(layers, images=IMAGES, patch_start_idx=first)
        theirs = ConvolutionalHead.forward(network.depth_head, layers, IMAGES, first)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and len(seen) == 4
    assert handle.report().inference.heads == {"depth_head": "there is a hook on scratch.output_conv1"}


def test_a_head_that_returns_feature_maps_runs_as_it_is():
    network = model(feature_only=True)
    with torch.no_grad(), patched(network) as handle:
        layers, first = network.aggregator(IMAGES)
        ours = network.depth_head(layers, images=IMAGES, patch_start_idx=first)
        theirs = ConvolutionalHead.forward(network.depth_head, layers, IMAGES, first)
    assert isinstance(ours, Tensor) and torch.equal(ours, theirs)
    assert handle.report().inference.heads == {"depth_head": "it returns feature maps, no values"}


def test_dtypes_and_shapes_that_do_not_fit_keep_a_head_as_it_is():
    network = model()
    with torch.no_grad(), patched(network) as handle:
        layers, first = network.aggregator(IMAGES)

        def told(images: Tensor) -> str | None:
            network.depth_head(layers, images, first)
            return handle.report().inference.heads["depth_head"]

        assert told(IMAGES) is None
        with torch.autocast(DEVICE, torch.bfloat16):
            assert told(IMAGES) == "autocast is on"
        with pytest.raises(RuntimeError):  # the head's own, for images of another size than the tokens
            told(pictures(3, 3))
        assert "are not one token for each patch" in handle.report().inference.heads["depth_head"]
        network.depth_head.norm.double()
        with pytest.raises(RuntimeError):
            told(IMAGES)
        assert "torch.float32, torch.float64" in handle.report().inference.heads["depth_head"]
    assert why_not_with_gradients() == "gradients are on"


def why_not_with_gradients() -> str | None:
    network = model()
    with patched(network) as handle:
        with torch.no_grad():
            layers, first = network.aggregator(IMAGES)
        network.depth_head(layers, IMAGES, first)[0].sum().backward()
        assert network.depth_head.norm.weight.grad is not None
        return handle.report().inference.heads["depth_head"]


def test_heads_of_an_aggregator_that_runs_as_it_is_run_as_they_are():
    network = model()
    with torch.no_grad():
        plain = network(IMAGES)
    hook = network.aggregator.frame_blocks[1].register_forward_hook(lambda *_: None)
    ours, report = run(network)
    assert report.reason == "there is a hook on frame_blocks.1" and report.heads == {}
    hook.remove()
    with patched(network) as handle:  # with gradients
        network(IMAGES)["depth"].sum().backward()
        assert handle.report().inference.reason == "gradients are on" and handle.report().inference.heads == {}
    assert network.depth_head.norm.weight.grad is not None
    with torch.no_grad(), patched(network, fused=False) as handle:
        network(IMAGES)
        assert handle.report().inference is None
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)


class WithoutMaps(ConvolutionalHead):
    """It takes what DPT heads take, and has little of what they hold."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.activation, self.conf_activation, self.patch_size = "exp", "expp1", PATCH
        self.intermediate_layer_idx, self.norm = [1, 3], nn.LayerNorm(2 * DIM)

    def forward(self, aggregated_tokens_list, images, patch_start_idx, frames_chunk_size=8):
        return self.norm(aggregated_tokens_list[3])[:, :, patch_start_idx:].split(DIM, -1)


def test_a_head_without_the_parts_of_one_runs_as_it_is():
    network = model()
    network.depth_head = WithoutMaps().to(DEVICE).eval()
    with torch.no_grad():
        expected = network(IMAGES)["depth"]
    ours, report = run(network)
    assert "no attribute" in report.heads["depth_head"]
    torch.testing.assert_close(ours["depth"], expected, rtol=1e-4, atol=1e-4)


class OfAnotherKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate_layer_idx = [1, 3]

    def forward(self, layers: list[Tensor]) -> Tensor:
        return layers[3]


def test_a_head_whose_forward_takes_other_arguments_reads_layer_outputs():
    network = model()
    network.own_head = OfAnotherKind().eval()
    with torch.no_grad():
        expected = network.own_head(network.aggregator(IMAGES)[0])
        with patched(network) as handle:
            torch.testing.assert_close(network.own_head(network.aggregator(IMAGES)[0]), expected, rtol=1e-4, atol=1e-4)
    assert handle.report().inference.heads == {}


# Camera heads


def watch_camera(network: VGGT) -> list[object]:
    """Return a list to which every call of the camera head in a patched model adds what the head is given."""
    seen: list[object] = []

    class Watched(CameraHead):
        def forward(self, aggregated_tokens_list: Any, num_iterations: int = 4) -> Tensor:
            seen.append(aggregated_tokens_list)
            return self.read(aggregated_tokens_list)

        def read(self, layers: Any) -> Tensor:
            return super().forward(layers)

    network.camera_head.__class__ = Watched
    return seen


def test_a_camera_head_is_given_special_tokens_alone():
    network = model()
    with torch.no_grad():
        plain = network(IMAGES)["pose"]
        with patched(network):
            network(IMAGES)
            seen = watch_camera(network)
            ours = network(IMAGES)["pose"]
            layers, first = network.aggregator(IMAGES)
            assert torch.equal(network.camera_head(aggregated_tokens_list=layers, num_iterations=2), ours)
            assert torch.equal(CameraHead.forward(network.camera_head, layers), ours)
    (special,) = seen[-1]
    assert special.shape == (*IMAGES.shape[:2], first, 2 * DIM)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


class ReadsPatches(CameraHead):
    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int = 4) -> Tensor:
        return self.pose(aggregated_tokens_list[-1].mean(2))


class ReadsAnEarlierLayer(CameraHead):
    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int = 4) -> Tensor:
        return self.pose(aggregated_tokens_list[-2][:, :, 0])


@pytest.mark.parametrize("kind", [ReadsPatches, ReadsAnEarlierLayer])
def test_a_camera_head_that_reads_more_is_given_all(kind: type[CameraHead]):
    network = model()
    network.camera_head.__class__ = kind
    with torch.no_grad():
        plain = network(IMAGES)["pose"]
    ours, _ = run(network)
    torch.testing.assert_close(ours["pose"], plain, rtol=1e-4, atol=1e-4)


def test_lists_of_others_pass_through_patched_heads():
    network = model()
    with torch.no_grad():
        layers, first = network.aggregator(IMAGES)
        pose, depth = network.camera_head(layers), network.depth_head(layers, IMAGES, first)
        with patched(network):
            assert not isinstance(layers, LayerOutputs)
            assert torch.equal(network.camera_head(layers), pose)
            assert torch.equal(network.depth_head(layers, IMAGES, first)[0], depth[0])
