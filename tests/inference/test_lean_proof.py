"""What blocks must hold and compute to run lean: the proof, its key, and the reasons where there is none."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from doubles.vggt import DIM, HEADS, VGGT, Aggregator, Attention, Mlp
from svggt_kernels.inference.model import Lean
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import svggt_kernels
from svggt_kernels.inference import ops as arithmetic
from svggt_kernels.inference import proof, settings

IMAGES = torch.rand(1, 4, 3, 28, 42, generator=torch.Generator().manual_seed(0))


def model() -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval()


def blocks_of(network: VGGT) -> list[nn.Module]:
    return [*network.aggregator.frame_blocks, *network.aggregator.global_blocks]


def pose(network: nn.Module, change=None, **options: object) -> tuple[Tensor, svggt_kernels.PatchReport]:
    """Run a copy, changed after a first forward if there is a change, and return the pose and the report."""
    network = copy.deepcopy(network)
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", **options) as handle:
        if change is not None:
            network(IMAGES)
            change(network)
        return network(IMAGES)["pose"], handle.report()


def as_without_lean(network: VGGT, change=None) -> svggt_kernels.PatchReport:
    """Assert that the lean model gives what it gives with lean=False, and return its report."""
    expected, _ = pose(network, change, lean=False)
    actual, report = pose(network, change)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    return report


class Tempered(Attention):
    """Attention that other things have a say in, if they are there."""

    temperature = 1.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name in ("adapter", "gate"):
            if hasattr(self, name):
                part = getattr(self, name)
                v = part(v) if isinstance(part, nn.Module) else part * v
        return super().attend(self.temperature * q, k, v)


def with_attribute(attn: nn.Module) -> None:
    attn.temperature = 4.0


def with_parameter(attn: nn.Module) -> None:
    attn.gate = nn.Parameter(torch.tensor(0.3))


def with_buffer(attn: nn.Module) -> None:
    attn.register_buffer("gate", torch.tensor(0.3))


def with_adapter(attn: nn.Module) -> None:
    torch.manual_seed(1)
    attn.adapter = nn.Linear(DIM // HEADS, DIM // HEADS).eval()


def with_scale(attn: nn.Module) -> None:
    attn.scale = 0.25


def with_callable(attn: nn.Module) -> None:
    attn.gate = torch.tensor(0.3)


STRANGERS = {
    with_attribute: "attn holds temperature",
    with_parameter: "attn holds gate",
    with_buffer: "attn holds gate",
    with_adapter: "attn holds adapter",
    with_callable: "attn holds gate",
    with_scale: "attn.scale is 0.25, not 64 ** -0.5",
}


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "after a forward"])
@pytest.mark.parametrize("add", STRANGERS, ids=lambda add: add.__name__)
def test_what_the_formula_does_not_know_keeps_its_block_as_it_is(add, later: bool):
    """In one frame block and one global block: the others prove nothing for them."""
    network = model()
    for block in blocks_of(network):
        block.attn.__class__ = Tempered

    def change(network: VGGT) -> None:
        for block in (network.aggregator.frame_blocks[2], network.aggregator.global_blocks[1]):
            add(block.attn)

    if not later:
        change(network)
    report = as_without_lean(network, change if later else None)
    assert report.lean_blocks == 6 and STRANGERS[add] in report.not_lean["Block"]


def test_what_passes_through_or_is_switched_off_is_no_stranger():
    network = model()
    for block in blocks_of(network):
        block.drop_path1, block.attn.attn_drop, block.attn.gate = nn.Identity(), nn.Dropout(0.5), None
        block.sample_drop_ratio, block.attn.scale, block.attn.head_dim = 0.1, (DIM // HEADS) ** -0.5, DIM // HEADS
        block.attn.is_causal = False
    report = as_without_lean(network.eval())
    assert report.lean_blocks == 8 and report.not_lean == {}


def test_dropout_that_is_switched_on_later_is_not_left_out():
    network = model()
    for block in blocks_of(network):
        block.mlp.drop = nn.Dropout(0.3)
        block.mlp.act = nn.Sequential(nn.GELU(), block.mlp.drop)
    network.eval()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        before = network(IMAGES)["pose"]
        assert handle.report().lean_blocks == 8 and torch.equal(network(IMAGES)["pose"], before)
        for block in blocks_of(network):
            block.mlp.drop.train()
        assert not torch.equal(network(IMAGES)["pose"], network(IMAGES)["pose"])
        assert "in training mode" in handle.report().not_lean["Block"]


class Halved(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


def halve_norms(network: VGGT) -> None:
    for block in blocks_of(network)[:3]:
        block.norm1 = Halved(DIM).eval()


def harden(network: VGGT) -> None:
    for block in blocks_of(network)[:3]:
        block.mlp.act = nn.GELU(approximate="tanh").eval()


@pytest.mark.parametrize(("change", "runs_lean"), [(halve_norms, 5), (harden, 8)])
def test_modules_that_are_replaced_after_the_proof_are_seen(change, runs_lean: int):
    assert as_without_lean(model(), change).lean_blocks == runs_lean


def test_a_class_that_is_changed_after_the_proof_is_seen(monkeypatch: pytest.MonkeyPatch):
    network, attend = model(), Attention.attend

    def heat(_: nn.Module) -> None:
        monkeypatch.setattr(Attention, "attend", lambda self, q, k, v: attend(self, 3 * q, k, v))

    expected, _ = pose(network, heat, lean=False)
    monkeypatch.undo()
    actual, report = pose(network, heat)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert report.lean_blocks == 0 and "something else" in report.not_lean["Block"]


class Scaled(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(1.25 * q, k, v)


@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_what_bfloat16_rounds_away_is_no_proof(cast: bool):
    """Residuals a hundred times as large as what blocks add hide nothing either."""
    network = model()
    for block in blocks_of(network):
        block.attn.__class__ = Scaled
    with torch.no_grad():
        network.aggregator.special.mul_(100)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            _, report = pose(network)
    assert report.lean_blocks == 0 and "something else" in report.not_lean["Block"]


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


def quantise(network: VGGT) -> None:
    for block in blocks_of(network)[1:6]:
        block.attn.qkv = Int8(block.attn.qkv).eval()
        block.mlp.fc1 = Int8(block.mlp.fc1).eval()


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "after a forward"])
def test_integer_weights_run_as_they_are(later: bool):
    network = model()
    if not later:
        quantise(network)
    report = as_without_lean(network, quantise if later else None)
    assert report.lean_blocks == 3 and "floating-point weights" in report.not_lean["Block"]


def test_products_in_tf32_are_proved(monkeypatch: pytest.MonkeyPatch):
    """Emulated: what is multiplied is rounded to the 10 bits that tensor cores read."""

    def tf32(x: Tensor) -> Tensor:
        return x if x.dtype != torch.float32 else ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(x.dtype)

    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: linear(tf32(x), tf32(weight), bias))
    network = model()
    for block in blocks_of(network):
        nn.init.constant_(block.attn.q_norm.weight, 3.0)
    assert pose(network)[1].lean_blocks == 8
    for block in blocks_of(network):
        block.attn.__class__ = Scaled
    assert pose(network)[1].lean_blocks == 0


class Requiring(nn.Module):
    """CroCo's: positions without a default, though nothing rotates."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Mlp()
        self.attn = RequiringAttention()

    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), xpos)
        return x + self.mlp(self.norm2(x))


class RequiringAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.ModuleList):
    def forward(self, x: Tensor, positions: object) -> Tensor:
        for block in self:
            x = block(x, positions)
        return x


def decoded(decoder: Decoder, positions: object, **options: object) -> tuple[Tensor, svggt_kernels.PatchReport]:
    tokens = torch.randn(1, 24, DIM, generator=torch.Generator().manual_seed(0))
    patched = svggt_kernels.patch(
        decoder, modules=["0.attn", "1.attn"], tokens_per_frame=8, covisibility="all", **options
    )
    with torch.no_grad(), patched as handle:
        return decoder(tokens, positions), handle.report()


@pytest.mark.parametrize("positions", [None, [None, None, None]], ids=["None", "a list of None"])
def test_arguments_that_a_forward_requires_are_given_in_the_proof_too(positions: object):
    torch.manual_seed(0)
    decoder = Decoder(Requiring() for _ in range(3)).eval()
    expected, _ = decoded(decoder, positions, lean=False)
    actual, report = decoded(decoder, positions)
    torch.testing.assert_close(actual, expected)
    assert report.lean_blocks == 3 and report.not_lean == {}


class Faulty(Requiring):
    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        if x.dtype == torch.float64:
            raise NotImplementedError("float64")
        return super().forward(x, xpos)


class Otherwise(Requiring):
    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        return super().forward(x, xpos) * (2 if x.dtype == torch.float64 else 1)


class Noisy(Requiring):
    def forward(self, x: Tensor, xpos: Tensor | None) -> Tensor:
        return super().forward(x, xpos) + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Faulty, "it failed: float64"), (Otherwise, proof.RANDOM), (Noisy, proof.RANDOM)]
)
def test_a_proof_that_fails_or_proves_nothing_is_a_reason(kind: type[Requiring], reason: str):
    torch.manual_seed(0)
    decoder = Decoder(kind() for _ in range(3)).eval()
    torch.manual_seed(1)
    expected, _ = decoded(decoder, None, lean=False)
    torch.manual_seed(1)
    actual, report = decoded(decoder, None)
    assert report.lean_blocks == 0 and report.not_lean == {kind.__name__: reason}
    if kind is not Noisy:
        torch.testing.assert_close(actual, expected)


def test_positions_that_are_no_tensor_are_named():
    decoder = Decoder(Requiring() for _ in range(2)).eval()
    _, report = decoded(decoder, [1, 2])
    assert report.not_lean == {"Requiring": "it is called with positions of list, not in a tensor"}


@pytest.mark.parametrize("why", ["gradients are on", "it is in training mode", "there is a hook on mlp.fc1"])
def test_the_report_says_why_blocks_do_not_run_lean(why: str):
    network = model()
    if "training" in why:
        network.train()
    if "hook" in why:
        network.aggregator.global_blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    context = contextlib.nullcontext() if "gradients" in why else torch.no_grad()
    with context, svggt_kernels.patch(network, covisibility="all") as handle:
        network(IMAGES)
        assert handle.report().not_lean == {"Block": why}
        assert f"class Block runs as it is: {why}" in str(handle.report())


