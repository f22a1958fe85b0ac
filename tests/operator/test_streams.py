"""What is kept may be read on any CUDA stream: with doubles of streams, and with streams where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.streams import StreamOrder

CUDA = torch.device("cuda", 0)


class Stream:
    """A stream that notes what it was asked for."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited_for: list[str] = []
        self.events = 0

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events} of stream {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waited_for.append(event)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream, and whether a CUDA graph captures it."""
    state = SimpleNamespace(stream=Stream(0), capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def tensor_read_by(readers: list[int]) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, record_stream=lambda stream: readers.append(stream.cuda_stream))


def test_another_stream_waits_each_time_and_is_told_to_the_allocator_once(now: SimpleNamespace):
    order, readers = StreamOrder(), []
    kept = lambda: [tensor_read_by(readers), torch.zeros(1)]  # noqa: E731
    first, second = now.stream, Stream(1)
    order.before_use(CUDA, kept)
    order.after_making(CUDA)
    order.before_use(CUDA, kept)
    assert not first.waited_for and not readers
    now.stream = second
    for _ in range(2):
        order.before_use(CUDA, kept)
    assert second.waited_for == ["event 1 of stream 0"] * 2 and readers == [1]


def test_what_a_second_stream_makes_comes_after_what_the_first_made(now: SimpleNamespace):
    order, readers = StreamOrder(), []
    first, second, third = now.stream, Stream(1), Stream(2)
    for stream in (first, second):
        now.stream = stream
        order.before_use(CUDA, lambda: [tensor_read_by(readers)])
        order.after_making(CUDA)
    for stream in (first, third):
        now.stream = stream
        order.before_use(CUDA, lambda: [tensor_read_by(readers)])
    assert second.waited_for == ["event 1 of stream 0"]
    assert first.waited_for == third.waited_for == ["event 1 of stream 1"]
    assert readers == [1, 0, 2]


def test_a_cuda_graph_waits_for_nothing_outside(now: SimpleNamespace):
    order = StreamOrder()
    order.after_making(CUDA)
    now.stream, now.capturing = Stream(1), True
    order.before_use(CUDA, list)
    assert not now.stream.waited_for


def test_a_layout_keeps_its_runs_and_tables_for_both_directions():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 10, special_tokens=1)
    q, k, v = (torch.randn(1, 2, 30, 16, requires_grad=True) for _ in "qkv")
    block_sparse_attention(q, k, v, layout, backend="reference")
    kept = {id(tensor) for tensor in layout.kept()}
    assert {id(tensor) for tables in layout.tables.values() for tensor in tables} <= kept
    assert {id(tensor) for tensor in layout.runs} <= kept
    other = layout.transposed()
    assert other.order is layout.order
    assert {id(tensor) for tensor in other.runs} <= {id(tensor) for tensor in layout.kept()}


@pytest.mark.gpu
@pytest.mark.parametrize("coarse", [False, True], ids=["in full", "some coarsely"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_layout_made_on_a_busy_stream_serves_another_at_once(training: bool, coarse: bool):
    both = CoarseGraph.core(8, [0], [2, 5], stride=2).to("cuda")
    graph = CovisibilityGraph.sequential(8, 2).to("cuda")
    q, k, v = (torch.randn(1, 4, 1600, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")

    def make() -> BlockLayout | CoarseLayout:
        if coarse:
            return CoarseLayout.from_graph(both, (15, 13), special_tokens=5)
        return BlockLayout.from_graph(graph, 200, special_tokens=5)

    def run(layout: BlockLayout | CoarseLayout) -> torch.Tensor:
        leaves = [x.detach().requires_grad_(training) for x in (q, k, v)]
        out = block_sparse_attention(*leaves, layout)
        return torch.cat(torch.autograd.grad(out.sum(), leaves)) if training else out

    expected = run(make())
    torch.cuda.synchronize()
    layout = make()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(10**9)  # about half a second
        run(layout)
    with torch.cuda.stream(other):
        out = run(layout)
        del layout
    with torch.cuda.stream(busy):
        overwritten = [torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in (8, 32, 128, 512)] * 8
    torch.cuda.synchronize()
    assert torch.equal(out, expected) and overwritten
