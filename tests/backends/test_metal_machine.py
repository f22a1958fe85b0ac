"""What a Mac would run, on tensors that only say they are on an Apple GPU; the shader runs in the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from metal import emulator
from metal.pretend import MPS, AppleGpu, held, move
from tiers import full
from tiny import SIZE, megaloc
from torch import Tensor

from svggt_kernels import (
    BlockLayout,
    Core,
    CovisibilityGraph,
    attention,
    block_sparse_attention,
    merging,
    patch,
)
from svggt_kernels.backends import metal
from svggt_kernels.backends.metal import shader, trial
from svggt_kernels.cli import check, main
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.measure import machine
from svggt_kernels.sources import MegaLocSimilarity

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="the emulator needs g++")

OWN = {
    "attention": attention._attention,
    "attention_backward": attention._attention_backward,
    "merge": merging._merge,
}


class Library(emulator.Library):
    """The emulator, given tensors that say they are on an Apple GPU."""

    def __init__(self, text: str) -> None:
        super().__init__(text, schedules=1)
        for name, kernel in list(vars(self).items()):
            setattr(self, name, Kernel(kernel))


class Kernel:
    def __init__(self, kernel: emulator.EmulatedKernel) -> None:
        self.kernel = kernel
        self.max_threads_per_threadgroup = kernel.max_threads_per_threadgroup
        self.thread_execution_width = kernel.thread_execution_width

    def __call__(self, *arguments: object, **options: list[int]) -> None:
        on_cpu = [x for x in arguments if isinstance(x, Tensor) and x.device != MPS]
        assert not on_cpu, "torch refuses tensors of the CPU"
        self.kernel(*map(held, arguments), **options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[AppleGpu]:
    monkeypatch.setattr(torch.mps, "compile_shader", Library)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(shader, "_libraries", {})
    monkeypatch.setattr(trial, "_failures", {})
    monkeypatch.setattr(trial, "_milliseconds", {})
    monkeypatch.setenv(trial.VARIABLE, "metal")
    with AppleGpu(OWN) as entered:
        yield entered


class TestPretending:
    """A test of the tests: what fails on a Mac fails here."""

    def test_tensors_of_two_devices(self, gpu):
        with pytest.raises(RuntimeError, match="of the CPU and of the Apple GPU"):
            torch.ones(3).to("mps") + torch.ones(3)

    @pytest.mark.parametrize("make", [lambda x: x.double(), lambda x: x.to(torch.float64)])
    def test_there_is_no_float64(self, gpu, make):
        with pytest.raises(TypeError, match="Apple's GPUs have no"):
            make(torch.ones(3).to("mps"))

    @pytest.mark.parametrize("run", [lambda x: x.cumsum(0), lambda x: x.sort(), lambda x: x.sum()])
    def test_gaps_of_integers(self, gpu, run):
        run(torch.ones(3).to("mps"))
        with pytest.raises(NotImplementedError, match="has gaps on Apple's GPUs"):
            run(torch.arange(3).to("mps"))

    def test_numpy_needs_a_copy(self, gpu):
        with pytest.raises(TypeError, match="copied to the CPU first"):
            torch.ones(3).to("mps").numpy()
        assert torch.ones(3).to("mps").cpu().numpy().sum() == 3


@pytest.mark.parametrize("backend", ["metal", "reference"])
def test_forward_and_backward(backend: str, gpu: AppleGpu):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 12, special_tokens=2)
    here = [torch.randn(1, 2, 36, 64) for _ in range(3)]
    there = [x.to("mps").requires_grad_() for x in here]
    out, lse = block_sparse_attention(*there, layout.to("mps"), return_lse=True, backend=backend)
    found = [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), there)]
    here = [x.requires_grad_() for x in here]
    out, lse = block_sparse_attention(*here, layout, return_lse=True, backend="reference")
    expected = [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), here)]
    assert all(x.device == MPS for x in found)
    torch.testing.assert_close([x.cpu() for x in found], expected)


def test_a_layout_whose_graph_is_on_the_gpu(gpu: AppleGpu):
    graph = CovisibilityGraph.sequential(3, 1)
    layout = BlockLayout.from_graph(graph.to("mps"), 12)
    assert [x.cpu().tolist() for x in layout.runs] == [x.tolist() for x in BlockLayout.from_graph(graph, 12).runs]


@pytest.mark.parametrize("how", ["tokens", "megaloc"])
@torch.no_grad()
def test_a_patched_model(how: str, gpu: AppleGpu):
    """Every frame sees every other, so the model must give what it gives without a patch."""
    model, describer = RoomsModel(dim=128, depth=2, num_heads=2), megaloc()
    images = torch.rand(4, 3, 56, 70)
    expected = model(images)
    move(model)
    move(describer)
    covisibility = MegaLocSimilarity(weights=describer, size=SIZE) if how == "megaloc" else how
    with patch(model, covisibility=covisibility) as handle:
        found = model(images.to("mps"))
    assert handle.report().backend == "metal"
    assert ("_upsample_bilinear2d_aa" in gpu.called) == (how == "megaloc")
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, msg=lambda text, name=name: f"{name}: {text}")


@full
@torch.no_grad()
def test_chunks_of_a_patched_model(gpu: AppleGpu):
    """Chunks of 2 frames see themselves, 2 frames that are kept in full, and 2 at a stride."""
    model = RoomsModel(dim=128, depth=2, num_heads=2).eval()
    images, core = torch.rand(6, 3, 28, 42), Core(2, by=None, coarse=2, stride=2)
    with patch(model, covisibility=core, backend="reference"):
        expected = model(images)
    move(model)
    with patch(model, covisibility=core, chunk=2, backend="metal") as handle:
        found = model(images.to("mps"))
    report = handle.report()
    assert (report.backend, report.chunks.chunks) == ("metal", 1)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, msg=lambda text, name=name: f"{name}: {text}")


def test_check_prints_a_line_for_an_issue(gpu: AppleGpu, monkeypatch: pytest.MonkeyPatch, capsys):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 12, special_tokens=2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(check, "layouts", lambda: {"small": layout})
    monkeypatch.setattr(trial, "_time", lambda run: 1.5)
    monkeypatch.setattr(metal, "HEAD_SIZES", (64,))
    monkeypatch.setattr(metal, "DTYPES", (torch.float16,))
    for module in (check, machine):
        monkeypatch.setattr(module, "DTYPES", (torch.float16,))
    assert main(["check", "--device", "mps"]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [kernel["failure"] for kernel in line["kernels"]] == [None]
    assert line["kernels"][0]["milliseconds"] == {"metal": 1.5, "pytorch": 1.5}
    assert set(line["errors"]) == {"metal", "reference"}
    assert {"chip", "macos", "versions"} <= set(line)
