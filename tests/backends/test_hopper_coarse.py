"""Keys at a stride in one pass of the Hopper backend, against float64; needs an H100 or H200."""

from __future__ import annotations

import math

import pytest
import torch
from device_waits import no_device_waits
from layouts import random_coarse_layout
from tiers import every

from svggt_kernels import (
    BlockLayout,
    CoarseGraph,
    CoarseLayout,
    CovisibilityGraph,
    attention,
    block_sparse_attention,
    prepare,
)
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import _nvrtc as runtime
from svggt_kernels.backends import hopper
from svggt_kernels.backends.hopper import forward_pass
from svggt_kernels.coarse import KeyPart
from svggt_kernels.proof import BUDGET, error_ratio, plain_attention, within_budget

NEEDED = hopper.unsupported(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16, 64)

gpu = [pytest.mark.gpu, pytest.mark.skipif(NEEDED is not None, reason=f"hopper cannot run here: {NEEDED}")]
SOFTMAXES = [("bounded", torch.bfloat16), ("online", torch.bfloat16), ("online", torch.float16)]


def test_tables_load_the_kernels_that_weigh_with_the_lse_and_without(monkeypatch):
    loaded: list[runtime.Kernel] = []
    monkeypatch.setattr(hopper, "_load", lambda kernels, device: loaded.extend(kernels))
    hopper.coarse_tables(random_coarse_layout(0), torch.bfloat16, 64)
    assert {(("WITH_LSE", 1) in kernel.defines, ("WEIGHTED", 1) in kernel.defines) for kernel in loaded} == {
        (False, True),
        (True, True),
    }
    assert len(set(loaded)) == 2 * len(forward_pass.VARIANTS)


