"""Models that are another than VGGT, or that are watched, run as they are, and the report says why."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from doubles import BAND, FAMILY, images
from doubles.fused import IMAGES, as_without, blocks_of, model, outputs
from doubles.vggt import DIM, HEADS, VGGT, Aggregator, Attention, Block, CameraHead
from tiers import every
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import svggt_kernels


class Tempered(Attention):
    """Attention that other things have a say in, if they are there."""

    temperature = 1.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name in ("adapter", "gate"):
            if hasattr(self, name):
                part = getattr(self, name)
                v = part(v) if isinstance(part, nn.Module) else part * v
        return super().attend(self.temperature * q, k, v)


class Hotter(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(3 * q, k, v)


class Halved(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Int8(nn.Linear):
    """A product with weights of 8 bits, which are parameters of a Linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / step).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("step", step)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.step, self.bias)


class KeepsADict(Aggregator):
    """VGGT-X's: outputs by their index."""

    def forward(self, images: Tensor) -> tuple[dict[int, Tensor], int]:
        layers, first = super().forward(images)
        return dict(enumerate(layers)), first


class ReadsADict(CameraHead):
    def forward(self, layers: dict[int, Tensor]) -> Tensor:
        return self.pose(layers[3][:, :, 0])


class Gated(Aggregator):
    """What the gate admits is 0 until weights are loaded into it."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        layers, first = super().forward(images)
        return [layer + self.gate * layer.sin() for layer in layers], first


class Scaled(Aggregator):
    """Its attributes have a say."""

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        layers, first = super().forward(images)
        return [self.options["factor"] * layer for layer in layers], first


class OfTwoArguments(Aggregator):
    def forward(self, images: Tensor, prior: Tensor) -> tuple[list[Tensor], int]:
        return super().forward(images + prior)


class TwoArguments(VGGT):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        layers, _ = self.aggregator(images, torch.ones(1))
        return {"pose": self.camera_head(layers)}


def with_two_arguments(network: nn.Module) -> None:
    network.__class__, network.aggregator.__class__ = TwoArguments, OfTwoArguments


def with_a_dict(network: nn.Module) -> None:
    network.aggregator.__class__ = KeepsADict
    network.camera_head.__class__ = ReadsADict


def with_a_gate(network: nn.Module) -> None:
    network.aggregator.__class__, network.aggregator.gate = Gated, nn.Parameter(torch.zeros(1))


def with_options(network: nn.Module) -> None:
    network.aggregator.__class__, network.aggregator.options = Scaled, {"factor": 2.0}


def heat(network: nn.Module) -> None:
    for block in blocks_of(network):
        block.attn.__class__ = Hotter


def halve(network: nn.Module) -> None:
    network.aggregator.frame_blocks[1].norm1 = Halved(DIM).eval()


class LessTheMean(nn.Linear):
    """An MLP that mixes the tokens of a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-2, keepdim=True))


def mix_tokens(network: nn.Module) -> None:
    torch.manual_seed(1)
    for block in blocks_of(network):
        block.mlp = LessTheMean(DIM, DIM).eval()


def quantize(network: nn.Module) -> None:
    for block in blocks_of(network)[1:6]:
        block.attn.qkv = Int8(block.attn.qkv).eval()


def compile_blocks(network: nn.Module) -> None:
    network.aggregator.frame_blocks[1] = torch.compile(network.aggregator.frame_blocks[1], backend="eager")


def checkpoint_blocks(network: nn.Module) -> None:
    network.aggregator.frame_blocks[1] = checkpoint_wrapper(network.aggregator.frame_blocks[1])


def attention(name: str, value: object):
    """Return what puts something into the attention of one frame block and one global block."""

    def change(network: nn.Module) -> None:
        for block in (network.aggregator.frame_blocks[2], network.aggregator.global_blocks[1]):
            block.attn.__class__ = Tempered
            setattr(block.attn, name, value)

    return change


def forward_put_on_a_block(network: nn.Module) -> None:
    block = network.aggregator.frame_blocks[2]
    block.forward = lambda *args, **kwargs: 1.5 * type(block).forward(block, *args, **kwargs)


