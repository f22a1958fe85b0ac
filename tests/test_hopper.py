"""The Hopper backend against the reference; needs an H100 or H200."""

from __future__ import annotations

import pytest
import torch
from layouts import random_layout

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.backends import hopper
from svggt_kernels.verify import error_ratios, within_budget

NEEDED = hopper.unsupported(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16, 64)

gpu = [pytest.mark.gpu, pytest.mark.skipif(NEEDED is not None, reason=f"hopper cannot run here: {NEEDED}")]
KINDS = [("bounded", "deterministic"), ("bounded", "accumulated"), ("online", "deterministic")]


def test_says_what_it_cannot_run():
    assert "needs a CUDA device, got cpu" in str(hopper.unsupported(torch.device("cpu"), torch.bfloat16, 64))


@pytest.mark.parametrize(("choose", "what"), [(hopper.softmax, "softmax"), (hopper.gradients, "gradients")])
def test_an_unknown_kind_is_explained(choose, what: str):
    with pytest.raises(ValueError, match=f"{what} must be one of .*, got 'fastest'"), choose("fastest"):
        pass


def inputs(layout: BlockLayout, heads: int = 2, head_size: int = 64, dtype: torch.dtype = torch.bfloat16):
    q = torch.randn(1, heads, layout.num_tokens, head_size, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, heads, layout.num_key_tokens, head_size, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v


def band(frames: int, tokens: int, reach: int = 1, **options: object) -> BlockLayout:
    return BlockLayout.from_graph(CovisibilityGraph.sequential(frames, reach).to("cuda"), tokens, **options)


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize("kinds", KINDS, ids="-".join)
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("start", range(0, 500, 20))
    def test_fuzz_against_float64(self, start: int, head_size: int, kinds: tuple[str, str]):
        for seed in range(start, start + 20):
            layout = random_layout(seed, max_tokens=400, device="cuda")
            dtype = (torch.bfloat16, torch.float16)[seed % 2]
            with hopper.softmax(kinds[0]), hopper.gradients(kinds[1]):
                ratios = error_ratios(
                    layout, dtype, head_size=head_size, backend="hopper", batch=1 + seed % 3 // 2, seed=seed
                )
            assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize("tail", range(1, 128))
    def test_every_tail_length(self, tail: int):
        graph = CovisibilityGraph.from_pairs(3, [(0, 2), (2, 0)]).to("cuda")
        layout = BlockLayout.from_graph(graph, 128 + tail)
        assert within_budget(error_ratios(layout, torch.bfloat16, backend="hopper", seed=tail))

    def test_what_is_not_visible_is_never_read(self):
        graph = CovisibilityGraph.from_pairs(4, [(0, 2), (2, 0)]).to("cuda")
        layout = BlockLayout.from_graph(graph, 170, special_tokens=3)
        q, k, v = inputs(layout)
        clean = block_sparse_attention(q, k, v, layout, backend="hopper")
        rows = slice(3, 170)
        hidden = ~layout.to_dense()[rows].any(0)
        k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
        poisoned = block_sparse_attention(q, k, v, layout, backend="hopper")
        assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])

    @pytest.mark.parametrize("case", ["one huge score", "all very negative", "one head of many", "at the edge"])
    def test_rows_that_need_the_running_maximum(self, case: str):
        """Scores far outside what exp2 without a maximum can hold, against float64."""
        torch.manual_seed(0)
        layout = band(4, 300)
        q, k, v = inputs(layout, heads=4)
        if case == "one huge score":
            k[:, :, 350] = q[:, :, 400] * 60
        elif case == "all very negative":
            q, k = q.abs() + 3, -k.abs() - 3
        elif case == "one head of many":
            q[:, 2] *= 40
        else:
            # Row i has its largest score about i / 3, in units of log2: through both edges of the proof.
            direction = torch.nn.functional.normalize(torch.randn(64, device="cuda"), dim=0)
            k[:] = direction * 8
            wanted = torch.linspace(-200, 200, layout.num_tokens, device="cuda") / 1.4427
            q[:] = (wanted[:, None] * direction).to(q.dtype)
        exact = block_sparse_attention(*(x.double() for x in (q, k, v)), layout, return_lse=True, backend="sdpa")
        plain = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
        ours = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        for reference, other, mine in zip(exact, plain, ours, strict=True):
            allowed = 2 * (other.double() - reference).abs().max() + 2e-2 * reference.abs().max()
            assert bool(torch.isfinite(mine).all())
            assert (mine.double() - reference).abs().max() <= allowed

    @pytest.mark.parametrize("kind", ["deterministic", "accumulated"])
    def test_blind_rows_give_zero_and_unseen_keys_zero_gradients(self, kind: str):
        graph = CovisibilityGraph.from_pairs(3, [(0, 0), (2, 0), (2, 1)], num_key_frames=3).to("cuda")
        layout = BlockLayout.from_graph(graph, 150)
        leaves = [x.requires_grad_() for x in inputs(layout)]
        with hopper.gradients(kind):
            out, lse = block_sparse_attention(*leaves, layout, return_lse=True, backend="hopper")
            dq, dk, dv = torch.autograd.grad(out.float().square().sum(), leaves)
        blind, unseen = slice(150, 300), slice(300, 450)
        assert bool((out[:, :, blind] == 0).all()) and bool((lse[:, :, blind] == -torch.inf).all())
        assert all(bool((x == 0).all()) for x in (dq[:, :, blind], dk[:, :, unseen], dv[:, :, unseen]))

    def test_inputs_the_copy_engine_cannot_read(self):
        layout = band(2, 170)
        wide = torch.randn(1, 2, 340, 65, device="cuda", dtype=torch.bfloat16)
        for x in (wide[..., 1:], wide[..., :64].mT.contiguous().mT, wide[:, :1, :, :64].expand(1, 2, 340, 64)):
            plain = x.contiguous()
            expected = block_sparse_attention(plain, plain, plain, layout, backend="hopper")
            assert torch.equal(block_sparse_attention(x, x, x, layout, backend="hopper"), expected)

    def test_full_size_is_bitwise_repeatable_and_right(self):
        layout = band(64, 1374, 2, special_tokens=5)
        q, k, v = (x.requires_grad_() for x in inputs(layout, heads=16))
        weights = torch.randn_like(q)

        def run() -> tuple[torch.Tensor, ...]:
            out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
            return out, lse, *torch.autograd.grad(out, (q, k, v), weights)

        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        head = [x[:, :1].detach().double() for x in (q, k, v)]
        exact = block_sparse_attention(*head, layout, backend="sdpa")
        plain = block_sparse_attention(*(x.bfloat16() for x in head), layout, backend="sdpa")
        errors = [float((x[:, :1].detach().double() - exact).square().mean().sqrt()) for x in (first[0], plain)]
        assert errors[0] <= 2 * errors[1]

    @pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
    def test_cuda_graph_replays_forward_and_backward(self):
        layout = band(8, 200, special_tokens=5)
        q, k, v = (x.requires_grad_() for x in inputs(layout, heads=4))

        def step() -> tuple[torch.Tensor, ...]:
            out = block_sparse_attention(q, k, v, layout, backend="hopper")
            return out, *torch.autograd.grad(out.float().sum(), (q, k, v))

        with torch.cuda.stream(torch.cuda.Stream()):
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

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
    def test_no_host_sync(self):
        graph = CovisibilityGraph.sequential(8, 1).to("cuda")
        q, k, v = (torch.randn(1, 4, 800, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        warm = BlockLayout.from_graph(graph, 100, special_tokens=5)
        block_sparse_attention(q, k, v, warm, backend="hopper").sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layout = BlockLayout.from_graph(graph, 100, special_tokens=5)
            block_sparse_attention(q, k, v, layout, backend="hopper").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_offsets_beyond_two_to_the_31(self):
        frames, tokens = 1600, 1374
        layout = band(frames, tokens)
        q, k, v = inputs(layout, heads=16)
        out = block_sparse_attention(q, k, v, layout, backend="hopper")
        part = [x[:, -1:, -2 * tokens :] for x in (q, k, v)]
        expected = block_sparse_attention(*part, band(2, tokens), backend="hopper")
        assert torch.equal(out[:, -1:, -tokens:], expected[:, :, -tokens:])
