"""Lean DPT heads: doubles of VGGT's heads run lean against themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from doubles.dpt import ConvolutionalHead, Fusion, ResidualUnit
from doubles.vggt import VGGT
from live_bytes import Live
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels.inference import dpt as heads
from svggt_kernels.inference import memory, proven_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL, DIM, PATCH = 5, 64, 9


def head(dtype: torch.dtype = torch.float32, **options: object) -> ConvolutionalHead:
    torch.manual_seed(0)
    made = ConvolutionalHead(**{"dim": DIM, "patch_size": PATCH, **options}).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # so that no part is too small to matter
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    return made.to(DEVICE, dtype)


def inputs(
    dtype: torch.dtype = torch.float32, samples: int = 1, frames: int = 3, grid: tuple[int, int] = (4, 5)
) -> tuple[list[Tensor], Tensor, int]:
    """Layer outputs, images and the first patch token."""
    generator = torch.Generator().manual_seed(1)
    layers = [
        torch.randn(samples, frames, SPECIAL + grid[0] * grid[1], DIM, generator=generator).to(DEVICE, dtype)
        for _ in range(4)
    ]
    return layers, torch.zeros(samples, frames, 3, PATCH * grid[0], PATCH * grid[1], device=DEVICE), SPECIAL


def run(module: nn.Module, given, proven: proven_heads.ProvenHeads | None = None, **options: object):
    """Run a head lean, or return None and why it must run as it is."""
    proven = proven or proven_heads.ProvenHeads()
    proven.begin()
    with torch.no_grad():
        ready = proven.ready("head", module, *given)
        return (None if ready is None else ready(*given, **options)), proven.not_lean.get("head")


def distance(results, exact) -> list[Tensor]:
    return [(one.double() - other).norm() for one, other in zip(results, exact, strict=True)]


@pytest.mark.parametrize(("samples", "frames", "at_once"), [(1, 1, 8), (1, 5, 2), (2, 2, 8), (2, 9, None)])
@pytest.mark.parametrize("grid", [(1, 1), (4, 7)])
@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_lean_head_computes_what_its_forward_does(activation: str, grid, samples: int, frames: int, at_once):
    module, given = head(torch.float64, activation=activation), inputs(torch.float64, samples, frames, grid)
    with torch.no_grad():
        expected = module(*given)
    lean, reason = run(module, given, frames_chunk_size=at_once)
    assert reason is None
    for one, other in zip(lean, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames ran at once, each time."""
    counts: list[int] = []
    forward = heads.ReadyHead._run

    def watched(self, tokens, *arguments):
        counts.append(len(tokens[0]))
        return forward(self, tokens, *arguments)

    monkeypatch.setattr(heads.ReadyHead, "_run", watched)
    return counts


