"""The Metal backend: its launcher on CPU tensors, its shader in the emulator of tests/metal."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layouts import random_coarse_layout, random_layout
from metal import emulator
from tiers import every, full

import svggt_kernels
from svggt_kernels import (
    BlockLayout,
    CovisibilityGraph,
    backends,
    block_sparse_attention,
    prepare,
)
from svggt_kernels.attention import choose_backend
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import metal
from svggt_kernels.backends.metal import shader, trial
from svggt_kernels.proof import within_budget

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="the emulator needs g++")

CPU = torch.device("cpu")
TRY = trial.failure
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
VARIANTS = [(dtype, head_size) for dtype in DTYPES for head_size in shader.HEAD_SIZES]


def name(variant: object) -> str:
    return str(variant).removeprefix("torch.")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets the backend run on CPU tensors, with every result NaN before a kernel writes it."""

    def use(compile_shader: Callable[[str], Any]) -> None:
        monkeypatch.setattr(torch.mps, "compile_shader", compile_shader)
        shader._libraries.clear()

    monkeypatch.setattr(metal, "DEVICE", "cpu")
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    monkeypatch.setattr(trial, "failure", lambda *_: None)
    use(emulator.Library)
    torch.use_deterministic_algorithms(True)  # which also fills new memory with NaN
    yield use
    torch.use_deterministic_algorithms(False)
    shader._libraries.clear()


def one_schedule(text: str) -> emulator.Library:
    return emulator.Library(text, schedules=1)


def band(frames: int, tokens: int, **options: Any) -> BlockLayout:
    return BlockLayout.from_graph(CovisibilityGraph.sequential(frames, 1), tokens, **options)