STRANGERS = {
    "a temperature": (attention("temperature", 4.0), "attn holds temperature"),
    "a gate": (attention("gate", nn.Parameter(torch.tensor(0.3))), "attn holds gate"),
    "an adapter": (attention("adapter", nn.Linear(DIM // HEADS, DIM // HEADS).eval()), "attn holds adapter"),
    "integer weights": (quantize, "floating-point weights"),
    "a class of attention": (heat, "the model computes something else"),
    "an MLP that mixes tokens": (mix_tokens, "the model computes something else"),
    "a class of a norm": (halve, "norm1 and norm2 are not LayerNorm"),
    "a compiled block": (compile_blocks, "which the fused block does not know"),
    "a checkpointed block": (checkpoint_blocks, "which the fused block does not know"),
    "a forward put on a block": (forward_put_on_a_block, "another forward was put on frame_blocks.2"),
    "a hook": (
        lambda x: blocks_of(x)[1].mlp.fc1.register_forward_hook(lambda *_: None),
        "a hook on frame_blocks.1.mlp.fc1",
    ),
    "training mode": (lambda network: network.aggregator.frame_blocks[0].train(), "is in training mode"),
    "a gate of the aggregator": (with_a_gate, "Gated holds gate"),
    "an object of the aggregator": (
        lambda network: setattr(network.aggregator, "plan", object()),
        "Aggregator holds plan",
    ),
    "options of the aggregator": (with_options, "the model computes something else"),
    "a dict of outputs": (with_a_dict, "it returns layers in a dict"),
}


@pytest.mark.parametrize(
    ("kind", "later"),
    every(2, [(kind, bool((place + turn) % 2)) for place, kind in enumerate(STRANGERS) for turn in (0, 1)]),
    ids=lambda value: {False: "from the start", True: "after a forward"}.get(value, value),
)
def test_a_model_that_is_another_runs_as_it_is(kind: str, later: bool):
    change, reason = STRANGERS[kind]
    network = model()
    if not later:
        change(network)
        change = None
    assert reason in str(as_without(network, change).reason)


def test_a_module_that_is_no_submodule_may_be_changed_unseen():
    network = model()
    block = network.aggregator.frame_blocks[1]
    block.__dict__["ls1"] = block._modules.pop("ls1")

    def change(network: nn.Module) -> None:
        scale = network.aggregator.frame_blocks[1].ls1
        scale.gamma = nn.Parameter(3 * scale.gamma)

    assert "frame_blocks.1 holds the module ls1, which is not among" in str(as_without(network, change).reason)


def test_an_aggregator_that_requires_more_than_images_runs_as_it_is():
    network = model()
    assert as_without(network, with_two_arguments).reason == "its forward is given more than images [B, S, 3, H, W]"
    with_two_arguments(network)
    assert as_without(network).reason == "the forward of OfTwoArguments takes images, prior"


@pytest.mark.parametrize("kind", ["pi3", "da3", "mapanything"])
def test_models_of_another_shape_run_as_they_are(kind: str):
    results = []
    for fused in (True, False):
        network = FAMILY[kind].create()
        with torch.no_grad(), svggt_kernels.patch(network, covisibility=BAND, fused=fused) as handle:
            results.append(network(images()))
            report = handle.report().inference
            if fused:
                assert report.reason is not None and "not fused, attention alone is sparse: " in str(report)
    assert torch.equal(*results)


def test_a_class_that_is_changed_after_a_forward_is_seen(monkeypatch: pytest.MonkeyPatch):
    network, attend = model(), Attention.attend

    def change(_: nn.Module) -> None:
        monkeypatch.setattr(Attention, "attend", lambda self, q, k, v: attend(self, 3 * q, k, v))

    expected, _ = outputs(network, change, fused=False)
    monkeypatch.undo()
    actual, report = outputs(network, change)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert "something else" in report.reason


def test_dropout_that_is_switched_on_later_is_not_left_out():
    network = model()
    for block in blocks_of(network):
        block.mlp.drop = nn.Dropout(0.3)
        block.mlp.act = nn.Sequential(nn.GELU(), block.mlp.drop)
    network.eval()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
        before = network(IMAGES)["pose"]
        assert handle.report().inference.reason is None and torch.equal(network(IMAGES)["pose"], before)
        for block in blocks_of(network):
            block.mlp.drop.train()
        assert not torch.equal(network(IMAGES)["pose"], network(IMAGES)["pose"])
        assert "in training mode" in handle.report().inference.reason


def test_gradients_are_those_of_the_model_itself():
    gradients = []
    for fused in (False, True):
        network = model()
        with svggt_kernels.patch(network, covisibility="all", fused=fused) as handle:
            network(IMAGES)["pose"].sum().backward()
        gradients.append(network.aggregator.camera_token.grad)
    assert torch.equal(*gradients) and handle.report().inference.reason == "gradients are on"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_runs_again_as_the_model_itself(reentrant: bool):
    """A reentrant checkpoint turns gradients off, so in eval mode the first run is fused."""

    def gradient(checkpointed: bool) -> Tensor:
        network, pictures = model(), IMAGES.clone().requires_grad_()
        graph = svggt_kernels.CovisibilityGraph.sequential(6, 1)
        with svggt_kernels.patch(network, covisibility=graph, fused=True):

            def run(x: Tensor) -> Tensor:
                return network(x)["pose"]

            pose = checkpoint(run, pictures, use_reentrant=reentrant) if checkpointed else run(pictures)
            pose.square().mean().backward()
        return pictures.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-7)


def test_hooks_on_all_modules_see_all_modules():
    def seen(fused: bool) -> Counter[str]:
        names: Counter[str] = Counter()
        network = model()
        with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=fused) as handle:
            network(IMAGES)
            hook = register_module_forward_hook(lambda module, *_: names.update([type(module).__name__]))
            try:
                network(IMAGES)
            finally:
                hook.remove()
            if fused:
                assert handle.report().inference.reason == "there is a hook on all modules"
        return names

    assert seen(True) == seen(False)


@pytest.mark.parametrize("inside", ["attn.qkv", "mlp", "mlp.act", "attn.proj"])
def test_a_hook_sees_what_it_sees_without_a_patch(inside: str):
    network, seen = model(), []
    for block in network.aggregator.global_blocks:
        block.get_submodule(inside).register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        network(IMAGES)
        with svggt_kernels.patch(network, covisibility="all", fused=True):
            network(IMAGES)
    assert len(seen) == 8
    for plain, patched in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(patched, plain)


def test_a_hook_on_the_aggregator_itself_runs_around_it():
    network, seen = model(), []
    network.aggregator.register_forward_hook(lambda module, inputs, out: seen.append(out[0][3].shape))
    _, report = outputs(network)
    assert report.reason is None and seen == [(1, 6, 11, 2 * DIM)]


class ScaledTwice(Block):
    """A block whose second gamma does not scale the attention's sum: the same function while gammas are 0."""

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        attended = self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + attended + self.ls2(self.mlp(self.norm2(x)))


def test_weights_of_zero_prove_nothing_of_other_weights():
    network = model()
    for block in blocks_of(network):
        block.__class__ = ScaledTwice
        for scale in (block.ls1, block.ls2):
            nn.init.zeros_(scale.gamma)

    def load(network: nn.Module) -> None:
        for block in blocks_of(network):
            for scale in (block.ls1, block.ls2):
                nn.init.constant_(scale.gamma, 0.7)

    assert outputs(network)[1].reason is None
    assert "computes something else" in str(as_without(network, load).reason)


def test_images_of_one_channel_do_what_they_do_in_the_model():
    network = model()
    with torch.no_grad():
        expected = network(IMAGES[:, :, :1])
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", fused=True) as handle:
        for _ in range(2):
            with pytest.raises(RuntimeError):
                network.aggregator.patch_embed(IMAGES[0, :, :1])
            given = network(IMAGES[:, :, :1])
            for name, tensor in expected.items():
                torch.testing.assert_close(given[name], tensor, rtol=1e-3, atol=1e-4)
            network(IMAGES)
            assert handle.report().inference.reason is None
