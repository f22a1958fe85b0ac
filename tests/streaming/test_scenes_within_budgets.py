"""A scene within a memory budget: how many frames a chunk has, and what cannot be kept."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from svggt_kernels import CoarseGraph, Core, CovisibilityGraph, open_scene, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.inference import memory
from svggt_kernels.patching.chunks.attention import CoreAttention
from svggt_kernels.patching.chunks.budget import Budget

pytestmark = pytest.mark.filterwarnings("ignore:.* may share nothing with the core:UserWarning")  # random weights

FRAMES = torch.rand(12, 3, 28, 42, generator=torch.Generator().manual_seed(0))
CORE = [0, 4, 8]


def toy() -> nn.Module:
    return RoomsModel.create(0, dim=64, depth=2, num_heads=1)


@pytest.fixture
def budgets_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans follow from sizes, so they can be made without a GPU; with less beside them, so that tiny sizes count."""
    monkeypatch.setattr(memory, "DEVICES", ("cpu",))
    monkeypatch.setattr(memory, "WORKSPACE", 0)


def least_budget() -> float:
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        open_scene(toy(), FRAMES, core=CORE, memory_budget=1e-6)
    return float(re.findall(r"at least ([\d.]+) GiB", str(caught.value))[0])


def test_most_frames_are_as_many_as_fit():
    def sizes(frames: int) -> memory.Sizes:
        return memory.Sizes(
            samples=1, frames=frames, tokens=1041, channels=1024, pixels=518 * 392, depth=24, layers=(4, 11, 17, 23),
            heads=2, wide=4, residual=4, product=2, present=2**32, casts=2**31,
        )  # fmt: skip

    def peak(frames: int) -> int:
        return memory.make_plan(sizes(frames), 2**50).peak_bytes

    most = memory.most_frames(sizes, 16 * 2**30, 256)
    assert peak(most) <= 16 * 2**30 < peak(most + 1)
    assert memory.most_frames(sizes, peak(20), 256) == memory.FEW  # 20 in full, more with layer outputs in host memory
    assert memory.most_frames(sizes, peak(20), 24) == 24
    assert memory.most_frames(sizes, 2**30, 256) == 1
    assert memory.most_frames(sizes, 2**50, 256) == 256


def test_chunks_follow_the_budget(budgets_on_the_cpu: None):
    least = least_budget()
    expected = open_scene(toy(), FRAMES, core=CORE, fused=True).predict()
    chunks = []
    for budget in (least, 1.2 * least, 50.0):
        scene = open_scene(toy(), FRAMES, core=CORE, memory_budget=budget)
        chunks.append(scene.chunk)
        torch.testing.assert_close(scene.predict(), expected, rtol=1e-4, atol=1e-5)
    assert chunks == sorted(chunks)
    assert chunks[-1] == 256
    assert open_scene(toy(), FRAMES, core=CORE, memory_budget=50, chunk=5).chunk == 5


def test_chunks_are_as_large_with_what_is_free_as_with_a_number(
    budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
):
    budget = 0.02
    scene = open_scene(toy(), FRAMES, core=CORE, memory_budget=budget)
    session = scene.session
    assert session.budget is not None and memory.FEW < scene.chunk < 256
    weights_and_image = session.budget.own.sizes((1, 1, *FRAMES.shape[1:]), 4, 11).present
    free = int(budget * memory.GIB) - weights_and_image - session.attention.kept_bytes
    monkeypatch.setattr(memory, "allowed", lambda budget, device, present: present + free)
    session.budget.gib = "auto"
    assert session.frames_of_chunk(scene.core_frames) == scene.chunk