@pytest.mark.parametrize(
    ("asked", "most", "expected"), [(2, 8, [2, 2, 1]), (None, 8, [5]), (None, 3, [3, 2]), (4, 3, [3, 2])]
)
def test_no_more_frames_run_at_once_than_asked_or_may(asked, most: int, expected: list[int], seen, monkeypatch):
    module, given = head(), inputs(frames=5)
    run(module, given, frames_chunk_size=asked)
    seen.clear()
    monkeypatch.setattr(memory, "FRAMES_AT_ONCE", most)
    proven = proven_heads.ProvenHeads()
    run(module, given, proven, frames_chunk_size=asked)
    assert seen[-len(expected) :] == expected
    monkeypatch.setattr(heads, "MOST_VALUES", 8 * (4 * PATCH) * (5 * PATCH) * 3 // 2)
    seen.clear()
    run(module, given, proven)
    assert seen == [1] * 5


@pytest.mark.parametrize("options", [{"pos_embed": False}, {"down_ratio": 2}, {"widths": (16, 4, 8, 12)}])
def test_heads_of_other_sizes(options: dict[str, object]):
    module, given = head(torch.float64, **options), inputs(torch.float64)
    with torch.no_grad():
        expected = module(*given)
    lean, reason = run(module, given)
    assert reason is None
    torch.testing.assert_close(lean, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_lean_head_rounds_as_its_forward_does(activation: str):
    """On CUDA in TF32, as convolutions are there by default."""
    module, given = head(activation=activation), inputs(grid=(9, 7))
    with torch.no_grad():
        exact = copy.deepcopy(module).double()([each.double() for each in given[0]], *given[1:])
        plain = distance(module(*given), exact)
    lean, reason = run(module, given)
    assert reason is None
    assert all(ours <= 2 * theirs for ours, theirs in zip(distance(lean, exact), plain, strict=True))


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
def test_a_head_is_proved_in_tf32_too_and_another_formula_told_apart(activation: str):
    for rows in (6, 7):
        given = inputs(grid=(rows, 7), frames=2)
        module = head(activation=activation)
        lean, reason = run(module, given)
        assert reason is None
        with torch.no_grad():
            exact = copy.deepcopy(module).double()([each.double() for each in given[0]], *given[1:])
        for error, whole in zip(distance(lean, exact), exact, strict=True):
            assert error > 50 * torch.finfo(torch.float32).eps * whole.norm()  # it is TF32
        module.__class__ = AlmostTheSame
        assert "something else" in run(module, given)[1]


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
        block = getattr(module.scratch, f"refinenet{level}")
        block.resConfUnit1 = KeepsItsInput(block.resConfUnit1)


def set_class(kind: type) -> object:
    return lambda module: setattr(module, "__class__", kind)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_units, "something else"),
        (set_class(MixesFrames), "something else"),
        (set_class(AlmostTheSame), "something else"),
        (set_class(Scales), "something else"),
        (set_class(AlongTheDiagonal), "no sum over their columns and rows"),
    ],
)
def test_a_head_that_computes_something_else_is_told_apart(change, reason: str):
    module, given = head(), inputs()
    change(module)
    lean, told = run(module.eval(), given)
    assert lean is None and reason in told


class AddsByItsOwnRatio(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(x, width, height, self.own_ratio)


def test_heads_that_differ_in_an_attribute_share_nothing():
    proven, given = proven_heads.ProvenHeads(), inputs(torch.float64)
    first, second = head(torch.float64), head(torch.float64)
    for module, ratio in ((first, 0.1), (second, 3.0), (first, 5.0)):
        module.__class__, module.own_ratio = AddsByItsOwnRatio, ratio
        with torch.no_grad():
            for ours, theirs in zip(proven.ready("head", module, *given)(*given), module(*given), strict=True):
                torch.testing.assert_close(ours, theirs)


class Learned(ConvolutionalHead):
    """What it adds to pixels is as strong as a parameter, a buffer or a tensor says."""

    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(x, width, height, self.strength)


def strength(kind: str) -> object:
    def change(module: ConvolutionalHead) -> None:
        tensor = torch.tensor(0.1, device=DEVICE)
        module.__class__ = Learned
        if kind == "buffer":
            module.register_buffer("strength", tensor)
        else:
            module.strength = nn.Parameter(tensor) if kind == "parameter" else tensor

    return change


class WithAnAdapter(ConvolutionalHead):
    def _apply_pos_embed(self, x: Tensor, width: int, height: int) -> Tensor:
        return super()._apply_pos_embed(self.adapter(x) if x.shape[1] == 12 else x, width, height)


def adapt(module: ConvolutionalHead) -> None:
    module.__class__ = WithAnAdapter
    module.adapter = nn.Conv2d(12, 12, 1).to(DEVICE)
    nn.init.dirac_(module.adapter.weight)
    nn.init.zeros_(module.adapter.bias)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (strength("parameter"), "it holds strength, which the lean head does not know"),
        (strength("buffer"), "it holds strength, which the lean head does not know"),
        (strength("tensor"), "it holds strength of Tensor"),
        (adapt, "adapter holds weight, which the lean head does not know"),
        (lambda m: setattr(m, "table", {}), "it holds table of dict"),
    ],
)
def test_what_a_lean_head_does_not_know_keeps_it_as_it_is(change, reason: str):
    """Though it computes what upstream's does as long as values are what they are."""
    module, given, proven = head(), inputs(), proven_heads.ProvenHeads()
    assert run(module, given, proven)[1] is None
    change(module)
    lean, told = run(module.eval(), given, proven)
    assert lean is None and reason in told


