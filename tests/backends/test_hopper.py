"""The Hopper backend against the reference; needs an H100 or H200."""

from __future__ import annotations

import ctypes
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from device_waits import no_device_waits
from layouts import random_layout
from tiers import every

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention, prepare
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import _nvrtc as runtime
from svggt_kernels.backends import hopper
from svggt_kernels.backends.hopper import forward_pass
from svggt_kernels.proof import BUDGET, plain_attention, within_budget

NEEDED = hopper.unsupported(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16, 64)

gpu = [pytest.mark.gpu, pytest.mark.skipif(NEEDED is not None, reason=f"hopper cannot run here: {NEEDED}")]
KINDS = [("bounded", "deterministic"), ("bounded", "accumulated"), ("online", "deterministic")]
SOFTMAXES = [("bounded", torch.bfloat16), ("online", torch.bfloat16), ("online", torch.float16)]
GRADIENTS = hopper.CHOICES["gradients"]


def test_says_what_it_cannot_run():
    assert "needs a CUDA device, got cpu" in str(hopper.unsupported(torch.device("cpu"), torch.bfloat16, 64))


@pytest.mark.parametrize(("choose", "what"), [(hopper.softmax, "softmax"), (hopper.gradients, "gradients")])
def test_an_unknown_kind_is_explained(choose, what: str):
    with pytest.raises(ValueError, match=f"{what} must be one of .*, got 'fastest'"), choose("fastest"):
        pass


@pytest.mark.parametrize(
    ("spec", "version", "reason"),
    [
        ("found", "13.0.3", None),
        ("found", "12.9.1", r'built for, 13.0, got 12.9.1: pip install "cuda-bindings==13\.\*"'),
        (None, "13.0.3", r'cuda-bindings cannot be imported; .*: pip install "cuda-bindings==13\.\*"'),
        (ModuleNotFoundError("No module named 'cuda'"), "13.0.3", "cannot be imported"),
        (ValueError("cuda.bindings.__spec__ is None"), "13.0.3", "cannot be imported"),
        ("found", PackageNotFoundError("cuda-bindings"), "cannot be imported"),
    ],
    ids=["right", "wrong major version", "absent", "cuda absent", "without a spec", "without metadata"],
)
def test_says_which_bindings_it_needs(spec: object, version: object, reason: str | None, monkeypatch):
    def answers(result: object):
        def look_up(name: str) -> object:
            if isinstance(result, Exception):
                raise result
            return result

        return look_up

    monkeypatch.setattr(hopper, "find_spec", answers(spec))
    monkeypatch.setattr(hopper, "version", answers(version))
    answer = hopper._without_bindings.__wrapped__("13.0")
    assert answer is None if reason is None else re.search(reason, str(answer))


def test_a_module_called_cuda_that_is_no_package_is_a_reason(monkeypatch):
    monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    assert "cannot be imported" in hopper._without_bindings.__wrapped__("13.0")