def test_parts_of_another_core_do_not_count(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    planned, make_plan = [], memory.make_plan
    monkeypatch.setattr(memory, "make_plan", lambda sizes, budget: planned.append(sizes) or make_plan(sizes, budget))
    graphs = [CoarseGraph.core(12, [0, 4], [8], stride=2), CovisibilityGraph.core(12, [0, 4])]
    with torch.no_grad(), patch(toy(), covisibility=lambda _: graphs.pop(0), chunk=5, memory_budget=50) as handle:
        model = handle._chunks.model
        model(FRAMES)
        assert planned[-1].parts == 2
        model(FRAMES)
        assert planned[-1].parts == 1


def test_a_chunk_that_does_not_fit_is_refused_before_it_runs(budgets_on_the_cpu: None):
    scene = open_scene(toy(), FRAMES, core=CORE, memory_budget=50, chunk=9)
    assert scene.session.budget is not None
    scene.session.budget.gib = 1e-3
    with pytest.raises(ValueError, match=r"for 6 frames and the keys of the core, got 0\.00 GiB"):
        scene.predict()


def test_a_budget_is_kept_to_the_byte(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    scene = open_scene(toy(), FRAMES, core=CORE, memory_budget=50, chunk=9)
    monkeypatch.setattr(Budget, "_beside_chunk", lambda self, sizes: 0)
    monkeypatch.setattr(memory, "least_bytes", lambda sizes: 50 * 2**30)
    scene.predict()
    monkeypatch.setattr(memory, "least_bytes", lambda sizes: 50 * 2**30 + 1)
    with pytest.raises(ValueError, match=r"at least 50\.1 GiB .* got 50\.00 GiB"):
        scene.predict()


def test_runs_that_describe_frames_keep_nothing(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    kept, beside_core = [], Budget._beside_core

    def watched(self: Budget, sizes: memory.Sizes, seen: int) -> int:
        kept.append(sizes.frames)
        return beside_core(self, sizes, seen)

    monkeypatch.setattr(Budget, "_beside_core", watched)
    open_scene(toy(), FRAMES, core=Core(3, by="tokens"), memory_budget=50)
    assert kept == [3]


def test_what_is_kept_of_the_core_counts(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    scene = open_scene(toy(), FRAMES, core=CORE, memory_budget=50)
    monkeypatch.setattr(CoreAttention, "kept_bytes", 40 * 2**30)  # and half of it for one of two layers
    assert scene.session.frames_of_chunk(scene.core_frames) == 1
    with pytest.raises(ValueError, match=r"memory_budget must be at least 60\.\d GiB"):
        scene.predict()


def test_frames_at_a_stride_count(budgets_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch):
    planned: list[memory.Sizes] = []
    make_plan = memory.make_plan

    def watched(sizes: memory.Sizes, budget: int) -> memory.Plan:
        planned.append(sizes)
        return make_plan(sizes, budget)

    monkeypatch.setattr(memory, "make_plan", watched)
    scene = open_scene(toy(), FRAMES, core=Core(3, by=None, coarse=4, stride=2), memory_budget=50)
    assert (planned[0].frames, planned[0].parts, planned[0].packed) == (7, 3, 4 * (5 + 1))
    assert scene.chunk == 256
    scene.predict()
    assert (planned[-1].parts, planned[-1].packed) == (2, 0)


def test_where_no_budget_can_be_kept():
    with pytest.raises(ValueError, match="kept on CUDA"):
        open_scene(toy(), FRAMES, core=CORE, memory_budget=8)
    with pytest.raises(ValueError, match="kept by the fused forward"):
        open_scene(toy(), FRAMES, core=CORE, memory_budget=8, fused=False)
    with pytest.raises(ValueError, match="positive number of GiB"):
        open_scene(toy(), FRAMES, core=CORE, memory_budget=-1)


@pytest.mark.gpu
def test_chunks_on_a_gpu_are_the_joint_forward_within_the_budget():
    model, frames = RoomsModel.create(0).cuda(), torch.rand(40, 3, 112, 154)
    core = list(range(0, 40, 5))
    exact = open_scene(RoomsModel.create(0).double(), frames, core=core, fused=False).predict()
    with torch.autocast("cuda", torch.bfloat16):
        plain = open_scene(model, frames, core=core, chunk=40).predict()
        torch.cuda.reset_peak_memory_stats()
        scene = open_scene(model, frames, core=core, memory_budget=3.0)
        chunked = scene.predict()
    assert scene.session.inference is not None
    assert scene.session.inference.reason is None
    assert torch.cuda.max_memory_allocated() <= 3 * 2**30
    for chunk in (chunked, open_scene(model, frames, core=core, chunk=7).predict()):
        for name in ("pose_enc", "depth"):
            budget = 2 * (plain[name].double() - exact[name]).norm()
            assert (chunk[name].double() - exact[name]).norm() <= budget, name