def with_kept(kept: int, stride: int = 5, *, special: int = 0, full: bool = True) -> CoarseLayout:
    """Frame 0 sees itself in full, unless not `full`, and `kept` patches of frame 1, each for `stride` of them.

    Frame 1 sees both frames in full, or nothing, and no column with a weight.
    """
    layout = CoarseLayout.from_graph(
        CoarseGraph.core(2, [0], [1], stride=stride), (1, kept * stride), special_tokens=special
    )
    if not full:
        nothing = CovisibilityGraph.from_pairs(2, torch.empty(0, 2, dtype=torch.int64), num_key_frames=2)
        whole = KeyPart(BlockLayout.from_graph(nothing, layout.num_tokens // 2))
        layout = CoarseLayout(layout.graph, layout.patch_grid, (whole, *layout.parts[1:]))
    return layout.to("cuda")


def inputs(layout: CoarseLayout, head_size: int, dtype: torch.dtype, heads: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, layout.num_tokens, head_size, device="cuda", dtype=dtype) for _ in range(3)]


def ratios_of(
    layout: CoarseLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice = slice(None)
) -> dict[str, float]:
    """The errors of some rows of output and LSE, as multiples of those of plain attention."""
    weights = layout.to_weights(rows)
    plain, exact = (
        plain_attention(q[:, :, rows], k, v, weights) for q, k, v in ((q, k, v), [x.double() for x in (q, k, v)])
    )
    ours = [x[:, :, rows] for x in block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")]
    return {name: error_ratio(*of) for name, *of in zip(("out", "lse"), ours, plain, exact, strict=True)}


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
class TestOnHopper:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def chosen(self, softmax: str):
        with hopper.softmax(softmax):
            yield

    @pytest.mark.parametrize("start", every(5, range(0, 200, 20)))
    def test_fuzz_against_float64(self, start: int, head_size: int, dtype: torch.dtype):
        for seed in range(start, start + 20):
            layout = random_coarse_layout(seed, max_side=30, device="cuda")
            scale = (None, math.log(2))[seed % 2]
            sizes = {"head_size": head_size, "scale": scale, "batch": 1 + seed % 3 // 2, "seed": seed}
            ratios = error_ratios(layout, dtype, backend="hopper", gradients=False, **sizes)
            assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize("full", [True, False], ids=["and keys in full", "alone"])
    @pytest.mark.parametrize("tiles", [0, 1, 2, 3])
    def test_every_place_where_the_weights_may_end(self, tiles: int, full: bool, head_size: int, dtype: torch.dtype):
        """At the border of a tile, a column before and behind it, inside; also where no other column follows."""
        columns = forward_pass.CONFIGS[head_size].columns
        for kept in (tiles * columns + more for more in (-1, 0, 1, columns // 2)):
            if kept > 0:
                layout = with_kept(kept, special=kept % 3 if full else 0, full=full)
                ratios = error_ratios(layout, dtype, head_size=head_size, backend="hopper", gradients=False)
                assert within_budget(ratios), (kept, ratios)

    @pytest.mark.parametrize("scale", [None, math.log(2)], ids=["default scale", "ln 2"])
    def test_equal_scores_and_values(self, scale: float | None, head_size: int, dtype: torch.dtype):
        """Equal values come out as they are, and the LSE is log of how many tokens there are, to float32."""
        layout = with_kept(150, 9, special=2)
        q, k, v = inputs(layout, head_size, dtype)
        k[:], v[:] = 0.0, 0.7
        out, lse = block_sparse_attention(q, k, v, layout, scale=scale, return_lse=True, backend="hopper")
        assert torch.equal(out, v)
        tokens = layout.to_weights().sum(1)
        assert float((lse.double() / tokens.log() - 1).abs().max()) <= 4 * torch.finfo(torch.float32).eps

    def test_the_lse_is_as_good_as_in_float32(self, head_size: int, dtype: torch.dtype):
        layout = with_kept(700, 9, special=2)
        q, k, v = inputs(layout, head_size, dtype)
        _, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        plain, exact = (
            plain_attention(*(x.to(wide) for x in (q, k, v)), layout.to_weights())[1]
            for wide in (torch.float32, torch.float64)
        )
        rounding = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
        assert error_ratio(lse, plain, exact, floor=rounding) <= BUDGET

    def test_the_output_does_not_depend_on_asking_for_the_lse(self, head_size: int, dtype: torch.dtype):
        layout = with_kept(300, special=3)
        q, k, v = inputs(layout, head_size, dtype)
        q[:, 1] *= 40  # a head that the bounded softmax leaves to the running maximum
        alone = block_sparse_attention(q, k, v, layout, backend="hopper")
        assert torch.equal(block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")[0], alone)

    @pytest.mark.parametrize("case", ["one head of many", "one huge score at a stride", "all very negative"])
    def test_rows_that_need_the_running_maximum(self, case: str, head_size: int, dtype: torch.dtype):
        layout = with_kept(300, special=3)
        q, k, v = inputs(layout, head_size, dtype)
        if case == "one head of many":
            q[:, 1] *= 40
        elif case == "all very negative":
            q, k = q.abs() + 3, -k.abs() - 3
        else:
            patch = layout.parts[-1].tokens[222]
            k[:, :, patch] = q[:, :, 100] * 20
        ratios = ratios_of(layout, q, k, v)
        assert within_budget(ratios), ratios

    def test_only_tiles_with_rows_that_fail_are_done_again(self, softmax: str, head_size: int, dtype: torch.dtype):
        if softmax == "online":
            pytest.skip("the running maximum has nothing to do again")
        layout = with_kept(200)
        q, k, v = inputs(layout, head_size, dtype)
        clean = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        q[:, 1, 250] *= 100
        ours = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        with hopper.softmax("online"):
            online = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        again = torch.zeros(q.shape[:3], dtype=torch.bool, device="cuda")
        again[:, 1, forward_pass.ROWS : 2 * forward_pass.ROWS] = True
        for got, before, maximum in zip(ours, clean, online, strict=True):
            assert torch.equal(got[~again], before[~again]) and torch.equal(got[again], maximum[again])

    def test_a_key_that_stands_for_many_tokens(self, head_size: int, dtype: torch.dtype):
        """Weights to 2^8 are left alone by the running maximum, but 400 times 2^7.5 is beyond float16."""
        columns = forward_pass.CONFIGS[head_size].columns
        layout = with_kept(columns + 20, 400)
        q, k, v = inputs(layout, head_size, dtype, heads=1)
        scores = -3 * torch.rand(layout.num_tokens, 1, device="cuda")
        scores[layout.parts[-1].tokens[columns:]] = 7.5
        direction = torch.nn.functional.normalize(torch.randn(head_size, device="cuda"), dim=0)
        q[:], k[:] = direction * head_size**0.5, direction * scores * math.log(2)
        ratios = ratios_of(layout, q, k, v, slice(0, 500))
        assert within_budget(ratios), ratios

    def test_small_weights_of_small_values(self, head_size: int, dtype: torch.dtype):
        """A row's sum is 1.2, but a column that stands for 400 has 1/12 of it, by a weight of 2^-12 alone.

        Its products with values of 2^-117 are beyond float32, those with 1/12 are not.
        """
        if dtype == torch.float16:
            pytest.skip("float16 has no such values")
        graph = CoarseGraph.core(3, [0], [1], stride=20)
        layout = CoarseLayout.from_graph(graph, (20, 80)).to("cuda")
        q, k, v = inputs(layout, head_size, dtype)
        direction = torch.nn.functional.normalize(torch.randn(head_size, device="cuda"), dim=0)
        k[:] = direction * head_size**0.5
        q[:] = direction * -12 * math.log(2)
        seen = torch.zeros(layout.num_tokens, dtype=torch.bool, device="cuda")
        seen[layout.parts[-1].tokens] = True
        v *= 2.0**-117 * seen[:, None]
        rows = slice(2 * 1600, 3 * 1600)
        mask = layout.to_weights(rows)
        exact, _ = plain_attention(q[:, :, rows].double(), k.double(), v.double(), mask)
        out = block_sparse_attention(q, k, v, layout, backend="hopper")[:, :, rows]
        factor = 2.0**117
        assert error_ratio(out.double() * factor, exact.bfloat16().double() * factor, exact * factor) <= BUDGET

    def test_what_is_not_visible_is_never_read(self, head_size: int, dtype: torch.dtype):
        graph = CoarseGraph.core(6, [0], [2, 3], stride=2)
        layout = CoarseLayout.from_graph(graph, (12, 13), special_tokens=3).to("cuda")
        q, k, v = inputs(layout, head_size, dtype)
        clean = block_sparse_attention(q, k, v, layout, backend="hopper")
        rows = slice(159, 2 * 159)
        hidden = ~layout.to_dense()[rows].any(0)
        k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
        poisoned = block_sparse_attention(q, k, v, layout, backend="hopper")
        assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])

    @pytest.mark.parametrize("return_lse", [False, True], ids=["output alone", "with LSE"])
    def test_capture_after_prepare_alone(self, return_lse: bool, head_size: int, dtype: torch.dtype, monkeypatch):
        """In one pass: nothing is merged."""
        monkeypatch.setattr(attention, "merge", lambda *_: pytest.fail("parts were merged"))
        layout = random_coarse_layout(3, max_side=20, device="cuda")
        q, k, v = inputs(layout, head_size, dtype)
        runtime._function.cache_clear()
        prepare(layout, dtype, head_size, backend="hopper")
        options = {"return_lse": return_lse, "backend": "hopper"}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block_sparse_attention(q, k, v, layout, **options)
        q.copy_(torch.randn_like(q))
        graph.replay()
        torch.cuda.synchronize()
        again = block_sparse_attention(q, k, v, layout, **options)
        for one, other in zip(*((x if return_lse else (x,)) for x in (captured, again)), strict=True):
            assert torch.equal(one, other)

    def test_no_host_sync(self, head_size: int, dtype: torch.dtype):
        graph = CoarseGraph.core(6, [0], [2, 3], stride=2).to("cuda")
        q, k, v = inputs(CoarseLayout.from_graph(graph, (12, 13), special_tokens=3), head_size, dtype)
        block_sparse_attention(q, k, v, CoarseLayout.from_graph(graph, (12, 13), special_tokens=3), backend="hopper")
        torch.cuda.synchronize()
        with no_device_waits():
            layout = CoarseLayout.from_graph(graph, (12, 13), special_tokens=3)
            block_sparse_attention(q, k, v, layout, backend="hopper")
