"""The Triton backend: compiled where there is a GPU, in Triton's interpreter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device_waits import no_device_waits
from layouts import random_coarse_layout, random_layout
from tiers import every

import svggt_kernels.backends.triton as backend
from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.proof import BUDGET, within_budget

pytest.importorskip("triton", reason="triton is not installed")

ON_GPU = torch.cuda.is_available()
# The interpreter runs every head in Python.
HEADS = None if ON_GPU else 2
DTYPES = [torch.float16, torch.float32, torch.bfloat16] if ON_GPU else [torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not ON_GPU:
        monkeypatch.setattr(backend, "INTERPRETED", True)
    yield "cuda" if ON_GPU else "cpu"


@pytest.mark.parametrize(
    ("dtype", "descriptors"),
    [(dtype, descriptors) for dtype in DTYPES for descriptors in (True, False) if descriptors or dtype.itemsize == 2],
    ids=lambda value: {True: "descriptors", False: "pointers"}.get(value, str(value).removeprefix("torch.")),
)
@pytest.mark.parametrize("start", every(4, range(0, 501 if ON_GPU else 12, 3)))
def test_fuzz_against_float64(
    start: int, dtype: torch.dtype, descriptors: bool, device: str, monkeypatch: pytest.MonkeyPatch
):
    if not descriptors:
        monkeypatch.setattr(backend, "uses_descriptors", lambda device, dtype: False)
    for seed in range(start, start + 3):
        ratios = error_ratios(
            random_layout(seed, max_tokens=400 if ON_GPU else 80, device=device),
            dtype,
            head_size=(64, 32, 128)[seed % 3],
            backend="triton",
            batch=1 + seed % 2,
            heads=HEADS,
            seed=seed,
        )
        assert within_budget(ratios), (seed, ratios)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", every(4, range(100 if ON_GPU else 8)))
def test_keys_at_a_stride(seed: int, dtype: torch.dtype, device: str):
    layout = random_coarse_layout(seed, max_side=30 if ON_GPU else 6, device=device)
    ratios = error_ratios(layout, dtype, backend="triton", heads=HEADS, seed=seed)
    assert within_budget(ratios), ratios


@pytest.mark.parametrize("tail", every(4, range(1, 128, 1 if ON_GPU else 21)))
def test_every_tail_length(tail: int, device: str):
    graph = CovisibilityGraph.from_pairs(3, [(0, 2), (2, 0)]).to(device)
    layout = BlockLayout.from_graph(graph, 64 + tail)
    assert within_budget(error_ratios(layout, torch.float16, backend="triton", heads=HEADS, seed=tail))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the special queries do see the NaNs
def test_what_is_not_visible_is_never_read(device: str):
    graph = CovisibilityGraph.from_pairs(4, [(0, 2), (2, 0)]).to(device)
    layout = BlockLayout.from_graph(graph, 70, special_tokens=3)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 64, device=device, dtype=torch.float16) for _ in range(3))
    clean = block_sparse_attention(q, k, v, layout, backend="triton")
    rows = slice(3, 70)
    hidden = ~layout.to_dense()[rows].any(0)
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    poisoned = block_sparse_attention(q, k, v, layout, backend="triton")
    assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])


def test_a_row_that_sees_nothing_gives_zero_and_an_unseen_key_zero_gradient(device: str):
    graph = CovisibilityGraph.from_pairs(3, [(0, 0), (2, 0), (2, 1)], num_key_frames=3).to(device)
    layout = BlockLayout.from_graph(graph, 20)
    q, k, v = (torch.randn(1, 1, 60, 32, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3))
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    dq, dk, dv = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    blind, unseen = slice(20, 40), slice(40, 60)
    assert bool((out[:, :, blind] == 0).all()) and bool((lse[:, :, blind] == -torch.inf).all())
    assert all(bool((x == 0).all()) for x in (dq[:, :, blind], dk[:, :, unseen], dv[:, :, unseen]))


def differentiated(q, k, v, layout, weights, **options) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*inputs, layout, **options)
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("case", ["offset", "last stride", "broadcast"])
def test_inputs_that_descriptors_cannot_read(case: str, device: str):
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(2).to(device), 70)
    wide = torch.randn(1, 2, 140, 65, device=device, dtype=torch.float16)
    x = {
        "offset": wide[..., 1:],
        "last stride": wide[..., :64].mT.contiguous().mT,
        "broadcast": wide[:, :1, :, :64].expand(1, 2, 140, 64),
    }[case]
    weights = torch.randn_like(wide[..., :64])
    plain = x.contiguous()
    expected = differentiated(plain, plain, plain, layout, weights, backend="triton")
    for actual, reference in zip(differentiated(x, x, x, layout, weights, backend="triton"), expected, strict=True):
        assert torch.equal(actual, reference)


def test_gradients_do_not_depend_on_asking_for_the_lse(device: str):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1).to(device), 70, special_tokens=2)
    q, k, v, weights = (torch.randn(1, 2, 210, 64, device=device, dtype=torch.float16) for _ in range(4))
    without = differentiated(q, k, v, layout, weights, backend="triton")
    for a, b in zip(without, differentiated(q, k, v, layout, weights, backend="triton", return_lse=True), strict=True):
        assert torch.equal(a, b)
    assert without[0].transpose(1, 2).is_contiguous()


def test_the_error_of_the_lse_does_not_grow_with_the_number_of_tiles(device: str):
    """All scores of a row but the largest are equal, so that rounding errs to the same side tile after tile."""
    frames, tokens, rows = 10, 1024, 32
    graph = CovisibilityGraph.from_pairs(1, [(0, j) for j in range(frames)], num_key_frames=frames).to(device)
    layout = BlockLayout.from_graph(graph, rows, key_tokens_per_frame=tokens)
    q, k = torch.zeros(1, 1, rows, 32, device=device), torch.zeros(1, 1, frames * tokens, 32, device=device)
    q[..., 0], k[:, :, 0, 0] = torch.linspace(1, 20, rows), 1
    _, lse = block_sparse_attention(q, k, k, layout, return_lse=True, backend="triton")
    exact, plain = ((q.to(dtype) @ k.to(dtype).mT * 32**-0.5).logsumexp(-1) for dtype in (torch.float64, torch.float32))
    error, allowed = (float((x.double() - exact).square().mean().sqrt()) for x in (lse, plain))
    rounding = torch.finfo(torch.float32).eps / 2 * float(exact.square().mean().sqrt())
    assert error <= BUDGET * max(allowed, rounding), (error, allowed)


@pytest.mark.parametrize("scale", every(2, [0.7, 0.0, -0.3]))
def test_scale(scale: float, device: str):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1).to(device), 70, special_tokens=2)
    ratios = error_ratios(layout, torch.float16, head_size=32, scale=scale, backend="triton", heads=HEADS)
    assert within_budget(ratios), ratios


def test_refuses_what_it_cannot_run(device: str):
    where = torch.device(device)
    assert backend.unsupported(where, torch.float16, 64) is None
    assert "float16, bfloat16 and float32, got torch.float64" in str(backend.unsupported(where, torch.float64, 64))
    assert "head sizes 32, 64, 128, got 48" in str(backend.unsupported(where, torch.float16, 48))
    assert "needs a CUDA device" in str(backend.unsupported(torch.device("mps"), torch.float16, 64))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_cuda_graph_replays_forward_and_backward():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(8, 1).to("cuda"), 100, special_tokens=5)
    q, k, v = (
        torch.randn(1, 4, layout.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def step() -> tuple[torch.Tensor, ...]:
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        return out, *torch.autograd.grad(out.float().sum(), (q, k, v))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_no_host_sync():
    graph = CovisibilityGraph.sequential(8, 1).to("cuda")
    q, k, v = (torch.randn(1, 4, 800, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    warm = BlockLayout.from_graph(graph, 100, special_tokens=5)
    block_sparse_attention(q, k, v, warm, backend="triton").sum().backward()
    torch.cuda.synchronize()
    with no_device_waits():
        layout = BlockLayout.from_graph(graph, 100, special_tokens=5)
        block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()


@pytest.mark.gpu
def test_full_size_is_bitwise_repeatable_and_right():
    """S = 64 x 1374, checked on sampled frames against float64."""
    graph = CovisibilityGraph.sequential(64, 2).to("cuda")
    layout = BlockLayout.from_graph(graph, 1374, special_tokens=5)
    q, k, v = (
        torch.randn(1, 16, layout.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    weights = torch.randn_like(q)

    def run() -> tuple[torch.Tensor, ...]:
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
        return out, lse, *torch.autograd.grad(out, (q, k, v), weights)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    head = [x[:, :1].detach().double() for x in (q, k, v)]
    exact = block_sparse_attention(*head, layout, backend="reference")
    plain = block_sparse_attention(*(x.bfloat16() for x in head), layout, backend="reference")
    errors = [float((x[:, :1].detach().double() - exact).square().mean().sqrt()) for x in (first[0], plain)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """1600 frames of 1374 tokens in 16 heads of 64: 2.25e9 elements. The last frames must match a small problem."""
    frames, tokens = 1600, 1374
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(frames, 1).to("cuda"), tokens)
    q, k, v = (torch.randn(1, 16, frames * tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    last = BlockLayout.from_graph(CovisibilityGraph.sequential(2, 1).to("cuda"), tokens)
    part = [x[:, -1:, -2 * tokens :] for x in (q, k, v)]
    expected = block_sparse_attention(*part, last, backend="triton")
    assert torch.equal(out[:, -1:, -tokens:], expected[:, :, -tokens:])


@pytest.mark.gpu
def test_gradients_beyond_two_to_the_31():
    """As above, backward: only the last frame's output has a gradient, so few frames matter."""
    frames, tokens = 1600, 1374
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(frames, 0).to("cuda"), tokens)
    q, k, v = (
        torch.randn(1, 16, frames * tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    weights = torch.zeros_like(q)
    weights[:, -1, -tokens:] = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    gradients = torch.autograd.grad(block_sparse_attention(q, k, v, layout, backend="triton"), (q, k, v), weights)
    alone = BlockLayout.from_graph(CovisibilityGraph.sequential(1, 0).to("cuda"), tokens)
    part = [x[:, -1:, -tokens:].detach().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*part, alone, backend="triton")
    for actual, expected in zip(gradients, torch.autograd.grad(out, part, weights[:, -1:, -tokens:]), strict=True):
        assert torch.equal(actual[:, -1:, -tokens:], expected)
        assert not actual[:, :-1].any()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_capture_needs_a_prepared_layout():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(2, 1).to("cuda"), 70)
    q = torch.randn(1, 1, 140, 64, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="prepare"), torch.cuda.graph(graph):
        block_sparse_attention(q, q, q, layout, backend="triton")
