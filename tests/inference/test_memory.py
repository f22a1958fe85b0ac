"""The memory budget: plans made of sizes, and doubles run by a plan."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from doubles import FAMILY
from doubles.vggt import DIM, SPECIAL, VGGT, DPTHead
from live_bytes import Live
from tiers import every
from torch import Tensor, nn

import svggt_kernels
from svggt_kernels import attention
from svggt_kernels.inference import blocks, fused_forward, layer_outputs, memory, proofs
from svggt_kernels.inference.verification import Verification
from svggt_kernels.patching.graph_attention import GraphAttention

GIB = memory.GIB

VGGT_1B = memory.Sizes(
    samples=1, frames=1000, tokens=1041, channels=1024, pixels=392 * 518, depth=24, layers=(4, 11, 17, 23), heads=2,
    wide=4, residual=4, product=2, present=int(6.95 * GIB), casts=int(1.69 * GIB),
)  # fmt: skip

IMAGES = torch.rand(2, 6, 3, 28, 42, generator=torch.Generator().manual_seed(0))


# Plans


def test_a_thousand_frames_fit_40_gib_and_900_fit_a_card_of_24():
    plan = memory.make_plan(VGGT_1B, 40 * GIB)
    assert plan.offloaded == (4, 11) and plan.host_bytes == 2 * 1000 * 1041 * 2048 * 4
    assert (plan.tokens_together, plan.frames_together) == (2**16, 8)
    assert plan.peak_bytes <= 40 * GIB
    less = replace(VGGT_1B, frames=900, present=int(6.7 * GIB))
    assert memory.make_plan(less, int(20.5 * GIB)).offloaded == (4, 11, 17, 23)
    assert memory.make_plan(VGGT_1B, 22 * GIB).offloaded == (4, 11, 17, 23)


def test_nothing_is_offloaded_that_may_stay():
    previous = len(VGGT_1B.layers)
    for budget in range(24, 70, 2):
        plan = memory.make_plan(VGGT_1B, budget * GIB)
        assert plan.peak_bytes <= budget * GIB
        assert plan.offloaded == VGGT_1B.layers[: len(plan.offloaded)]
        assert len(plan.offloaded) <= previous
        previous = len(plan.offloaded)
    assert previous == 0


def test_parts_are_halved_only_after_all_outputs_are_offloaded():
    sizes = replace(VGGT_1B, frames=20, present=5 * GIB)
    plans = [memory.make_plan(sizes, int(budget * GIB)) for budget in (12.0, 10.5, 10.0, 9.5)]
    assert [plan.tokens_together for plan in plans] == sorted((plan.tokens_together for plan in plans), reverse=True)
    for plan in plans:
        assert plan.offloaded == sizes.layers or (plan.tokens_together, plan.frames_together) == (2**16, 8)
    assert plans[-1].tokens_together < 2**16 and plans[-1].frames_together < 8


@pytest.mark.parametrize("frames", [10, 300, 1000])
def test_a_budget_that_cannot_be_kept_names_the_least(frames: int):
    sizes = replace(VGGT_1B, frames=frames)
    with pytest.raises(ValueError, match=rf"{frames} frames of 1041 tokens, got 1.00 GiB") as raised:
        memory.make_plan(sizes, GIB)
    least = float(re.search(r"at least ([\d.]+) GiB", str(raised.value))[1])  # type: ignore[index]
    plan = memory.make_plan(sizes, math.ceil(least * GIB))
    assert plan.offloaded == sizes.layers
    with pytest.raises(ValueError, match="at least"):
        memory.make_plan(sizes, int((least - 0.1) * GIB))


def test_more_of_anything_needs_more():
    def peak(sizes: memory.Sizes) -> int:
        return memory.make_plan(sizes, 10**15).peak_bytes

    for change in ({"samples": 2}, {"frames": 1001}, {"tokens": 1042}, {"residual": 8}, {"present": 8 * GIB}):
        assert peak(replace(VGGT_1B, **change)) > peak(VGGT_1B), change
    assert peak(replace(VGGT_1B, residual=2)) < peak(VGGT_1B)
    # Tokens in float32 beside queries, keys and values: the highest moment where no output stays.
    least = memory.make_plan(VGGT_1B, 24 * GIB)
    with pytest.raises(ValueError, match="at least 23"):
        memory.make_plan(replace(VGGT_1B, tokens_describe=True), least.peak_bytes)


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (0, ValueError, "positive number of GiB"),
        (-1.5, ValueError, "positive"),
        (math.inf, ValueError, "positive"),
        ("all", ValueError, "got 'all'"),
        (True, TypeError, "got bool"),
        ([40], TypeError, "got list"),
    ],
)
def test_budgets_without_a_meaning(budget: object, error: type, message: str):
    with pytest.raises(error, match=message):
        svggt_kernels.patch(VGGT(), covisibility="all", memory_budget=budget)


# Doubles


def model() -> VGGT:
    torch.manual_seed(0)
    return VGGT().eval()


def run(network: nn.Module, images: Tensor = IMAGES, covisibility: object = "all", **options: object):
    with torch.no_grad(), svggt_kernels.patch(network, covisibility=covisibility, fused=True, **options) as handle:
        return network(images), handle.report()


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let budgets be as small as a double is, and of its device."""
    monkeypatch.setattr(memory, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    monkeypatch.setattr(memory, "TOKENS_TOGETHER", 64)


def plans(network: nn.Module, covisibility: object = "all") -> list[memory.Plan]:
    """Return the plans for a network, each of which needs less than the one before."""
    with pytest.MonkeyPatch.context() as watched:
        seen: list[memory.Sizes] = []
        watched.setattr(memory, "make_plan", lambda sizes, budget: seen.append(sizes) or next(memory._plans(sizes)))
        run(network, covisibility=covisibility, memory_budget=1)
    found = list(memory._plans(seen[0]))
    return found[:1] + [plan for before, plan in pairwise(found) if plan.peak_bytes < before.peak_bytes]


class Away:
    """A `_HostCopy` whose tokens are nowhere where PyTorch counts them."""

    def __init__(self, tokens: Tensor) -> None:
        self.device, self.dtype, self.shape = tokens.device, tokens.dtype, tokens.shape
        self.array = tokens.numpy(force=True).copy()

    def load(self, frames: slice) -> Tensor:
        return torch.from_numpy(self.array[:, frames].copy())

    def read(self, frames: slice, tokens: slice) -> Tensor:
        return torch.from_numpy(self.array[:, frames, tokens].copy())


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload on the CPU too."""
    keep = layer_outputs.LayerOutputs.keep

    def keep_away(self, layer: int, tokens: Tensor) -> None:
        if layer in self.layers & self.offloaded:
            self._halves[layer].append(Away(tokens))
        else:
            keep(self, layer, tokens)

    monkeypatch.setattr(layer_outputs.LayerOutputs, "keep", keep_away)


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without verifications, which take more than a double this small."""
    monkeypatch.setattr(proofs, "verify", lambda *arguments: Verification(None, 1.0, 0.0, 0.0))


@pytest.mark.parametrize("cast", every(2, [True, False]), ids=["autocast", "float32"])
@pytest.mark.usefixtures("tight", "away")
def test_every_plan_computes_the_same(cast: bool):
    network = model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        exact = copy.deepcopy(network).double()
        with torch.autocast("cpu", enabled=False):
            exact = exact(IMAGES.double())
        plain = network(IMAGES)
        free, _ = run(network)
        seen = set()
        for plan in plans(network):
            planned, report = run(network, memory_budget=plan.peak_bytes / GIB)
            assert report.inference.reason is None and report.inference.layers_kept == (1, 3)
            assert report.inference.memory.offloaded == plan.offloaded
            seen.add((plan.offloaded, plan.frames_together))
            for name, expected in exact.items():
                if plan.frames_together == 8:
                    assert torch.equal(planned[name], free[name]), (name, plan)
                allowed = (plain[name].double() - expected).norm()
                assert (planned[name].double() - expected).norm() <= 2 * allowed, (name, plan)
    assert {offloaded for offloaded, _ in seen} == {(), (1,), (1, 3)}
    assert min(frames for _, frames in seen) < 6 < max(frames for _, frames in seen)


@pytest.mark.usefixtures("tight", "away")
def test_heads_never_see_more_frames_than_planned(monkeypatch: pytest.MonkeyPatch):
    network, seen = model(), []
    least = plans(network)[-1]
    forward = DPTHead.forward

    def watched(self, aggregated_tokens_list, images, patch_start_idx, frames_chunk_size=4):
        seen.append((images.shape[1], aggregated_tokens_list[1].shape[1]))
        return forward(self, aggregated_tokens_list, images, patch_start_idx, frames_chunk_size)

    monkeypatch.setattr(DPTHead, "forward", watched)
    _, report = run(network, memory_budget=least.peak_bytes / GIB)
    assert report.inference.memory.frames_together == 1  # the head asks for 4
    assert seen == [(1, 1)] * 6


@contextmanager
def highest(network: nn.Module) -> Iterator[list[int]]:
    """Give the peak of the blocks, and what is alive when the heads begin."""
    found: list[int] = []
    live = Live([*network.parameters(), *network.buffers(), IMAGES])
    hooks = [network.camera_head.register_forward_pre_hook(lambda *_: found.extend((live.peak, live.now)))]
    with live:
        yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.usefixtures("tight", "away", "unverified")
def test_offloaded_outputs_are_not_alive():
    network, measured = model(), {}
    for plan in plans(network)[:3]:
        with highest(network) as found:
            _, report = run(network, memory_budget=plan.peak_bytes / GIB)
        measured[report.inference.memory.offloaded] = found
    output = report.inference.memory.host_bytes // 2
    assert output == 2 * IMAGES[:, :, 0, 0, 0].numel() * (SPECIAL + 6) * DIM * 4
    nothing, first, both = (measured[offloaded] for offloaded in ((), (1,), (1, 3)))
    # Layer 1 is gone as the last block runs; layer 3 only when that is done.
    assert nothing[0] - first[0] == pytest.approx(output, rel=0.01)
    assert first[0] == pytest.approx(both[0], rel=0.01)
    assert nothing[1] - first[1] == pytest.approx(output, rel=0.01)
    assert first[1] - both[1] == pytest.approx(output, rel=0.01)


@pytest.mark.usefixtures("tight", "away", "unverified")
@pytest.mark.parametrize("case", ["attention", "mlp", "stride"])
def test_what_is_alive_as_the_blocks_run_is_what_the_plan_says(case: str, monkeypatch: pytest.MonkeyPatch):
    """With kernels that hold nothing but their results, as they do on GPUs; which part is highest is the name."""
    covisibility = svggt_kernels.Core(2, by=None, coarse=3, stride=1) if case == "stride" else "all"

    def add(x: Tensor, y: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x).addcmul_(y, gamma)

    def add_and_normalise(
        x: Tensor, y: Tensor, gamma: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, out: Tensor
    ) -> Tensor:
        return F.layer_norm(add(x, y, gamma, out), norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def attend(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        return out, query.new_empty(query.shape[:3])

    monkeypatch.setattr(memory, "TOKENS_TOGETHER", 64 if case == "mlp" else 16)
    monkeypatch.setattr(blocks, "add_scaled", add)
    monkeypatch.setattr(blocks, "add_scaled_and_normalise", add_and_normalise)
    monkeypatch.setattr(blocks, "gelu_", lambda x: x)
    monkeypatch.setattr(blocks, "normalise_and_rotate_", lambda qkv, *arguments: qkv)
    monkeypatch.setattr(attention, "_attend", attend)
    monkeypatch.setattr(attention, "merge", lambda outs, lses: attend(outs[0]))
    network = model()
    for plan in plans(network, covisibility)[:3]:
        with highest(network) as found:
            _, report = run(network, covisibility=covisibility, memory_budget=plan.peak_bytes / GIB)
        weights = sum(x.nbytes for x in (*network.parameters(), *network.buffers(), IMAGES))
        planned = plan.moments["last block"] - weights
        assert 0.9 * planned < found[0] <= planned, report.inference.memory


@pytest.mark.usefixtures("tight", "away")
@pytest.mark.parametrize("budget", [1.0, None])
def test_within_a_budget_heads_are_verified_before_all_frames_run(
    budget: float | None, monkeypatch: pytest.MonkeyPatch
):
    """Beside the outputs of all frames a verification would take memory that no plan counts."""
    network = model()
    events: list[str | int] = []
    aggregate, verify, may_run = fused_forward.aggregate, proofs.verify, fused_forward.FusedForward._may_run_fused

    def aggregated(aggregator: nn.Module, images: Tensor, *rest: object, **options: object) -> None:
        events.append(images.shape[1])
        aggregate(aggregator, images, *rest, **options)

    def verified(module: nn.Module, *rest: object) -> Verification:
        events.append(type(module).__name__)
        return verify(module, *rest)

    def asked(self: fused_forward.FusedForward, head: nn.Module, *rest: object) -> str | None:
        events.append(f"asked for {type(head).__name__}")
        return may_run(self, head, *rest)

    monkeypatch.setattr(fused_forward, "aggregate", aggregated)
    monkeypatch.setattr(proofs, "verify", verified)
    monkeypatch.setattr(fused_forward.FusedForward, "_may_run_fused", asked)
    run(network, memory_budget=budget)
    first = [event for event in events[: events.index(IMAGES.shape[1])] if isinstance(event, str)]
    beforehand = ["asked for DPTHead", "CameraHead"] if budget else []
    assert [event for event in first if event != "Aggregator"] == beforehand
    assert events.count("CameraHead") == events.count("Aggregator") == 1


@pytest.mark.usefixtures("tight")
def test_a_copy_of_a_patched_model_keeps_its_budget():
    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", memory_budget=2.0) as handle:
        expected = network(IMAGES)
        other = copy.deepcopy(network)
        assert torch.equal(other(IMAGES)["depth"], expected["depth"])
        assert svggt_kernels.Patch.of(other).report().inference.memory == handle.report().inference.memory
        assert svggt_kernels.Patch.of(other) is not handle


def test_the_report_tells_the_plan(tight):
    network = model()
    _, report = run(network, memory_budget=1)
    assert "no layer output in host memory; 64 tokens of a block and 8 frames of heads run together" in str(report)
    _, report = run(network, memory_budget=report.inference.memory.peak_bytes / GIB - 1e-9)
    assert "layer outputs 1 in host memory" in str(report)
    assert run(network)[1].inference.memory is None


def test_what_a_budget_cannot_do_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch):
    network, ran = model(), []
    network.aggregator.patch_embed.register_forward_hook(lambda *_: ran.append(1))
    patch = svggt_kernels.patch
    with patch(network, covisibility="all", memory_budget=1.0):
        with pytest.raises(ValueError, match=r"inference.*torch.no_grad"):
            network(IMAGES)
        with torch.no_grad(), pytest.raises(ValueError, match=r"inference.*model.eval"):
            network.train()(IMAGES)
        network.eval()
        with monkeypatch.context() as tried, torch.no_grad():
            tried.setattr(memory, "DEVICES", ("cuda", "cpu"))
            with pytest.raises(ValueError, match=r"at least 1.1 GiB for 6 frames of 11 tokens in each"):
                network(IMAGES)
    for budget in (8.0, "auto"):  # nothing can wait in another memory than the one that a CPU computes in
        with torch.no_grad(), patch(network, covisibility="all", memory_budget=budget):
            with pytest.raises(ValueError, match=r"kept on CUDA.*images are on cpu.*memory_budget=None"):
                network(IMAGES)
    assert ran == []
    with pytest.raises(ValueError, match=r"memory_budget is kept by the fused forward; leave fused=None"):
        patch(network, memory_budget=8, fused=False)
    with pytest.raises(ValueError, match=r"Aggregator is not .no head says which layers it reads"):
        patch(network.aggregator, covisibility="all", memory_budget=8)
    with pytest.raises(ValueError, match='outputs="all"'):
        patch(network, covisibility="all", memory_budget=8, outputs="all")
    with pytest.raises(ValueError, match="needs a model of VGGT's shape"):
        patch(FAMILY["pi3"].create(), covisibility="all", memory_budget=8)


def test_a_budget_that_the_models_own_forward_would_not_keep_is_refused(tight):
    network, ran = model(), []
    hook = network.aggregator.frame_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", memory_budget=1):
        with pytest.raises(ValueError, match=r"fused forward, which cannot run: there is a hook on frame_blocks.0;"):
            network(IMAGES)
        assert ran == []
        hook.remove()
        network(IMAGES)


def test_a_forward_that_raised_leaves_nothing_behind(tight, away, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyError("an attention failed")

    network = model()
    with torch.no_grad(), svggt_kernels.patch(network, covisibility="all", memory_budget=1) as handle:
        expected = network(IMAGES)
        with monkeypatch.context() as broken:
            broken.setattr(GraphAttention, "_run", fail)
            with pytest.raises(KeyError):
                network(IMAGES)
        assert handle._own._outputs is None and handle._own._attend is None
        assert torch.equal(network(IMAGES)["depth"], expected["depth"])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["upstream", "bf16"])
def test_offloading_on_cuda_is_exact_and_within_its_budget(precision: str, monkeypatch: pytest.MonkeyPatch):
    """Frames are many enough that copies are still under way when the next block begins."""
    monkeypatch.setattr(memory, "WORKSPACE", 64 * 2**20)
    images = torch.rand(2, 150, 3, 224, 224, device="cuda")
    network = model().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        free, _ = run(network, images, precision=precision, memory_budget=70)
        expected = {name: value.clone() for name, value in free.items()}
        del free
        budget = 70.0
        for offloaded in ((), (1,), (1, 3)):
            for _ in range(3):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                planned, report = run(network, images, precision=precision, memory_budget=budget)
                assert report.inference.memory.offloaded == offloaded
                used = torch.cuda.max_memory_allocated() - before
                for name, value in expected.items():
                    assert torch.equal(planned[name], value), (name, offloaded)
                del planned
            budget = (report.inference.memory.peak_bytes - 1) / GIB
            present = sum(x.nbytes for x in (*network.parameters(), *network.buffers(), images))
            assert used <= report.inference.memory.peak_bytes - present