@pytest.mark.parametrize("error", [None, ImportError("no bindings"), RuntimeError("no library\nsearched far")])
def test_says_that_nvrtc_cannot_be_loaded(error: Exception | None, monkeypatch):
    calls = []

    def version() -> str:
        calls.append(1)
        if error is not None:
            raise error
        return "13.0"

    monkeypatch.setattr(hopper, "_nvrtc", {})
    monkeypatch.setattr(hopper, "_without_bindings", lambda cuda: None)
    monkeypatch.setattr(runtime, "nvrtc_version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    expected = error and f"NVRTC, which torch for CUDA brings, cannot be loaded: {str(error).splitlines()[0]}"
    assert [hopper.unsupported(torch.device("cuda"), torch.bfloat16, 64) for _ in "ab"] == [expected] * 2
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_whether_nvrtc_can_be_loaded_does_not_break_a_compiled_graph():
    compiled = torch.compile(lambda x: x + (hopper._without_compiler() is None), fullgraph=True, backend="eager")
    assert int(compiled(torch.zeros(1))) == (hopper._without_compiler() is None)


@pytest.mark.parametrize(
    ("scale", "bounded", "variant"),
    [
        (math.log(2), True, "bounded-unit"),
        (ctypes.c_float(math.log(2)).value, True, "bounded-unit"),
        (0.6931, True, "bounded"),
        (64**-0.5, True, "bounded"),
        (math.log(2), False, "online"),
        (64**-0.5, False, "online"),
    ],
)
def test_scores_in_units_of_log2_have_a_kernel_of_their_own(scale: float, bounded: bool, variant: str):
    assert forward_pass.variant(scale, bounded) == variant


@pytest.mark.parametrize(
    ("dtype", "softmax", "variants"),
    [
        (torch.bfloat16, "bounded", forward_pass.VARIANTS),
        (torch.bfloat16, "online", ("online",)),
        (torch.float16, "bounded", ("online",)),
    ],
)
@pytest.mark.parametrize("with_lse", [False, True], ids=["output alone", "with LSE"])
def test_tables_load_the_kernels_of_the_chosen_softmax(
    with_lse: bool, dtype: torch.dtype, softmax: str, variants: tuple[str, ...]
):
    with hopper.softmax(softmax):
        kernels = hopper._forward_kernels(dtype, 64, with_lse)
    assert kernels == [forward_pass.kernel(dtype, 64, variant, with_lse) for variant in variants]


def test_inference_loads_kernels_without_lse_and_training_also_those_with_it(monkeypatch):
    loaded: list[runtime.Kernel] = []
    monkeypatch.setattr(hopper, "_load", lambda kernels, device: loaded.extend(kernels))
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 10)
    for make, with_lse in ((hopper.tables, False), (hopper.backward_tables, True)):
        loaded.clear()
        make(layout, torch.bfloat16, 64)
        forward = [kernel for kernel in loaded if kernel.name == "forward"]
        assert len(forward) == 3 and all((("WITH_LSE", 1) in kernel.defines) == with_lse for kernel in forward)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("deterministic", ["backward_inner", "backward_keys", "backward_queries"]),
        ("accumulated", ["backward_inner", "backward_keys", "backward_convert"]),
    ],
)
def test_tables_load_the_kernels_of_the_chosen_gradients(kind: str, names: list[str]):
    with hopper.gradients(kind):
        kernels = hopper._backward_kernels(torch.bfloat16, 128)
    assert [kernel.name for kernel in kernels] == names
    assert (("ACCUMULATE_QUERIES", 1) in kernels[1].defines) == (kind == "accumulated")


def test_tables_of_a_layout_elsewhere_load_nothing(monkeypatch):
    monkeypatch.setattr(runtime, "load", lambda *_: pytest.fail("a kernel was loaded"))
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 10)
    assert hopper.tables(layout, torch.bfloat16, 64) and hopper.backward_tables(layout, torch.bfloat16, 64)


def test_a_choice_holds_in_every_thread():
    with hopper.gradients("accumulated"), ThreadPoolExecutor(1) as other:
        assert other.submit(hopper._accumulates).result()
    assert not hopper._accumulates()


def inputs(layout: BlockLayout, heads: int = 2, head_size: int = 64, dtype: torch.dtype = torch.bfloat16):
    q = torch.randn(1, heads, layout.num_tokens, head_size, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, heads, layout.num_key_tokens, head_size, device="cuda", dtype=dtype) for _ in range(2))
    return q, k, v