class BySize(ConvolutionalHead):
    def _forward_impl(self, layers, images, first, start=None, end=None):
        values, confidence = super()._forward_impl(layers, images, first, start, end)
        return (values if images.shape[-1] <= 6 * PATCH else 2 * values), confidence


def test_a_head_is_proved_for_each_size_of_images():
    module, proven = head(), proven_heads.ProvenHeads()
    module.__class__ = BySize
    assert run(module, inputs(grid=(4, 6)), proven)[1] is None
    assert "something else" in run(module, inputs(grid=(4, 7)), proven)[1]
    assert run(module, inputs(grid=(4, 6)), proven)[1] is None


def test_a_class_that_is_changed_after_the_proof_is_seen(monkeypatch: pytest.MonkeyPatch):
    module, given, proven = head(), inputs(), proven_heads.ProvenHeads()
    assert run(module, given, proven)[1] is None
    forward = ConvolutionalHead.scratch_forward
    monkeypatch.setattr(ConvolutionalHead, "scratch_forward", lambda self, maps: 1.02 * forward(self, maps))
    assert "something else" in run(module, given, proven)[1]


def test_layer_outputs_may_come_in_a_dict():
    module, (layers, images, first) = head(torch.float64), inputs(torch.float64)
    lean, reason = run(module, (dict(enumerate(layers)), images, first))
    assert reason is None
    with torch.no_grad():
        torch.testing.assert_close(lean, module(layers, images, first), rtol=1e-11, atol=1e-11)
    assert run(module, ({2: layers[2]}, images, first))[1] == "there is no output of layer 0"


class OfAnotherKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate_layer_idx = [1, 3]

    def forward(self, layers: list[Tensor]) -> Tensor:
        return layers[3]


def test_a_head_whose_forward_takes_other_arguments_is_named():
    network = model()
    network.other_head = OfAnotherKind().eval()
    _, report = outputs(network)
    assert report.lean_heads == ("depth_head",)
    assert "OfAnotherKind does not take what VGGT's DPT heads take" in report.heads_not_lean["other_head"]


def test_a_lean_head_that_gives_nan_proves_nothing(monkeypatch):
    predict = heads.predict

    def broken(x: Tensor, *others: object) -> tuple[Tensor, ...]:
        factor = float("nan") if x.dtype == torch.float32 else 1
        return tuple(factor * each for each in predict(x, *others))

    monkeypatch.setattr(heads, "predict", broken)
    assert "something else" in run(head(), inputs())[1]


def test_the_newer_switch_of_precision_is_read():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert run(head(), inputs())[1] is None
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def fusion(module: ConvolutionalHead) -> Fusion:
    return module.scratch.refinenet2


def strict_sequence(module: ConvolutionalHead) -> None:
    module.scratch.output_conv2 = nn.Sequential(*module.scratch.output_conv2, nn.Identity())