def inputs(layout: BlockLayout, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    lengths = (layout.num_tokens, layout.num_key_tokens, layout.num_key_tokens)
    return [torch.randn(1, heads, length, 64, dtype=dtype) for length in lengths]


def run(layout: BlockLayout, *qkv: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output, and the gradients of q, k and v, where `weights` is the gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = block_sparse_attention(*leaves, layout, backend="metal")
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


class TestNumbers:
    @pytest.mark.parametrize(("dtype", "head_size"), every(3, VARIANTS), ids=name)
    @pytest.mark.parametrize("seed", every(3, range(3)))
    def test_fuzz_against_float64(self, seed: int, dtype: torch.dtype, head_size: int):
        """Every schedule must give the same bits."""
        layout = random_layout(seed, max_frames=3, max_tokens=50)
        ratios = error_ratios(layout, dtype, head_size=head_size, backend="metal", heads=2, seed=seed)
        assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("start", every(5, range(10, 20, 2)))
    def test_more_fuzz(self, start: int, dtype: torch.dtype, emulated):
        emulated(one_schedule)
        for seed in range(start, start + 2):
            layout = random_layout(seed, max_frames=4, max_tokens=50)
            ratios = error_ratios(layout, dtype, head_size=64, backend="metal", batch=1 + seed % 2, heads=2, seed=seed)
            assert within_budget(ratios), (seed, ratios)

    @pytest.mark.parametrize("seed", every(3, range(6)))
    def test_keys_at_a_stride(self, seed: int, emulated):
        emulated(one_schedule)
        layout = random_coarse_layout(seed, max_side=6)
        dtype = DTYPES[seed % 3]
        ratios = error_ratios(layout, dtype, backend="metal", heads=2, seed=seed)
        assert within_budget(ratios), ratios

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    def test_frames_of_one_token_and_blind_rows(self, dtype: torch.dtype, emulated):
        emulated(one_schedule)
        graph = CovisibilityGraph.from_pairs(5, [(0, 0), (0, 2), (2, 1), (4, 3)], num_key_frames=4)
        layout = BlockLayout.from_graph(graph, [1, 7, 1, 33, 1], key_tokens_per_frame=[1, 1, 31, 1])
        assert within_budget(error_ratios(layout, dtype, backend="metal", heads=16))

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("tokens", every(3, [782, 1041, 1374]))
    def test_frames_of_full_length(self, tokens: int, dtype: torch.dtype, emulated):
        emulated(one_schedule)
        graph = CovisibilityGraph.from_pairs(2, [(0, 1)], num_key_frames=2)
        layout = BlockLayout.from_graph(graph, [64, 1], key_tokens_per_frame=tokens, special_tokens=1)
        assert within_budget(error_ratios(layout, dtype, backend="metal", heads=1))

    @pytest.mark.parametrize("tail", [1, 7, 8, 9, 31])
    def test_tails(self, tail: int, emulated):
        emulated(one_schedule)
        layout = BlockLayout.from_graph(CovisibilityGraph.sequential(2, 0), 32 + tail)
        assert within_budget(error_ratios(layout, torch.bfloat16, backend="metal", heads=2))

    def test_scales_of_every_sign(self, emulated):
        emulated(one_schedule)
        layout = band(2, 20)
        for scale in (0.5, -0.3, 0.0):
            assert within_budget(error_ratios(layout, torch.float32, scale=scale, backend="metal", heads=2))

    def test_scores_of_every_size(self, emulated):
        emulated(one_schedule)
        layout = band(2, 40)
        q, k, v = inputs(layout)
        for factor in (1e-3, 300.0):
            ours = block_sparse_attention(q * factor, k, v, layout, return_lse=True, backend="metal")
            exact = block_sparse_attention(
                *((q * factor).double(), k.double(), v.double()), layout, return_lse=True, backend="reference"
            )
            plain = block_sparse_attention(q * factor, k, v, layout, return_lse=True, backend="reference")
            for mine, other, reference in zip(ours, plain, exact, strict=True):
                rounding = torch.finfo(torch.float32).eps / 2 * float(reference.abs().max())
                assert rms(mine - reference) <= 2 * max(rms(other - reference), rounding)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
    @pytest.mark.parametrize("scale", [1e-30, 1e4])
    def test_padding_has_no_weight_whatever_the_scale(self, scale: float, dtype: torch.dtype, emulated):
        """33 keys are padded to 64. Times the scale, scores are about -1e-30, or below -1e30."""
        emulated(one_schedule)
        layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1), 33)
        q, k, v = torch.zeros(1, 1, 33, 64), torch.zeros(1, 1, 33, 64), torch.rand(1, 1, 33, 64)
        q[..., 0], k[..., 0] = (2.0**50, -(2.0**50)) if scale > 1 else (1.0, -1.0)
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = block_sparse_attention(*leaves, layout, scale=scale, return_lse=True, backend="metal")
        _, _, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
        q, k, v = (x.detach().double() for x in leaves)
        scores = q @ k.mT * scale
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v, rtol=2**-8, atol=2**-8)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
        assert bool(dv.isfinite().all())

    def test_nan_scores_give_nan(self, emulated):
        emulated(one_schedule)
        layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 0), 20)
        q, k, v = inputs(layout)
        k[0, 0, 25, 3] = torch.nan
        sees_nan = torch.zeros(1, 2, 60, dtype=torch.bool)
        sees_nan[0, 0, 20:40] = True
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="metal")
        assert torch.equal(lse.isnan(), sees_nan)
        for result in (out, *run(layout, q, k, v, weights=torch.ones_like(q))):
            assert torch.equal(result.isnan().all(-1), sees_nan) and torch.equal(result.isnan().any(-1), sees_nan)

    def test_long_rows_keep_their_digits(self, emulated):
        """Equal weights: a sum that takes them up one after the other would be off by 1e-5."""
        emulated(one_schedule)
        tokens = 60_000
        layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1, 1), 1, key_tokens_per_frame=tokens)
        q, k, v = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, tokens, 64), torch.rand(1, 1, tokens, 64)
        q[..., 0], k[..., 0], k[:, :, 0, 0] = 1.0, -1.1, 0.0
        _, lse = block_sparse_attention(q, k, v, layout, scale=1.0, return_lse=True, backend="metal")
        torch.testing.assert_close(lse.double(), (q.double() @ k.double().mT).logsumexp(-1), rtol=0, atol=2e-6)

    def test_what_is_not_visible_is_never_read(self, emulated):
        emulated(one_schedule)
        graph = CovisibilityGraph.from_pairs(3, [(0, 0), (1, 0), (2, 0), (2, 2)], num_key_frames=3)
        layout = BlockLayout.from_graph(graph, 45)
        q, k, v = inputs(layout)
        weights = torch.randn_like(q)
        hidden = slice(45, 90)
        clean = run(layout, q, k, v, weights=weights)
        k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
        poisoned = run(layout, q, k, v, weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
        assert all(bool((x[:, :, hidden] == 0).all()) for x in poisoned[2:])


class TestLauncher:
    def test_inputs_of_every_form(self, emulated):
        emulated(one_schedule)
        layout = band(2, 20)
        q, k, v, weights = wide = torch.randn(4, 1, 2, 40, 65)
        forms = {
            "packed": [x[..., :64] for x in wide],
            "offset by one element": [x[..., 1:] for x in wide],
            "heads expanded": [x[:, :1, :, :64].expand(1, 2, 40, 64) for x in (q, k, v)] + [weights[..., :64]],
            "last axis not adjacent": [x[..., :64].mT.contiguous().mT for x in wide],
            "gradient of a sum": [x[..., :64] for x in (q, k, v)] + [torch.ones(()).expand(1, 2, 40, 64)],
        }
        for form, (*qkv, grad) in forms.items():
            expected = run(layout, *(x.contiguous() for x in qkv), weights=grad.contiguous())
            found = run(layout, *qkv, weights=grad)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), form

    def test_results_lie_as_the_heads_merge(self):
        layout = band(2, 5)
        for result in run(layout, *inputs(layout), weights=torch.ones(1, 2, 10, 64)):
            assert result.transpose(1, 2).is_contiguous()

    def test_empty_batch(self):
        layout = band(2, 5)
        q, k, v = (x[:0] for x in inputs(layout))
        assert block_sparse_attention(q, k, v, layout, backend="metal").shape == (0, 2, 10, 64)

    def test_autocast_casts(self, emulated):
        emulated(one_schedule)
        layout = band(2, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert block_sparse_attention(*inputs(layout), layout, backend="metal").dtype == torch.bfloat16

    def test_lse_alone_has_a_gradient(self, emulated):
        emulated(one_schedule)
        layout = band(2, 5)
        leaves = [x.requires_grad_() for x in inputs(layout)]
        lse = block_sparse_attention(*leaves, layout, return_lse=True, backend="metal")[1]
        expected = block_sparse_attention(*leaves, layout, return_lse=True, backend="reference")[1]
        found, wanted = (torch.autograd.grad(x.sum(), leaves) for x in (lse, expected))
        torch.testing.assert_close(found, wanted)

    def test_pieces_of_bounded_work(self, emulated, monkeypatch: pytest.MonkeyPatch):
        emulated(one_schedule)
        layout = band(4, 40)
        q, k, v = inputs(layout)
        weights = torch.randn_like(q)
        expected = run(layout, q, k, v, weights=weights)
        waits = []
        monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(None))
        monkeypatch.setattr(shader, "MOST_FLOPS", 2 * 2 * 32 * 64 * 2 * 150)
        monkeypatch.setattr(shader, "MOST_WAITING_FLOPS", 0)
        found = run(layout, q, k, v, weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert len(waits) > 6

    @pytest.mark.parametrize("columns", [[], [5], [5, 5, 5], [9, 1, 1], [1, 9, 1, 4, 4]])
    def test_pieces_cover_every_tile_once(self, columns: list[int]):
        found = list(shader.pieces(columns, 8))
        assert [i for begin, end in found for i in range(begin, end)] == list(range(len(columns)))
        assert all(sum(columns[a:b]) <= 8 or b - a == 1 for a, b in found)

    def test_a_library_is_compiled_once_by_all_threads(self, emulated):
        compiled = []

        def compile_shader(text: str) -> emulator.Library:
            compiled.append(text)
            return one_schedule(text)

        emulated(compile_shader)
        layout = band(2, 5)
        qkv = inputs(layout)
        threads = [
            threading.Thread(target=block_sparse_attention, args=(*qkv, layout), kwargs={"backend": "metal"})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(compiled) == 1

    def test_a_gpu_of_other_simdgroups_is_refused(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(emulator.EmulatedKernel, "thread_execution_width", 16)
        layout = band(2, 5)
        with pytest.raises(RuntimeError, match="needs threadgroups of 128 threads and simdgroups of 32"):
            block_sparse_attention(*inputs(layout), layout, backend="metal")

    def test_traced_by_torch_compile(self, emulated):
        emulated(one_schedule)
        layout = band(2, 5)
        qkv = inputs(layout)
        prepare(layout, torch.float32, 64, backend="metal")
        compiled = torch.compile(
            lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="metal"), fullgraph=True, backend="eager"
        )
        assert torch.equal(compiled(*qkv), block_sparse_attention(*qkv, layout, backend="metal"))


class TestArguments:
    """The stand-in for torch's library refuses what the shader's signature does not ask for."""

    KERNELS = ("attention_forward", "attention_backward_queries", "attention_backward_keys")

    @pytest.fixture(params=KERNELS)
    def call(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
        """A kernel, and the arguments that the launcher gave it."""
        calls: list[tuple[Any, ...]] = []
        original = emulator.EmulatedKernel.__call__

        def record(self: Any, *arguments: Any, **options: Any) -> None:
            if self.kernel.name == request.param:
                calls.append((self, list(arguments), options))
            original(self, *arguments, **options)

        monkeypatch.setattr(emulator.EmulatedKernel, "__call__", record)
        layout = band(2, 5, special_tokens=1)
        run(layout, *inputs(layout, dtype=torch.float16), weights=torch.ones(1, 2, 10, 64, dtype=torch.float16))
        monkeypatch.undo()
        yield calls[0]

    def test_what_the_launcher_gives_is_taken(self, call):
        kernel, arguments, options = call
        kernel(*arguments, **options)

    def test_every_argument_must_have_its_type(self, call):
        kernel, arguments, options = call
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                others = [argument.double(), argument[:0], 3]
            elif isinstance(argument, list):
                others = [argument[1:], [float(x) for x in argument], torch.tensor(argument)]
            else:
                others = [1.0 if isinstance(argument, int) else 1, torch.ones(3), None]
            for other in others:
                changed = [*arguments[:place], other, *arguments[place + 1 :]]
                with pytest.raises(emulator.EmulatorError, match=rf"buffer {place} "):
                    kernel(*changed, **options)

    def test_order_counts(self, call):
        kernel, arguments, options = call
        for place in range(len(arguments) - 1):
            first, second = arguments[place : place + 2]
            if getattr(first, "dtype", type(first)) != getattr(second, "dtype", type(second)):
                with pytest.raises(emulator.EmulatorError, match=f"buffer {place} "):
                    kernel(*arguments[:place], second, first, *arguments[place + 2 :], **options)

    def test_whole_groups_of_the_kernels_threads(self, call):
        kernel, arguments, options = call
        threads, group = options["threads"], options["group_size"]
        for wrong in (
            {"threads": [threads[0] - 1, *threads[1:]], "group_size": group},
            {"threads": threads, "group_size": [64, 1, 1]},
            {"threads": threads[:1], "group_size": group},
        ):
            with pytest.raises(emulator.EmulatorError, match="group"):
                kernel(*arguments, **wrong)

    def test_the_number_of_arguments(self, call):
        kernel, arguments, options = call
        with pytest.raises(emulator.EmulatorError, match="buffers, got"):
            kernel(*arguments[:-1], **options)


class TestFirstUse:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch, emulated: Any) -> None:
        # On an Apple GPU, which the CPU stands for, there is no CPU backend.
        others = {name: backend for name, backend in backends.BACKENDS.items() if name != "cpu"}
        monkeypatch.setattr(backends, "BACKENDS", others)
        monkeypatch.setattr(trial, "failure", TRY)
        monkeypatch.setattr(trial, "_failures", {})
        monkeypatch.setattr(trial, "_milliseconds", {})
        monkeypatch.delenv(trial.VARIABLE, raising=False)

    def test_a_right_shader_is_trusted(self, emulated):
        emulated(one_schedule)
        assert metal.unsupported(CPU, torch.float16, 64) is None

    @pytest.mark.parametrize(
        ("break_it", "words"),
        [
            (lambda text: text.replace("row_sum(total)", "total.x"), "errors beyond 2 times .*'blind'"),
            (lambda text: text.replace("float2 q_row", "float5 q_row"), "SyntaxError: EmulatorError: the shader did"),
            pytest.param(
                lambda text: text.replace("column < count ? products.x", "true ? products.x"),
                "errors beyond 2 times",
                marks=full,
            ),
        ],
        ids=["wrong sums", "does not compile", "tails"],
    )
    def test_a_wrong_shader_is_not(self, break_it, words: str, emulated, monkeypatch):
        class Compiler(emulator.Library):
            def __init__(self, text: str) -> None:
                try:
                    super().__init__(break_it(text), schedules=1)
                except emulator.EmulatorError as error:
                    raise SyntaxError(f"EmulatorError: {error}") from error

        emulated(Compiler)
        with pytest.warns(RuntimeWarning, match="PyTorch's attention, one call per frame, serves instead"):
            reason = metal.unsupported(CPU, torch.float16, 64)
        assert re.search(words, str(reason))
        # Said once; from now on the reference serves, and naming the backend raises.
        assert choose_backend(CPU, torch.float16, 64) == "reference"
        with pytest.raises(ValueError, match="backend metal cannot run this"):
            choose_backend(CPU, torch.float16, 64, "metal")

    @pytest.mark.parametrize(("ours", "theirs", "chosen"), [(1.0, 2.0, "metal"), (3.0, 2.0, "reference")])
    def test_the_faster_is_chosen(self, ours: float, theirs: float, chosen: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trial, "_failures", {(torch.float16, 64): None})
        times = iter([ours, theirs])
        monkeypatch.setattr(trial, "_time", lambda run: next(times))
        assert choose_backend(CPU, torch.float16, 64) == chosen
        assert choose_backend(CPU, torch.float16, 64, "metal") == "metal"
        why = backends.reasons(CPU, torch.float16, 64, unnamed=True)["metal"]
        assert (why is None) == (chosen == "metal")
        assert why is None or "took 3.00 ms in a trial, PyTorch's attention 2.00 ms" in why

    @pytest.mark.parametrize("forced", trial.CHOICES)
    def test_the_environment_forces_either(self, forced: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trial, "_failures", {(torch.float16, 64): None})
        monkeypatch.setattr(trial, "_time", lambda run: pytest.fail("timed all the same"))
        monkeypatch.setenv(trial.VARIABLE, forced)
        assert choose_backend(CPU, torch.float16, 64) == forced

    def test_another_value_in_the_environment_is_explained(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(trial, "_failures", {(torch.float16, 64): None})
        monkeypatch.setenv(trial.VARIABLE, "fast")
        with pytest.raises(
            ValueError, match=r"SVGGT_KERNELS_MPS must be one of metal, reference, or not set, got 'fast'"
        ):
            choose_backend(CPU, torch.float16, 64)


class TestWhatItCannotRun:
    def test_reasons(self, monkeypatch: pytest.MonkeyPatch):
        assert "takes float16" in str(metal.unsupported(CPU, torch.float64, 64))
        assert "takes head sizes 64, 128, got 32" in str(metal.unsupported(CPU, torch.float16, 32))
        monkeypatch.delattr(torch.mps, "compile_shader")
        assert "needs torch 2.7" in str(metal.unsupported(CPU, torch.float16, 64))
        monkeypatch.setattr(metal, "DEVICE", "mps")
        assert "needs an Apple GPU (mps), got cpu" in str(metal.unsupported(CPU, torch.float16, 64))

    def test_inputs_on_two_devices_are_explained(self):
        layout = band(2, 5)
        q, k, v = inputs(layout)
        with pytest.raises(ValueError, match="one device"):
            svggt_kernels.block_sparse_attention(q, k.to("meta"), v, layout, backend="metal")
