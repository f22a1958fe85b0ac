"""CUDA graphs of patched models: what they read outlives other graphs and the patch, as long as the handle lives."""

from __future__ import annotations

import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

from svggt_kernels import CovisibilityGraph, patch
from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.models import ForwardInputs, stated_record
from svggt_kernels.patching import plan
from svggt_kernels.patching.plan import LAYOUTS_KEPT, Forward, Planner

FRAMES = 6


def graphs(number: int, device: str = "cpu") -> list[CovisibilityGraph]:
    return [CovisibilityGraph.sequential(FRAMES, 1 + i % 4).to(device) for i in range(number)]


@pytest.mark.parametrize("captured", [True, False])
def test_a_layout_that_was_captured_is_kept_past_others_and_past_the_end(
    captured: bool, monkeypatch: pytest.MonkeyPatch
):
    record = stated_record("a model", tokens_per_frame=4, special_tokens=0, trailing_tokens=0)
    query = SimpleNamespace(shape=(1, 1, 4 * FRAMES, 8), device=torch.device("cpu"))
    given: list[CovisibilityGraph] = []
    planner = Planner(record, lambda images: given[-1], dense_special=True)

    def layout_of(graph: CovisibilityGraph) -> object:
        given.append(graph)
        forward = Forward(ForwardInputs(None, FRAMES))
        planner.begin(forward)
        planner.plan(forward, "attention", query, lambda: ())
        return forward.layouts[0]

    monkeypatch.setattr(plan, "is_capturing", lambda device: captured)
    layout = weakref.ref(layout_of(graphs(1)[0]))
    monkeypatch.setattr(plan, "is_capturing", lambda device: False)
    for graph in graphs(LAYOUTS_KEPT + 1):
        layout_of(graph)
    planner.forget()
    gc.collect()
    assert (layout() is not None) == captured


def test_a_copy_keeps_nothing_that_was_captured_elsewhere():
    planner = Planner(stated_record("a", tokens_per_frame=4, special_tokens=0, trailing_tokens=0), graphs(1)[0], True)
    planner._captured.add(object())
    assert not pickle.loads(pickle.dumps(planner))._captured


@pytest.mark.gpu
def test_a_captured_forward_replays_after_other_graphs_and_after_undo():
    model = RoomsModel.create(dim=128, depth=2, num_heads=2).cuda().bfloat16()
    images = torch.rand(FRAMES, 3, 56, 70, device="cuda", dtype=torch.bfloat16)
    first, *others = graphs(LAYOUTS_KEPT + 2, "cuda")
    chosen = [first]
    with torch.no_grad(), patch(model, covisibility=lambda images: chosen[0]) as handle:
        with torch.cuda.stream(torch.cuda.Stream()):
            model(images)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = model(images)["depth"]
        captured.replay()
        expected = out.clone()

        def assert_replays() -> None:
            gc.collect()
            overwritten = [torch.full((size,), 2**20, dtype=torch.int32, device="cuda") for size in range(1, 200)]
            out.zero_()
            captured.replay()
            assert torch.equal(out, expected) and overwritten

        for chosen[0] in others:
            model(images)
        assert_replays()
        handle.undo()
        assert_replays()