def wide_pointwise(module: ConvolutionalHead) -> None:
    fusion(module).out_conv = nn.Conv2d(16, 16, 3, padding=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "feature_only", True), "returns feature maps"),
        (lambda m: setattr(m, "activation", "linear"), "activation is 'linear', not 'exp' or 'inv_log'"),
        (lambda m: setattr(m, "conf_activation", "sigmoid"), "conf_activation is 'sigmoid', not 'expp1'"),
        (lambda m: setattr(m, "_forward_impl", m._forward_impl), "methods was replaced"),
        (lambda m: delattr(m, "down_ratio"), "does not say its patch_size, down_ratio"),
        (lambda m: setattr(m, "norm", nn.Identity()), "norm is not LayerNorm"),
        (lambda m: m.projects.append(nn.Conv2d(DIM, 8, 1)), "does not read 4 layers"),
        (lambda m: setattr(m.projects[1], "bias", None), "projects are not Conv2d with a bias"),
        (lambda m: m.projects.__setitem__(1, nn.Conv2d(DIM, 12, 1, padding="same")), "projects are not"),
        (lambda m: m.resize_layers.__setitem__(2, nn.ReLU()), "resize_layers are not"),
        (lambda m: delattr(m, "scratch"), "scratch.layer1_rn is not Conv2d"),
        (lambda m: setattr(m.scratch.layer2_rn, "padding_mode", "reflect"), "scratch.layer2_rn is not"),
        (lambda m: setattr(m.scratch.refinenet4, "resConfUnit1", ResidualUnit(16)), "refinenet4 has a resConfUnit1"),
        (lambda m: setattr(fusion(m).resConfUnit1, "activation", nn.ReLU()), "a ReLU in place"),
        (lambda m: setattr(fusion(m).resConfUnit1, "activation", nn.GELU()), "a ReLU in place"),
        (lambda m: setattr(fusion(m).resConfUnit2, "norm1", nn.BatchNorm2d(16)), "no norm"),
        (lambda m: delattr(fusion(m), "resConfUnit1"), "refinenet2 lacks units"),
        (wide_pointwise, "refinenet2.out_conv is not a Conv2d of 1 x 1"),
        (lambda m: setattr(fusion(m), "size", (8, 8)), "a size of its own"),
        (lambda m: setattr(fusion(m), "align_corners", False), "does not align corners"),
        (lambda m: setattr(m.scratch, "output_conv1", nn.Identity()), "output_conv1 is not Conv2d"),
        (strict_sequence, "output_conv2 is not Conv2d, ReLU and Conv2d"),
        (lambda m: m.scratch.output_conv2.__setitem__(2, nn.Conv2d(8, 2, 3, padding=1)), "a Conv2d of 1 x 1"),
        (lambda m: m.bfloat16(), "weights are torch.bfloat16"),
        (lambda m: m.norm.double(), "weights are torch.float32, torch.float64"),
        (lambda m: m.train(), "training mode"),
        (lambda m: m.scratch.layer1_rn.register_forward_hook(lambda *_: None), "a hook on scratch.layer1_rn"),
        (lambda m: m.norm.register_forward_pre_hook(lambda *_: None), "a hook on norm"),
        (lambda m: setattr(m.projects[0], "forward", lambda x: x), "another forward was put on projects.0"),
        (lambda m: setattr(m, "forward", lambda *_: None), "another forward was put on it"),
    ],
)
def test_why_a_head_runs_as_it_is(change, reason: str):
    module = head()
    assert heads.obstacle(module) is None
    change(module)
    lean, told = run(module, inputs())
    assert lean is None and reason in told


def test_what_a_head_is_given_may_keep_it_from_running_lean():
    module, (layers, images, first) = head(), inputs()
    proven = proven_heads.ProvenHeads()
    for given in (([each.double() for each in layers], images, first), (layers, images, 0)):
        assert "layer outputs are not" in run(module, given, proven)[1]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert run(module, (layers, images, first), proven)[1] == "autocast is on"
    assert proven.ready("head", module, layers, images, first) is None
    assert proven.not_lean == {"head": "gradients are on"}
    assert "not finite" in run(module, ([math.nan * each for each in layers], images, first), proven)[1]
    assert run(module, (layers, images, first), proven)[1] is None


