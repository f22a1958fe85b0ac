"""The operator through its reference backend, and the contract that holds for every backend."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from layouts import random_layout
from tiers import every
from torch.autograd import forward_ad

from svggt_kernels import (
    BlockLayout,
    CovisibilityGraph,
    backends,
    block_sparse_attention,
    prepare,
)
from svggt_kernels.attention import choose_backend
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.proof import plain_attention, within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(layout: BlockLayout, *, heads: int = 2, head_size: int = 16, dtype=torch.float64, batch: int = 1):
    q = torch.randn(batch, heads, layout.num_tokens, head_size, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, heads, layout.num_key_tokens, head_size, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, heads, layout.num_key_tokens, head_size, dtype=dtype, requires_grad=True)
    return q, k, v


def layout_of(graph: CovisibilityGraph, tokens: int = 9, **options) -> BlockLayout:
    return BlockLayout.from_graph(graph, tokens, **options)


@pytest.fixture
def band() -> BlockLayout:
    return layout_of(CovisibilityGraph.sequential(6, 1), special_tokens=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("start", every(20, range(0, 500, 25)))
def test_fuzz_against_float64(start: int, dtype: torch.dtype):
    """500 random layouts: forward, LSE and all gradients within the error budget."""
    for seed in range(start, start + 25):
        ratios = error_ratios(
            random_layout(seed, max_tokens=40), dtype, head_size=(8, 32, 64)[seed % 3], backend="reference", seed=seed
        )
        assert within_budget(ratios), (seed, ratios)


@pytest.mark.parametrize("seed", every(3, range(30)))
def test_float64_is_the_definition(seed: int):
    layout = random_layout(seed, max_tokens=30)
    q, k, v = inputs(layout, batch=2)
    mask = layout.to_dense()
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="reference")
    expected, expected_lse = plain_attention(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    weights, lse_weights = torch.randn_like(out), torch.randn_like(lse)
    sees = mask.any(-1)
    gradients = torch.autograd.grad((out * weights).sum() + (lse * lse_weights)[..., sees].sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weights).sum() + (expected_lse * lse_weights)[..., sees].sum(), (q, k, v))
    for actual, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("dense_special", [True, False])
def test_full_graph_is_dense_attention(dense_special: bool):
    layout = layout_of(
        CovisibilityGraph.all_visible(5), special_tokens=2, dense_special=dense_special, trailing_tokens=1
    )
    q, k, v = inputs(layout)
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), F.scaled_dot_product_attention(q, k, v))


def test_identity_graph_is_each_frame_alone():
    layout = layout_of(CovisibilityGraph.sequential(5, 0), special_tokens=2, dense_special=False)
    q, k, v = inputs(layout)
    alone = [F.scaled_dot_product_attention(*parts) for parts in zip(*(x.split(9, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), torch.cat(alone, 2))


def test_what_is_not_visible_is_never_read(band: BlockLayout):
    q, k, v = (x.detach() for x in inputs(band))
    clean = block_sparse_attention(q, k, v, band)
    rows = slice(2, 9)  # the patches of frame 0, which see frames 0 and 1 and all special tokens
    hidden = ~band.to_dense()[rows].any(0)
    assert bool(hidden.any())
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    torch.testing.assert_close(block_sparse_attention(q, k, v, band)[:, :, rows], clean[:, :, rows], rtol=0, atol=0)


def test_a_row_that_sees_nothing_gives_zero_and_an_unseen_key_zero_gradient():
    graph = CovisibilityGraph.from_pairs(3, [(0, 0), (2, 0), (2, 1)], num_key_frames=3)
    layout = layout_of(graph, 4)
    q, k, v = inputs(layout)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    blind, unseen = slice(4, 8), slice(8, 12)
    assert bool((out[:, :, blind] == 0).all()) and bool((lse[:, :, blind] == -torch.inf).all())
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert bool((dq[:, :, blind] == 0).all())
    assert bool((dk[:, :, unseen] == 0).all()) and bool((dv[:, :, unseen] == 0).all())
    assert all(bool(g.isfinite().all()) for g in (dq, dk, dv))


def test_partial_results_merge_by_lse():
    """A layout cut into two key halves and merged by LSE is the whole: what streaming and sharding rest on."""
    whole = CovisibilityGraph.from_dense(torch.rand(4, 6) < 0.7)
    visible = whole.to_dense()
    q, k, v = inputs(layout_of(whole, 5))
    expected = block_sparse_attention(q, k, v, layout_of(whole, 5))
    parts = []
    for frames in (slice(0, 3), slice(3, 6)):
        pairs = visible[:, frames].nonzero()
        layout = layout_of(CovisibilityGraph.from_pairs(4, pairs, num_key_frames=3), 5)
        tokens = slice(5 * frames.start, 5 * frames.stop)
        parts.append(block_sparse_attention(q, k[:, :, tokens], v[:, :, tokens], layout, return_lse=True))
    weights = torch.stack([lse for _, lse in parts]).softmax(0).nan_to_num()
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.3])
def test_scale(band: BlockLayout, scale: float):
    q, k, v = inputs(band)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band.to_dense(), scale=scale)
    out = block_sparse_attention(q, k, v, band, scale=scale)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for actual, reference in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [4e-46, -4e-46, 1e-45])
def test_a_scale_that_float32_rounds_to_zero_is_zero(band: BlockLayout, scale: float, dtype: torch.dtype, monkeypatch):
    """A kernel would have to divide by it; those of float64 can."""
    got = []
    reference = backends.load("reference")
    forward = reference.forward
    monkeypatch.setattr(
        reference, "forward", lambda q, k, v, *rest: got.append((q, rest[1])) or forward(q, k, v, *rest)
    )
    q, k, v = (x.detach().to(dtype) for x in inputs(band))
    out = block_sparse_attention(q, k, v, band, scale=scale, backend="reference")
    [(given, factor)] = got
    assert factor > 0
    assert bool((given == 0).all()) == (dtype == torch.float32 and abs(scale) < 1e-45)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=band.to_dense(), scale=0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("scale", [0.0, 5e-46, -6e-46, 8e-46, 1e-40, -1e-38])
def test_a_scale_near_zero_gives_the_mean_and_finite_gradients(band: BlockLayout, scale: float, dtype: torch.dtype):
    """Even if the gradient of q at scale 1 is beyond the dtype: 300 * 300 * 9 is beyond float16."""
    q, k, v = (x.detach().to(dtype) for x in inputs(band))
    leaves = [x.requires_grad_() for x in (q, 300 * k, v)]
    out, lse = block_sparse_attention(*leaves, band, scale=scale, return_lse=True)
    visible = band.to_dense().double()
    count = visible.sum(-1)
    torch.testing.assert_close(out, (visible @ v.double() / count[:, None]).to(dtype))
    torch.testing.assert_close(lse, count.log().float().expand_as(lse))
    dq, dk, dv = torch.autograd.grad(out, leaves, 300 * torch.randn_like(out))
    assert bool((dq.float().abs() < 1e-30).all()) and bool((dk.float().abs() < 1e-30).all())
    assert bool(dv.isfinite().all())


def test_a_small_scale_weighs_large_scores(band: BlockLayout):
    """1e-39 is not normal in float32, so that some processors take it for 0; scores here are about 1e38."""
    q, k, v = (x.detach() for x in inputs(band))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band.to_dense(), scale=0.1)
    out = block_sparse_attention((1e19 * q).float(), (1e19 * k).float(), v.float(), band, scale=1e-39)
    torch.testing.assert_close(out, expected.float())


def test_nan_in_q_stays_nan_at_scale_zero(band: BlockLayout):
    q, k, v = (x.detach() for x in inputs(band))
    q[0, 0, 3, 1] = torch.nan
    out, lse = block_sparse_attention(q, k, v, band, scale=0.0, return_lse=True)
    assert bool(out[0, 0, 3].isnan().all()) and bool(lse[0, 0, 3].isnan()) and int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_scores_give_nan(dtype: torch.dtype):
    layout = layout_of(CovisibilityGraph.sequential(3, 0))
    q, k, v = (x.detach().to(dtype) for x in inputs(layout))
    k[0, 0, 12, 3] = torch.nan
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="reference")
    sees_nan = torch.zeros(1, 2, 27, dtype=torch.bool)
    sees_nan[0, 0, 9:18] = True
    assert torch.equal(lse.isnan(), sees_nan)
    assert torch.equal(out.isnan().all(-1), sees_nan) and torch.equal(out.isnan().any(-1), sees_nan)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, from make_dual
@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(band: BlockLayout, argument: int, requires_grad: bool):
    tensors = [x.detach().requires_grad_(requires_grad) for x in inputs(band)]
    with forward_ad.dual_level():
        tensors[argument] = forward_ad.make_dual(tensors[argument], torch.randn_like(tensors[argument]))
        with pytest.raises(RuntimeError, match="reverse mode only"):
            block_sparse_attention(*tensors, band)
    block_sparse_attention(*(x.detach() for x in inputs(band)), band)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, from jvp
def test_transforms_of_torch_func_are_refused(band: BlockLayout):
    q, k, v = (x.detach() for x in inputs(band))

    def attend(q: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(q, k, v, band)

    with pytest.raises(RuntimeError, match="reverse mode only"):
        torch.func.jvp(attend, (q,), (q,))
    for transformed in (
        lambda: torch.func.grad(lambda q: attend(q).sum())(q),
        lambda: torch.func.vjp(attend, q),
        lambda: torch.func.vmap(attend)(q[None]),
    ):
        with pytest.raises(RuntimeError, match=r"no transform of torch\.func"):
            transformed()


@pytest.mark.parametrize("scale", [2.4e38, -2.4e38])
def test_a_scale_too_large_for_float32_is_refused(band: BlockLayout, scale: float):
    q, k, v = (x.detach() for x in inputs(band))
    with pytest.raises(ValueError, match=r"scale \* log2\(e\) must be finite in float32, got a scale of -?2\.4e\+38"):
        block_sparse_attention(q.float(), k.float(), v.float(), band, scale=scale)
    q = q * 1e-38
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=band.to_dense(), scale=scale)
    torch.testing.assert_close(block_sparse_attention(q, k, v, band, scale=scale), wanted)


def test_output_merges_heads_without_a_copy(band: BlockLayout):
    out = block_sparse_attention(*inputs(band), band)
    assert out.transpose(1, 2).is_contiguous()


def test_long_rows_are_split(band: BlockLayout, monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs(band)
    expected, lse = block_sparse_attention(q, k, v, band, return_lse=True)
    gradients = torch.autograd.grad(expected.sum() + lse.sum(), (q, k, v))
    monkeypatch.setattr("svggt_kernels.backends.reference.MAX_SCORES", 100)
    monkeypatch.setattr("svggt_kernels.backends.reference.MAX_FUSED_SCORES", 200)
    torch.testing.assert_close(block_sparse_attention(q.detach(), k, v, band), expected)
    out, split_lse = block_sparse_attention(q, k, v, band, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(split_lse, lse)
    for actual, wanted in zip(torch.autograd.grad(out.sum() + split_lse.sum(), (q, k, v)), gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_autocast_casts_as_sdpa_does(band: BlockLayout):
    q, k, v = (x.float() for x in inputs(band))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = block_sparse_attention(q, k, v.bfloat16(), band, return_lse=True)
        theirs = F.scaled_dot_product_attention(q, k, v.bfloat16(), attn_mask=band.to_dense())
    assert out.dtype == theirs.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = block_sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), band)
    assert torch.equal(out, expected)
    torch.autograd.grad(out.sum(), (q, k, v))


def test_results_are_bitwise_the_same(band: BlockLayout):
    q, k, v = inputs(band, dtype=torch.float32)

    def run() -> list[torch.Tensor]:
        out, lse = block_sparse_attention(q, k, v, band, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_layout_used_in_inference_mode_still_trains(band: BlockLayout):
    q, k, v = inputs(band)
    with torch.inference_mode():
        expected = block_sparse_attention(q, k, v, band)
        prepare(band, q.dtype, 16, training=True)
    out = block_sparse_attention(q, k, v, band)
    torch.testing.assert_close(out, expected.clone())
    torch.autograd.grad(out.sum(), (q, k, v))


def test_opcheck(band: BlockLayout):
    q, k, v = inputs(band)
    reference = backends.load("reference")
    tables = reference.tables(band, q.dtype, 16)
    torch.library.opcheck(torch.ops.svggt_kernels.attention.default, (q, k, v, tables, tables, 0.25, True, "reference"))
    out, lse = torch.ops.svggt_kernels.attention(q, k, v, tables, tables, 0.25, True, "reference")
    saved = [x.detach() for x in (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.svggt_kernels.attention_backward.default, (*saved, tables, 0.25, "reference"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, torch.float32, 16), "layout must be a BlockLayout or a CoarseLayout, got NoneType"),
        (("layout", "float32", 16), "dtype must be of type dtype, got 'float32'"),
        (("layout", torch.float32, "16"), "head_size must be of type int, got '16'"),
    ],
)
def test_prepare_names_an_argument_of_another_type(given, message: str):
    layout = layout_of(CovisibilityGraph.sequential(3, 1))
    with pytest.raises(TypeError, match=message):
        prepare(*(layout if each == "layout" else each for each in given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_without_prepare_tables_are_made_outside(caplog: pytest.LogCaptureFixture):
    """A warning of torch.compile, which would trace into the making of tables, is an error here."""
    layout = layout_of(CovisibilityGraph.sequential(5, 1))
    q, k, v = inputs(layout, dtype=torch.float32)
    compiled = torch.compile(lambda q, k, v: 2 * block_sparse_attention(q, k, v, layout), backend="eager")
    with torch.no_grad():
        actual = compiled(q, k, v)
        torch.testing.assert_close(actual, 2 * block_sparse_attention(q, k, v, layout))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiles_without_a_graph_break():
    compiled = torch.compile(
        lambda q, k, v, layout: block_sparse_attention(q, k, v, layout, return_lse=True),
        fullgraph=True,
        backend="aot_eager",
    )
    for frames in (4, 6):
        layout = layout_of(CovisibilityGraph.sequential(frames, 1), special_tokens=2)
        q, k, v = inputs(layout, dtype=torch.float32)
        with pytest.raises(Exception, match="prepare"):
            compiled(q, k, v, layout)
        assert prepare(layout, torch.float32, 16, training=True) in ("cpu", "reference")
        out, lse = compiled(q, k, v, layout)
        expected, expected_lse = block_sparse_attention(q, k, v, layout, return_lse=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        for actual, wanted in zip(
            torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)),
            torch.autograd.grad(expected.sum() + expected_lse.sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted)


def test_bad_input_is_explained(band: BlockLayout):
    q, k, v = (x.detach() for x in inputs(band, dtype=torch.float32))
    cases = [
        ((q[0], k, v, band), {}, ValueError, r"q must have shape \[B, H, N, D\], got \[2, 54, 16\]"),
        (
            (q, k[:, :1], v, band),
            {},
            ValueError,
            r"k must have shape \[1, 2, 54, 16\].*got \[1, 1, 54, 16\]; expand k and v",
        ),
        ((q[:, :, 1:], k, v, band), {}, ValueError, r"q must have shape .*54 query tokens.*got \[1, 2, 53, 16\]"),
        ((q, k, v[..., :8], band), {}, ValueError, "v must have shape"),
        (
            tuple(x.transpose(1, 2) for x in (q, k, v)) + (band,),
            {},
            ValueError,
            r"q must have .* N = 54.*got \[1, 54, 2, 16\]; these look like \[B, N, H, D\]; transpose\(1, 2\) first",
        ),
        ((q, k.transpose(1, 2), v, band), {}, ValueError, r"k must have .*these look like \[B, N, H, D\]"),
        ((q.numpy(), k, v, band), {}, TypeError, "q must be a torch.Tensor, got ndarray"),
        ((q[..., :0], k[..., :0], v[..., :0], band), {}, ValueError, "head size must be 1 or more"),
        ((q, k.double(), v, band), {}, TypeError, "one dtype, got torch.float32, torch.float64 and torch.float32"),
        ((q, k.to("meta"), v, band), {}, ValueError, "one device, got cpu, meta and cpu"),
        ((q, k, v, band.to("meta")), {}, ValueError, r"use layout.to\('cpu'\)"),
        ((q, k, v, band.graph), {}, TypeError, "layout must be a BlockLayout or a CoarseLayout, got CovisibilityGraph"),
        (
            (q, k, v, band),
            {"backend": "cuda"},
            ValueError,
            "backend must be one of hopper, triton, metal, cpu, reference or None, got 'cuda'",
        ),
        ((q, k, v, band), {"backend": "triton"}, ValueError, "backend triton cannot run this: it needs a CUDA device"),
        ((q.int(), k.int(), v.int(), band), {}, TypeError, "no backend can run torch.int32"),
        ((q, k, v, band), {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            block_sparse_attention(*arguments, **options)


def test_empty_batches_and_heads():
    layout = layout_of(CovisibilityGraph.sequential(2, 1))
    for batch, heads in ((0, 2), (1, 0)):
        q, k, v = (torch.zeros(batch, heads, 18, 16, requires_grad=True) for _ in range(3))
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert torch.autograd.grad(out.sum() + lse.sum(), q)[0].shape == q.shape


def test_second_derivatives_are_refused(band: BlockLayout):
    q, k, v = inputs(band)
    (dq,) = torch.autograd.grad(block_sparse_attention(q, k, v, band).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(dq.sum(), q)


def test_a_saved_layout_leaves_its_tables_behind(band: BlockLayout):
    q, k, v = inputs(band)
    expected = block_sparse_attention(q, k, v, band)
    assert band.tables
    for copied in (pickle.loads(pickle.dumps(band)), copy.deepcopy(band)):
        assert not copied.tables
        torch.testing.assert_close(block_sparse_attention(q, k, v, copied), expected, rtol=0, atol=0)
    replaced = dataclasses.replace(band, graph=CovisibilityGraph.all_visible(6))
    torch.testing.assert_close(block_sparse_attention(q, k, v, replaced), F.scaled_dot_product_attention(q, k, v))


def test_choice_of_backend_is_told():
    assert choose_backend(torch.device("cpu"), torch.float64, 64) == "reference"
    assert choose_backend(torch.device("cpu"), torch.float32, 64, "reference") == "reference"


def test_a_former_name_of_a_backend_still_serves_and_warns(band: BlockLayout):
    with pytest.warns(DeprecationWarning, match='"sdpa" is called "reference" now'):
        assert prepare(band, torch.float32, 16, backend="sdpa") == "reference"