def run(
    layout: BlockLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of q, k and v, where `weights` is the gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, layout, backend="hopper")
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def assert_agree(kind: str, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Assert equality bit by bit; where the order of additions is not fixed, what torch asks of such a dtype."""
    exactly = {"rtol": 0, "atol": 0} if kind == "deterministic" else {}
    torch.testing.assert_close(tuple(actual), tuple(expected), **exactly)


def lse_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The LSE of queries that see all keys, in the dtype of q."""
    return (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1)


def assert_float32(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that the error is at most twice that of `plain`, computed in float32, which is at least a rounding."""
    epsilon = torch.finfo(torch.float32).eps
    error, allowed = (float((x.double() - exact).square().mean().sqrt()) for x in (actual, plain))
    assert error <= BUDGET * max(allowed, epsilon * float(exact.square().mean().sqrt())), (error, allowed)


def band(frames: int, tokens: int, reach: int = 1, **options: object) -> BlockLayout:
    return BlockLayout.from_graph(CovisibilityGraph.sequential(frames, reach).to("cuda"), tokens, **options)


class TestOnHopper:
    pytestmark = gpu

    @pytest.mark.parametrize("kinds", KINDS, ids="-".join)
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("start", every(5, range(0, 500, 20)))
    def test_fuzz_against_float64(self, start: int, head_size: int, kinds: tuple[str, str]):
        for seed in range(start, start + 20):
            layout = random_layout(seed, max_tokens=400, device="cuda")
            dtype = (torch.bfloat16, torch.float16)[seed % 2]
            with hopper.softmax(kinds[0]), hopper.gradients(kinds[1]):
                ratios = error_ratios(
                    layout, dtype, head_size=head_size, backend="hopper", batch=1 + seed % 3 // 2, seed=seed
                )
            assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_the_lse_of_rows_that_see_many_tiles(self, head_size: int, softmax: str, dtype: torch.dtype):
        """Scores are exact, and the LSE is made of the weights before they are rounded.

        Over 52 000 keys rounding the weights to bfloat16 leaves errors of 1.2e-5, 4e-5 at most; rounding the scale into
        q 3.5e-4, and sums in accumulators that round towards zero a mean of about -6e-5.
        """
        graph = CovisibilityGraph.from_pairs(1, [(0, j) for j in range(40)], num_key_frames=40).to("cuda")
        layout = BlockLayout.from_graph(graph, 200, key_tokens_per_frame=1300)
        q, k, v = inputs(layout, head_size=head_size, dtype=dtype)
        with hopper.softmax(softmax):
            _, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        assert_float32(lse, *(lse_of(q.to(dtype), k.to(dtype)) for dtype in (torch.float32, torch.float64)))

    @pytest.mark.parametrize("scale", [None, math.log(2)], ids=["default scale", "ln 2"])
    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_rows_of_equal_scores(self, head_size: int, softmax: str, dtype: torch.dtype, scale: float | None):
        """Their weights are rounded all alike, which must not reach the LSE; equal values come out as they are."""
        layout = band(5, 300, special_tokens=3)
        q, k, v = inputs(layout, head_size=head_size, dtype=dtype)
        k[:], v[:] = k[:, :, :1].clone(), 0.7
        with hopper.softmax(softmax):
            out, lse = block_sparse_attention(q, k, v, layout, scale=scale, return_lse=True, backend="hopper")
        expected = [
            plain_attention(*(x.to(dtype) for x in (q, k, v)), layout.to_dense(), scale)[1]
            for dtype in (torch.float32, torch.float64)
        ]
        assert_float32(lse, *expected)
        assert torch.equal(out, v)

    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_partial_results_merge_by_their_lse(self, head_size: int, softmax: str, dtype: torch.dtype):
        """Two sets of keys, the scores of each equal, its values 1 or -1: what is merged shows the weights of the sets.

        Outputs of 1 and -1 need no rounding, so the whole is as good as if it were merged of float32.
        """
        layout = band(3, 500, reach=3)
        q, k, _ = inputs(layout, head_size=head_size, dtype=dtype)
        sets = [(k[:, :, i : i + 1].expand_as(k), torch.full_like(k, value)) for i, value in enumerate((1.0, -1.0))]

        def merged(attend: Callable[..., tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype):
            parts = [attend(*(x.to(dtype) for x in (q, *columns))) for columns in sets]
            lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
            return sum((part_lse - lse).exp()[..., None] * out for out, part_lse in parts), lse

        with hopper.softmax(softmax):
            ours = merged(partial(block_sparse_attention, layout=layout, return_lse=True, backend="hopper"), dtype)
        dense = partial(plain_attention, mask=layout.to_dense())
        for actual, plain, exact in zip(ours, merged(dense, torch.float32), merged(dense, torch.float64), strict=True):
            assert_float32(actual, plain, exact)

    @pytest.mark.parametrize("kinds", KINDS, ids="-".join)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_gradients_of_rows_that_see_one_key(self, head_size: int, dtype: torch.dtype, kinds: tuple[str, str]):
        """Their weight is 1 without any rounding, and the plain gradient of v exact."""
        layout = band(300, 1, reach=0)
        with hopper.softmax(kinds[0]), hopper.gradients(kinds[1]):
            ratios = error_ratios(layout, dtype, head_size=head_size, backend="hopper")
        assert within_budget(ratios), ratios

    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_the_output_does_not_depend_on_asking_for_the_lse(self, head_size: int, softmax: str, dtype: torch.dtype):
        layout = band(4, 300, special_tokens=3)
        q, k, v = inputs(layout, head_size=head_size, dtype=dtype)
        q[:, 1] *= 40  # a head that the bounded softmax leaves to the running maximum
        with hopper.softmax(softmax):
            alone = block_sparse_attention(q, k, v, layout, backend="hopper")
            assert torch.equal(block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")[0], alone)

    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize(("score", "value"), [(-38, -95), (-38, -110), (-12, -112)])
    def test_small_weights_of_small_values(self, score: int, value: int, head_size: int):
        """Products that float32 cannot hold: rows of such scores, in units of log2, and values of such a size."""
        layout = band(4, 300)
        q, k, v = inputs(layout, head_size=head_size)
        direction = torch.nn.functional.normalize(torch.randn(head_size, device="cuda"), dim=0)
        k[:] = direction * head_size**0.5
        q[:] = direction * score * math.log(2)
        v *= 2.0**value
        exact = block_sparse_attention(*(x.double() for x in (q, k, v)), layout, backend="reference")

        def error(x: torch.Tensor) -> float:
            return float(((x.double() - exact) / 2.0**value).square().mean().sqrt())

        for softmax in hopper.CHOICES["softmax"]:
            with hopper.softmax(softmax):
                out = block_sparse_attention(q, k, v, layout, backend="hopper")
            assert error(out) <= BUDGET * error(exact.bfloat16()), softmax

    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_scores_that_come_in_units_of_log2(self, head_size: int, softmax: str, dtype: torch.dtype):
        for seed in range(20):
            layout = random_layout(seed, max_tokens=400, device="cuda")
            with hopper.softmax(softmax):
                ratios = error_ratios(
                    layout, dtype, head_size=head_size, scale=math.log(2), backend="hopper", seed=seed
                )
            assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize("tail", every(5, range(1, 128)))
    def test_every_tail_length(self, tail: int):
        graph = CovisibilityGraph.from_pairs(3, [(0, 2), (2, 0)]).to("cuda")
        layout = BlockLayout.from_graph(graph, 128 + tail)
        assert within_budget(error_ratios(layout, torch.bfloat16, backend="hopper", seed=tail))

    @pytest.mark.parametrize(("softmax", "dtype"), SOFTMAXES)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_dense_columns_of_more_than_a_tile(self, head_size: int, softmax: str, dtype: torch.dtype):
        """Runs go through special tokens between frames that are seen; the others come in whole tiles, and rests."""
        graph = CovisibilityGraph.from_pairs(9, [(0, 1), (0, 2), (0, 5), (3, 8), (4, 0), (4, 5), (7, 1)]).to("cuda")
        layout = BlockLayout.from_graph(graph, 150, special_tokens=(40, 17), trailing_tokens=130)
        with hopper.softmax(softmax):
            ratios = error_ratios(layout, dtype, head_size=head_size, backend="hopper")
        assert within_budget(ratios), ratios

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

    @pytest.mark.parametrize("kind", GRADIENTS)
    @pytest.mark.parametrize("head_size", [64, 128])
    def test_keys_that_nobody_sees_reach_no_gradient(self, head_size: int, kind: str):
        """The last tile of key frame 0 is not full, and key frame 1 lies behind it."""
        graph = CovisibilityGraph.from_pairs(3, [(0, 0), (1, 0), (2, 0), (2, 2)], num_key_frames=3).to("cuda")
        layout = BlockLayout.from_graph(graph, 170)
        q, k, v = inputs(layout, head_size=head_size)
        weights = torch.randn_like(q)
        hidden = slice(170, 340)
        with hopper.gradients(kind):
            clean = run(layout, q, k, v, weights)
            k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
            poisoned = run(layout, q, k, v, weights)
        assert all(bool(x.isfinite().all()) for x in clean)
        assert_agree(kind, poisoned, clean)
        assert all(bool((x[:, :, hidden] == 0).all()) for x in poisoned[2:])

    @pytest.mark.parametrize("scale", [None, math.log(2)], ids=["default scale", "ln 2"])
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("case", ["one huge score", "all very negative", "one head of many", "at the edge"])
    def test_rows_that_need_the_running_maximum(self, case: str, head_size: int, scale: float | None):
        """Scores far outside what exp2 without a maximum can hold, against float64."""
        torch.manual_seed(0)
        layout = band(4, 300)
        q, k, v = inputs(layout, heads=4, head_size=head_size)
        if case == "one huge score":
            k[:, :, 350] = q[:, :, 400] * 60
        elif case == "all very negative":
            q, k = q.abs() + 3, -k.abs() - 3
        elif case == "one head of many":
            q[:, 2] *= 40
        else:
            # Row i has its largest score about i / 3, in units of log2: through both edges of the proof.
            direction = torch.nn.functional.normalize(torch.randn(head_size, device="cuda"), dim=0)
            k[:] = direction * head_size**0.5
            wanted = torch.linspace(-200, 200, layout.num_tokens, device="cuda") / 1.4427
            q[:] = (wanted[:, None] * direction).to(q.dtype)
        if scale is not None:
            q *= head_size**-0.5 / scale
        options = {"scale": scale, "return_lse": True}
        exact = block_sparse_attention(*(x.double() for x in (q, k, v)), layout, **options, backend="reference")
        plain = block_sparse_attention(q, k, v, layout, **options, backend="triton")
        ours = block_sparse_attention(q, k, v, layout, **options, backend="hopper")
        for reference, other, mine in zip(exact, plain, ours, strict=True):
            allowed = 2 * (other.double() - reference).abs().max() + 2e-2 * reference.abs().max()
            assert bool(torch.isfinite(mine).all())
            assert (mine.double() - reference).abs().max() <= allowed

    @pytest.mark.parametrize("head_size", [64, 128])
    def test_only_tiles_with_rows_that_fail_are_done_again(self, head_size: int):
        layout = band(4, 300)
        q, k, v = inputs(layout, heads=4, head_size=head_size)
        clean = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        q[:, 2, 650] *= 100
        ours = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        with hopper.softmax("online"):
            online = block_sparse_attention(q, k, v, layout, return_lse=True, backend="hopper")
        again = torch.zeros(q.shape[:3], dtype=torch.bool, device="cuda")
        again[:, 2, 600 : 600 + forward_pass.ROWS] = True
        for got, before, maximum in zip(ours, clean, online, strict=True):
            assert torch.equal(got[~again], before[~again]) and not torch.equal(maximum[~again], before[~again])
            assert torch.equal(got[again], maximum[again])

    @pytest.mark.parametrize("kinds", KINDS, ids="-".join)
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("factor", [1.0, 40.0], ids=["inside the proof", "beyond"])
    def test_the_backward_pass_has_the_weights_of_the_forward_pass(
        self, factor: float, head_size: int, kinds: tuple[str, str]
    ):
        """The LSE that the forward pass saves makes the backward pass's weights of a row add up to 1.

        With a gradient of ones, dV of a key is the sum of its weights, and all of dV the number of rows. The scores are
        large because some channels have a bias, as they do in trained models.
        """
        torch.manual_seed(0)
        layout = band(4, 300)
        q, k, v = inputs(layout, heads=4, head_size=head_size)
        q[:, :, :, :4] += 5 * factor**0.5
        k[:, :, :, :4] += 5 * factor**0.5
        with hopper.softmax(kinds[0]), hopper.gradients(kinds[1]):
            dv = run(layout, q, k, v, torch.ones_like(q))[3]
        assert float((dv.float().sum(2) / layout.num_tokens - 1).abs().max()) <= 2e-3

    @pytest.mark.parametrize("kind", GRADIENTS)
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

    @pytest.mark.parametrize("kind", GRADIENTS)
    @pytest.mark.parametrize("form", ["expanded", "odd stride", "last axis not adjacent"])
    def test_gradients_of_and_from_what_the_copy_engine_cannot_read(self, form: str, kind: str):
        layout = band(2, 170)
        q, k, v, weights = wide = torch.randn(4, 1, 2, 340, 65, device="cuda", dtype=torch.bfloat16)
        if form == "expanded":  # the gradient of a sum, all strides 0
            q, k, v = (x[:, :1, :, :64].expand(1, 2, 340, 64) for x in (q, k, v))
            weights = weights[:1, :1, :1, :1].expand(1, 2, 340, 64)
        elif form == "odd stride":
            q, k, v, weights = wide[..., 1:]
        else:
            q, k, v, weights = wide[..., :64].mT.contiguous().mT
        with hopper.gradients(kind):
            expected = run(layout, *(x.contiguous() for x in (q, k, v, weights)))
            assert_agree(kind, run(layout, q, k, v, weights), expected)

    @pytest.mark.parametrize("kind", GRADIENTS)
    def test_gradients_of_sums(self, kind: str):
        """Autograd hands on the gradient of a sum with all strides 0, for the output and for the LSE."""
        layout = band(2, 170)
        leaves = [x.requires_grad_() for x in inputs(layout)]
        out, lse = block_sparse_attention(*leaves, layout, return_lse=True, backend="hopper")
        ones = torch.ones_like(out), torch.ones_like(lse)
        with hopper.gradients(kind):
            expected = torch.autograd.grad((out, lse), leaves, ones, retain_graph=True)
            assert_agree(kind, torch.autograd.grad(out.sum() + lse.sum(), leaves), expected)

    @pytest.mark.parametrize("kind", GRADIENTS)
    def test_another_thread_gets_the_same(self, kind: str):
        """For the backward pass of a forward pass here, and for both passes, each in a thread new to CUDA."""
        layout = band(4, 170, special_tokens=5)
        q, k, v = (x.requires_grad_() for x in inputs(layout))
        weights = torch.randn_like(q)
        out = block_sparse_attention(q, k, v, layout, backend="hopper")
        with hopper.gradients(kind):
            expected = run(layout, q, k, v, weights)
            with ThreadPoolExecutor(1) as other:
                backward = other.submit(torch.autograd.grad, out, (q, k, v), weights).result()
            with ThreadPoolExecutor(1) as other:
                both = other.submit(run, layout, q, k, v, weights).result()
            torch.cuda.synchronize()
        assert_agree(kind, backward, expected[1:])
        assert_agree(kind, both, expected)

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
        exact = block_sparse_attention(*head, layout, backend="reference")
        plain = block_sparse_attention(*(x.bfloat16() for x in head), layout, backend="reference")
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

    @pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
    @pytest.mark.parametrize("kinds", KINDS, ids="-".join)
    def test_capture_after_prepare_alone(self, kinds: tuple[str, str]):
        """No attention ran before, so all kernels must have been loaded by `prepare`."""
        layout = band(8, 200, special_tokens=5)
        q, k, v = (x.requires_grad_() for x in inputs(layout, heads=4))
        weights = torch.randn_like(q)
        runtime._function.cache_clear()
        with hopper.softmax(kinds[0]), hopper.gradients(kinds[1]):
            prepare(layout, torch.bfloat16, 64, backend="hopper", training=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run(layout, q, k, v, weights)
            graph.replay()
            torch.cuda.synchronize()
            assert_agree(kinds[1], captured, run(layout, q, k, v, weights))

    def test_capture_of_a_softmax_that_was_not_prepared_is_explained(self):
        layout = band(8, 200)
        q, k, v = inputs(layout)
        runtime._function.cache_clear()
        with hopper.softmax("online"):
            prepare(layout, torch.bfloat16, 64, backend="hopper")
        with (
            pytest.raises(RuntimeError, match="a kernel must be loaded before a CUDA graph captures it"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            block_sparse_attention(q, k, v, layout, backend="hopper")

    def test_no_host_sync(self):
        graph = CovisibilityGraph.sequential(8, 1).to("cuda")
        q, k, v = (torch.randn(1, 4, 800, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
        warm = BlockLayout.from_graph(graph, 100, special_tokens=5)
        block_sparse_attention(q, k, v, warm, backend="hopper").sum().backward()
        torch.cuda.synchronize()
        with no_device_waits():
            layout = BlockLayout.from_graph(graph, 100, special_tokens=5)
            block_sparse_attention(q, k, v, layout, backend="hopper").sum().backward()

    def test_offsets_beyond_two_to_the_31(self):
        frames, tokens = 1600, 1374
        layout = band(frames, tokens)
        q, k, v = inputs(layout, heads=16)
        weights = torch.randn_like(q)
        # The last frame's gradients of k and v need the frame before, which sees the one before it.
        part = [x[:, -1:, -3 * tokens :] for x in (q, k, v, weights)]
        expected = run(band(3, tokens), *part)
        for ours, reference in zip(run(layout, q, k, v, weights), expected, strict=True):
            assert torch.equal(ours[:, -1:, -tokens:], reference[:, :, -tokens:])