def test_hooks_on_all_modules_see_all_modules():
    def seen(lean: bool) -> Counter[str]:
        names: Counter[str] = Counter()
        network = model()
        with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", lean=lean) as handle:
            network(IMAGES)
            hook = register_module_forward_hook(lambda module, *_: names.update([type(module).__name__]))
            try:
                network(IMAGES)
            finally:
                hook.remove()
            assert handle.report().lean_blocks == 0
        return names

    assert seen(True) == seen(False)


class KeepsADict(Aggregator):
    """VGGT-X's: some outputs, those that heads read among them, by their index."""

    def forward(self, images: Tensor) -> tuple[dict[int, Tensor], int]:
        layers, first = super().forward(images)
        return {index: layers[index] for index in (1, 2, 3)}, first


@pytest.mark.parametrize("options", [{}, {"outputs": "all"}, {"precision": "bf16"}], ids=str)
def test_an_aggregator_may_return_a_dict_of_outputs(options: dict[str, object]):
    network = model()
    network.aggregator.__class__ = KeepsADict
    network.camera_head.forward = lambda layers: layers[3][:, :, 0]
    with torch.no_grad():
        expected = network(IMAGES)["depth"]
        with svggt_kernels.patch(network, covisibility="all", **options):
            actual = network(IMAGES)["depth"]
    assert (actual - expected).norm() <= (0.05 if "precision" in options else 1e-4) * expected.norm()


def test_equal_blocks_share_a_proof_and_a_copy_makes_its_own(monkeypatch: pytest.MonkeyPatch):
    proofs = []
    disagreement = proof.disagreement
    monkeypatch.setattr(
        "svggt_kernels.inference.model.disagreement", lambda *given: proofs.append(given[-2]) or disagreement(*given)
    )
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all"):
        network(IMAGES)
        network(IMAGES)
        assert proofs == [torch.float32] * 4  # formula and rounding, of frame blocks and of global blocks
        with torch.autocast("cpu", torch.bfloat16):
            network(IMAGES)
        assert proofs[4:] == [torch.float32, torch.bfloat16] * 2
        other = pickle.loads(pickle.dumps(network))
        other(IMAGES)
        assert len(proofs) == 12


def test_a_proof_leaves_a_block_as_it_was():
    """Caches of its rotation, its buffers and its parameters included."""
    network = model()
    block = network.aggregator.global_blocks[0]
    block.attn.rope.frequency_cache = {}
    block.register_buffer("unused", None)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    twin = settings.twin(block, torch.float64)
    twin.attn.rope.frequency_cache["key"] = 1
    assert block.attn.rope.frequency_cache == {}
    assert all(each.dtype == torch.float64 for each in twin.parameters())
    assert all(
        each.data_ptr() == other.data_ptr()
        for each, other in zip(settings.twin(block).parameters(), block.parameters(), strict=True)
    )
    _, report = pose(network)
    assert report.lean_blocks == 8
    for name, each in network.state_dict().items():
        assert torch.equal(each, before[name]), name


@pytest.mark.parametrize(
    ("own", "fused", "agrees"), [(1e-6, 1.9e-6, True), (1e-6, 4e-6, False), (1e-6, math.nan, False), (0.5, 0.5, False)]
)
def test_the_rule(own: float, fused: float, agrees: bool):
    exact = torch.zeros(2, 3, dtype=torch.float64)
    exact[0, 0] = 1.0
    results = [torch.full((2, 3), error) + exact for error in (own, fused)]
    reason = proof.disagreement(exact, *(each.float() for each in results), exact.norm(), torch.float32, "block")
    assert (reason is None) == agrees


def test_what_is_not_finite_or_out_of_memory_is_asked_again():
    proofs, reasons = proof.Proofs(), iter([proof.UNFINISHED, None])
    assert proofs.reason("key", lambda: next(reasons)) == proof.UNFINISHED
    assert proofs.reason("key", lambda: next(reasons)) is None
    assert proofs.reason("key", lambda: next(reasons)) is None

    def exhaust() -> None:
        raise torch.OutOfMemoryError

    assert proofs.reason("other", exhaust) == proof.NO_MEMORY
    assert proofs.reason("other", lambda: None) is None


def test_nothing_is_proved_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch):
    proofs = proof.Proofs()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert proofs.reason("key", lambda: None) == proof.CAPTURED
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert proofs.reason("key", lambda: None) is None


@pytest.mark.parametrize(
    ("capability", "hip", "runs"),
    [((7, 0), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 4), "6", False)],
)
def test_triton_kernels_run_on_gpus_that_have_them(capability, hip, runs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arithmetic, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arithmetic._runs_triton.__wrapped__(torch.device("cuda", 0)) is runs


def test_lean_parts_can_be_copied_after_a_forward():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all") as handle:
        network(IMAGES)
        assert isinstance(copy.deepcopy(handle._lean), Lean)
