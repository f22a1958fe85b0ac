"""Attention over keys in full and keys at a stride, on every backend that runs here."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layouts import random_coarse_layout
from tiers import every

from svggt_kernels import CoarseGraph, CoarseLayout, CovisibilityGraph, backends, block_sparse_attention, prepare
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.proof import plain_attention, within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    name for name in backends.BACKENDS if backends.reasons(torch.device(DEVICE), torch.float32, 64)[name] is None
]


@pytest.mark.parametrize("gradients", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", every(20, range(0, 200, 5)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz_against_float64(backend: str, start: int, dtype: torch.dtype, gradients: bool):
    if reason := backends.reasons(torch.device(DEVICE), dtype, 64)[backend]:
        pytest.skip(reason)
    for seed in range(start, start + 5):
        layout = random_coarse_layout(seed, max_side=9 if DEVICE == "cpu" else 30, device=DEVICE)
        sizes = {"head_size": (64, 128)[seed % 2], "seed": seed}
        ratios = error_ratios(layout, dtype, backend=backend, gradients=gradients, **sizes)
        assert within_budget(ratios), (seed, ratios)


def inputs(layout: CoarseLayout, dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, 2, layout.num_tokens, 16, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("seed", every(3, range(30)))
def test_float64_is_the_definition(seed: int):
    layout = random_coarse_layout(seed)
    q, k, v = inputs(layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    expected, expected_lse = plain_attention(q, k, v, layout.to_weights())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out * weights).sum() + (lse * lse_weights).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum() + (expected_lse * lse_weights).sum(), (q, k, v))
    for actual, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, reference)


def test_at_stride_1_it_is_dense_attention():
    graph = CoarseGraph.from_graphs(CovisibilityGraph.sequential(4, 0), CovisibilityGraph.all_visible(4), stride=1)
    layout = CoarseLayout.from_graph(graph, (3, 4), special_tokens=2, trailing_tokens=1)
    q, k, v = inputs(layout)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), F.scaled_dot_product_attention(q, k, v))


def test_a_kept_patch_stands_for_those_around_it():
    """Where all patches of a frame are alike, a frame that is seen coarsely counts as one that is seen in full."""
    graph = CoarseGraph.core(5, [0], [2, 3], stride=2)
    layout = CoarseLayout.from_graph(graph, (4, 6), special_tokens=1)
    q, k, v = (x.detach() for x in inputs(layout))
    for x in (k, v):
        x.unflatten(2, (5, 25))[:, :, :, 1:] = x.unflatten(2, (5, 25))[:, :, :, 1:2].clone()
    full = graph.full.to_dense() | CovisibilityGraph.core(5, [2, 3]).to_dense()
    mask = full.repeat_interleave(25, 0).repeat_interleave(25, 1)
    expected, expected_lse = plain_attention(q, k, v, mask)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_what_is_not_visible_is_never_read():
    layout = CoarseLayout.from_graph(CoarseGraph.core(6, [0], [2, 3], stride=2), (4, 4), special_tokens=1)
    q, k, v = (x.detach() for x in inputs(layout))
    clean = block_sparse_attention(q, k, v, layout)
    rows = slice(17, 34)  # frame 1
    hidden = ~layout.to_dense()[rows].any(0)
    assert int(hidden.sum()) == 2 * 17 + 2 * 12
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    assert torch.equal(block_sparse_attention(q, k, v, layout)[:, :, rows], clean[:, :, rows])


def test_tables_are_made_beforehand_and_once():
    layout = random_coarse_layout(1)
    prepare(layout, torch.float32, 64, backend="reference", training=True)
    before = [dict(part.layout.tables) for part in layout.parts]
    q, k, v = (torch.randn(1, 1, layout.num_tokens, 64, requires_grad=True) for _ in range(3))
    block_sparse_attention(q, k, v, layout, backend="reference").sum().backward()
    assert [part.layout.tables for part in layout.parts] == before
    assert all(len(tables) == 2 for tables in before)


def test_compiled_in_one_graph():
    layout = random_coarse_layout(2)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 64) for _ in range(3))
    prepare(layout, torch.float32, 64)
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, layout), block_sparse_attention(q, k, v, layout))


def test_made_under_inference_mode_and_trained_after():
    with torch.inference_mode():
        layout = random_coarse_layout(5).to("cpu")
        q, k, v = (torch.randn(1, 1, layout.num_tokens, 16) for _ in range(3))
        block_sparse_attention(q, k, v, layout)
    q, k, v = inputs(layout)
    block_sparse_attention(q, k, v, layout).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_under_autocast_and_with_any_scale():
    layout = random_coarse_layout(4)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block_sparse_attention(q, k, v, layout).dtype == torch.bfloat16
    for scale in (-0.3, 0.0, 2.0):
        expected, _ = plain_attention(q, k, v, layout.to_weights(), scale)
        torch.testing.assert_close(block_sparse_attention(q, k, v, layout, scale=scale), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def in_one_pass(monkeypatch) -> list[bool]:
    """The reference backend takes all parts in one pass where it may; returns whether each such call needed the LSE."""
    calls: list[bool] = []
    reference = backends.load("reference")
    by_parts = reference.forward

    def forward(q, k, v, tables, scale, need_lse):
        if len(tables) > 1:
            return by_parts(q, k, v, tables, scale, need_lse)
        calls.append(need_lse)
        out, lse = plain_attention(q, k, v, tables[0], scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse if need_lse else lse.new_empty(0)

    def coarse_tables(layout: CoarseLayout, dtype: torch.dtype, head_size: int) -> list[torch.Tensor]:
        return [layout.to_weights()]

    monkeypatch.setattr(reference, "forward", forward)
    monkeypatch.setattr(reference, "TRAITS", dataclasses.replace(reference.TRAITS, coarse_tables=coarse_tables))
    return calls


def test_one_pass_without_gradients_and_parts_with_them(in_one_pass: list[bool]):
    layout = random_coarse_layout(7)
    q, k, v = inputs(layout)
    expected, expected_lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="reference")
    assert in_one_pass == []
    with torch.no_grad():
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="reference")
        alone = block_sparse_attention(q, k, v, layout, backend="reference")
    assert in_one_pass == [True, False]
    torch.testing.assert_close((out, lse, alone), (expected, expected_lse, expected))


def test_tables_of_one_pass_are_made_once_kept_and_not_copied(in_one_pass: list[bool]):
    layout = random_coarse_layout(7)
    prepare(layout, torch.float64, 16, backend="reference")
    assert not any(part.layout.tables for part in layout.parts)
    [[table]] = layout.tables.values()
    block_sparse_attention(*(x.detach() for x in inputs(layout)), layout, backend="reference")
    assert [[id(kept) for kept in tables] for tables in layout.tables.values()] == [[id(table)]]
    assert any(kept is table for kept in layout.kept())
    assert not copy.deepcopy(layout).tables and not pickle.loads(pickle.dumps(layout)).tables
    prepare(layout, torch.float64, 16, backend="reference", training=True)
    assert all(len(part.layout.tables) == 2 for part in layout.parts)


def test_one_pass_compiled_in_one_graph(in_one_pass: list[bool]):
    layout = random_coarse_layout(2)
    q, k, v = (x.detach() for x in inputs(layout))
    compiled = torch.compile(partial(block_sparse_attention, backend="reference"), fullgraph=True, backend="aot_eager")
    prepare(layout, torch.float64, 16, backend="reference")
    torch.testing.assert_close(compiled(q, k, v, layout), block_sparse_attention(q, k, v, layout, backend="reference"))
    assert in_one_pass == [False, False]


@pytest.mark.parametrize("scale", [1e-35, 5e-38, -1e-38, 1e-40])
def test_what_a_weight_adds_to_a_score_of_any_scale_is_finite(scale: float, in_one_pass: list[bool], monkeypatch):
    """A kernel in float32 divides the logarithm of a weight, 31 log 2 at most, by the scale."""
    layout, scales = random_coarse_layout(4), []
    reference = backends.load("reference")
    forward = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *given: scales.append(given[4]) or forward(*given))
    q, k, v = (x.detach() for x in inputs(layout, torch.float32))
    out = block_sparse_attention(1e18 * q, 1e18 * k, v, layout, scale=scale, backend="reference")
    assert float(31 / torch.tensor(scales[0], dtype=torch.float32)) < torch.inf
    expected, _ = plain_attention(*(x.double() for x in (1e18 * q, 1e18 * k, v)), layout.to_weights(), scale)
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