def test_a_failure_while_a_head_is_proved_is_told(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("unable to find an engine")

    proven = proven_heads.ProvenHeads()
    monkeypatch.setattr(heads, "convolve_relu", fail)
    assert run(head(), inputs(), proven) == (None, "it failed: unable to find an engine")
    monkeypatch.undo()
    assert "it failed" in run(head(), inputs(), proven)[1]  # it is not tried again
    assert run(head(torch.float64), inputs(torch.float64), proven)[1] is None


def counted(module: ConvolutionalHead) -> list[tuple[int, ...]]:
    """Return a list to which every call of a head's positional embedding adds the size of its maps."""
    calls: list[tuple[int, ...]] = []

    class Counting(type(module)):  # type: ignore[misc]
        def _apply_pos_embed(self, x: Tensor, *arguments: object) -> Tensor:
            calls.append(tuple(x.shape[1:]))
            return super()._apply_pos_embed(x, *arguments)

    module.__class__ = Counting
    return calls


def test_what_is_added_to_pixels_is_computed_once_for_each_size():
    module = head(torch.float64)
    calls, proven = counted(module), proven_heads.ProvenHeads()
    for grid, new in (((7, 8), True), ((7, 8), False), ((8, 7), True), ((7, 8), True)):
        given = inputs(torch.float64, grid=grid)
        with torch.no_grad():
            expected = module(*given)
        calls.clear()
        lean, _ = run(module, given, proven)
        assert bool(calls) == new
        torch.testing.assert_close(lean, expected, rtol=1e-11, atol=1e-11)


def test_weights_that_changed_are_seen():
    module, given, proven = head(torch.float64), inputs(torch.float64), proven_heads.ProvenHeads()
    run(module, given, proven)
    with torch.no_grad():
        module.scratch.refinenet1.resConfUnit2.conv2.bias.add_(0.3)
        module.projects[2].bias.sub_(0.2)
        module.scratch.refinenet3.out_conv.weight = nn.Parameter(1.5 * module.scratch.refinenet3.out_conv.weight)
        module.scratch.layer2_rn.weight.data = 0.5 * module.scratch.layer2_rn.weight.data
        expected = module(*given)
    lean, _ = run(module, given, proven)
    torch.testing.assert_close(lean, expected, rtol=1e-11, atol=1e-11)


def test_parameters_stay_as_they_are():
    module, given = head(), inputs()
    before = {name: (each.clone(), each.stride(), each.data_ptr()) for name, each in module.named_parameters()}
    run(module, given)
    for name, each in module.named_parameters():
        values, stride, place = before[name]
        assert torch.equal(each, values) and each.stride() == stride and each.data_ptr() == place


def test_a_lean_head_holds_less_than_its_forward(monkeypatch: pytest.MonkeyPatch):
    """Of VGGT's size, without data: how many values are alive at once, with kernels that hold only their results."""

    def hold(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)

    def upsample(x: Tensor, size: tuple[int, int], *_: object, **__: object) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    monkeypatch.setattr(heads, "convolve_relu", hold)
    monkeypatch.setattr(heads, "upsample", upsample)
    with torch.device("meta"):
        module = ConvolutionalHead(2048, features=256, widths=(256, 512, 1024, 1024)).eval()
        layers = [torch.empty(1, 2, SPECIAL + 28 * 37, 2048) for _ in range(4)]
        images = torch.empty(1, 2, 3, 392, 518)
        tables = [(torch.empty(37, width), torch.empty(28, width)) for width in (256, 512, 1024, 1024)]
        ready = heads.ReadyHead(module, [*tables, (torch.empty(518, 128), torch.empty(392, 128))], torch.float32)
    peaks = []
    for forward in (module, ready):
        live = Live([*module.parameters(), *layers, images])
        with torch.no_grad(), live:
            forward(layers, images, SPECIAL, 8)
        peaks.append(live.peak / (2 * 392 * 518))
    assert peaks[1] < peaks[0] and peaks[1] < memory.BYTES_PER_PIXEL


# The model


IMAGES = torch.rand(1, 6, 3, 56, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def model(**options: object) -> VGGT:
    torch.manual_seed(0)
    network = VGGT()
    network.depth_head = head(dim=256, patch_size=14, **options)
    return network.eval().to(DEVICE)


def outputs(network: nn.Module, **options: object) -> tuple[dict[str, Tensor], svggt_kernels.PatchReport]:
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", **options) as handle:
        return network(IMAGES), handle.report()


@pytest.mark.parametrize("activation", ["exp", "inv_log"])
def test_a_patched_model_runs_its_heads_lean_and_undo_restores_them(activation: str):
    network = model(activation=activation)
    with torch.no_grad():
        plain = network(IMAGES)
        exact = copy.deepcopy(network).double()(IMAGES.double())
        lean, report = outputs(network)
        again = network(IMAGES)
    assert report.lean_heads == ("depth_head",) and report.heads_not_lean == {}
    assert "lean heads: depth_head" in str(report)
    assert "forward" not in vars(network.depth_head)
    for name, expected in exact.items():
        allowed = (plain[name].double() - expected).norm()
        assert (lean[name].double() - expected).norm() <= 2 * allowed, name
        assert torch.equal(again[name], plain[name]), name


def test_a_head_that_must_run_as_it_is_gives_the_same_bits_and_the_report_says_why():
    network, seen = model(), []
    network.depth_head.scratch.output_conv1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        layers, first = network.aggregator(IMAGES)
        ours = network.depth_head(layers, images=IMAGES, patch_start_idx=first)
        theirs = ConvolutionalHead.forward(network.depth_head, layers, IMAGES, first)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and len(seen) == 4
    assert handle.report().lean_heads == ()
    text = "lean heads: none\n  depth_head runs as it is: there is a hook on scratch.output_conv1"
    assert text in str(handle.report())


def test_hooks_on_a_head_itself_run_around_it():
    network, seen = model(), []
    network.depth_head.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    lean, report = outputs(network)
    assert report.lean_heads == ("depth_head",) and len(seen) == 1 and seen[0] is lean["depth"]


def test_gradients_and_lean_false_leave_heads_as_they_are():
    network = model()
    with svggt_kernels.patch(network, covisibility="all") as handle:
        network(IMAGES)["depth"].sum().backward()
        assert handle.report().heads_not_lean == {"depth_head": "gradients are on"}
        with torch.no_grad():
            network(IMAGES)
        assert handle.report().lean_heads == ("depth_head",) and handle.report().heads_not_lean == {}
    assert network.depth_head.norm.weight.grad is not None
    _, report = outputs(network, lean=False)
    assert report.lean_heads == () and report.heads_not_lean == {} and "lean heads" not in str(report)


@pytest.mark.parametrize("options", [{"memory_budget": 8.0}, {"precision": "bf16"}, {"outputs": "all"}])
def test_heads_run_lean_on_outputs_that_lie_elsewhere(options: dict[str, object], seen, monkeypatch):
    monkeypatch.setattr(memory, "FRAMES_AT_ONCE", 2)
    monkeypatch.setattr(memory, "DEVICES", ("cuda", "cpu"))
    network = model()
    with torch.no_grad():
        plain = network(IMAGES)
    lean, report = outputs(network, **options)
    assert report.lean_heads == ("depth_head",)
    assert seen[-3:] == [2, 2, 2]
    for name, expected in plain.items():
        assert (lean[name] - expected).norm() <= (0.05 if "precision" in options else 1e-3) * expected.norm(), name


def test_a_copy_of_a_patched_model_runs_its_own_heads_lean():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        expected = network(IMAGES)
        other = copy.deepcopy(network)
        other.depth_head.scratch.output_conv2[2].bias.data += 1
        assert not torch.equal(other(IMAGES)["depth"], expected["depth"])
        assert torch.equal(network(IMAGES)["depth"], expected["depth"])
        assert svggt_kernels.Patch.of(other).report().lean_heads == handle.report().lean_heads == ("depth_head",)


def test_heads_of_a_compiled_model_run_lean():
    network = model()
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        expected = network(IMAGES)
        torch.testing.assert_close(compiled(IMAGES), expected)
        assert handle.report().lean_heads == ("depth_head",)
