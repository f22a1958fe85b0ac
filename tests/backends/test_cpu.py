"""The CPU backend, for every instruction set that this CPU can run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from layouts import random_layout
from tiers import every

from svggt_kernels import BlockLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import cpu
from svggt_kernels.proof import plain_gradients, within_budget

CPU = torch.device("cpu")
try:
    cpu.extension()
except ImportError as error:
    pytest.skip(f"the C++ extension was not built: {error}", allow_module_level=True)

NATIVE = cpu.extension()
BEST, *OTHERS = INSTRUCTION_SETS = NATIVE.instruction_sets()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def differentiated(q, k, v, layout, weights) -> list[torch.Tensor]:
    """The output, the LSE and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*inputs, layout, backend="cpu", return_lse=True)
    return [out, lse, *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("start", every(20, range(0, 500, 25)))
def test_fuzz_against_float64(start: int, dtype: torch.dtype):
    """500 random layouts: forward, LSE and all gradients within the error budget."""
    for seed in range(start, start + 25):
        layout = random_layout(seed, max_tokens=40)
        ratios = error_ratios(layout, dtype, head_size=(8, 32, 64, 20)[seed % 4], backend="cpu", seed=seed)
        assert within_budget(ratios), (seed, ratios)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("start", every(7, range(0, 21, 3)))
@pytest.mark.parametrize("instruction_set", OTHERS)
def test_every_instruction_set(instruction_set: str, start: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instruction_set)
    for seed in range(start, start + 3):
        layout = random_layout(seed, max_tokens=140)
        ratios = error_ratios(layout, dtype, head_size=(64, 128, 20)[seed % 3], backend="cpu", batch=2, seed=seed)
        assert within_budget(ratios), (seed, ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tail_length(dtype: torch.dtype):
    graph = CovisibilityGraph.from_pairs(3, [(0, 2), (2, 0)])
    for tokens in range(1, 34):
        ratios = error_ratios(BlockLayout.from_graph(graph, tokens), dtype, backend="cpu", seed=tokens)
        assert within_budget(ratios), (tokens, ratios)


@pytest.mark.parametrize("tokens", every(2, [513, 1025, 512]))
def test_runs_of_several_tiles(tokens: int):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(2, 0), tokens, trailing_tokens=1)
    assert within_budget(error_ratios(layout, torch.float32, backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(5, 1), 210, special_tokens=3)
    q, k, v, weights = (torch.randn(2, 2, layout.num_tokens, 32, dtype=dtype) for _ in range(4))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(differentiated(q, k, v, layout, weights))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("case", ["offset", "last stride", "broadcast", "packed"])
def test_strided_views(case: str):
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(2), 70)
    wide = torch.randn(2, 3, 140, 65)
    x = {
        "offset": wide[..., 1:],
        "last stride": wide[..., :64].mT.contiguous().mT,
        "broadcast": wide[:, :1, :, :64].expand(2, 3, 140, 64),
        "packed": torch.randn(2, 140, 3, 3, 64).permute(2, 0, 3, 1, 4)[1],
    }[case]
    weights = torch.randn(2, 3, 140, 64)
    plain = x.contiguous()
    expected = differentiated(plain, plain, plain, layout, weights)
    for actual, reference in zip(differentiated(x, x, x, layout, weights), expected, strict=True):
        assert torch.equal(actual, reference)


def test_what_is_not_visible_is_never_read():
    layout = BlockLayout.from_graph(CovisibilityGraph.from_pairs(4, [(0, 2), (2, 0)]), 70, special_tokens=3)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 64) for _ in range(3))
    clean = block_sparse_attention(q, k, v, layout, backend="cpu")
    rows = slice(3, 70)
    hidden = ~layout.to_dense()[rows].any(0)
    k[:, :, hidden], v[:, :, hidden] = float("nan"), float("nan")
    poisoned = block_sparse_attention(q, k, v, layout, backend="cpu")
    assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])
    assert bool(poisoned[:, :, :3].isnan().all())  # the special queries do see them


def test_a_row_that_sees_nothing_gives_zero_and_an_unseen_key_zero_gradient():
    graph = CovisibilityGraph.from_pairs(3, [(0, 0), (2, 0), (2, 1)], num_key_frames=3)
    layout = BlockLayout.from_graph(graph, 20)
    q, k, v = (torch.randn(1, 1, 60, 32) for _ in range(3))
    out, lse, dq, dk, dv = differentiated(q, k, v, layout, torch.ones(1, 1, 60, 32))
    blind, unseen = slice(20, 40), slice(40, 60)
    assert bool((out[:, :, blind] == 0).all()) and bool((lse[:, :, blind] == -torch.inf).all())
    assert all(bool((x == 0).all()) for x in (dq[:, :, blind], dk[:, :, unseen], dv[:, :, unseen]))


def test_scores_far_apart_stay_finite():
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(2), 300)
    q, k, v = (100 * torch.randn(1, 1, 600, 64) for _ in range(3))
    assert all(bool(x.isfinite().all()) for x in differentiated(q, k, v, layout, torch.ones_like(q)))


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_underflows_counts_for_nothing(dtype, instruction_set, monkeypatch: pytest.MonkeyPatch):
    """One key's weight is exp(-2500) and its value huge, as in a padded token that nobody has written."""
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instruction_set)
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1), 32)
    q, k, v = torch.zeros(1, 1, 32, 16), torch.zeros(1, 1, 32, 16), torch.rand(1, 1, 32, 16)
    q[..., 0], k[:, :, 5, 0] = 100.0, -100.0
    q, k, v = (x.to(dtype) for x in (q, k, v))
    v[:, :, 5] = 0
    expected = differentiated(q, k, v, layout, torch.ones_like(q))
    v[:, :, 5] = 1e35
    for actual, reference in zip(differentiated(q, k, v, layout, torch.ones_like(q)), expected, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0x7FC0, 0xFFFF], ids=["quiet", "all bits set"])
def test_nan_scores_give_nan(bits: int, dtype: torch.dtype, instruction_set: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instruction_set)
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 0), 20)
    q, k, v = (torch.randn(1, 2, 60, 16, dtype=dtype) for _ in range(3))
    nan = torch.tensor(bits - 2**16 if bits >= 2**15 else bits, dtype=torch.int16).view(torch.bfloat16)
    k[0, 0, 25, 3] = nan.to(dtype)
    out, lse, dq, dk, dv = differentiated(q, k, v, layout, torch.ones_like(q))
    sees_nan = torch.zeros(1, 2, 60, dtype=torch.bool)
    sees_nan[0, 0, 20:40] = True
    for result in (out, dq, dk, dv):
        assert torch.equal(result.isnan().all(-1), sees_nan) and torch.equal(result.isnan().any(-1), sees_nan)
    assert torch.equal(lse.isnan(), sees_nan)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_long_rows_keep_their_digits(instruction_set: str, monkeypatch: pytest.MonkeyPatch):
    """Equal weights: a sum that takes them up one after the other would be off by 1e-4."""
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", instruction_set)
    tokens = 250_000
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1, 1), 2, key_tokens_per_frame=tokens)
    q, k, v = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, tokens, 16), torch.rand(1, 1, tokens, 16) + 0.5
    q[..., 0], k[..., 0], k[:, :, 0, 0] = 4.0, -1.1, 0.0
    mask, weights = torch.ones(2, tokens, dtype=torch.bool), torch.rand(1, 1, 2, 16)
    found = differentiated(q, k, v, layout, weights)
    plain, exact = (
        plain_gradients(*(x.to(dtype) for x in (q, k, v)), mask, weights.to(dtype), torch.zeros(1, 1, 2, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )
    for actual, low, reference in zip(found, plain, exact, strict=True):
        # The backward pass makes weights of the LSE, whose rounding they feel as it is, not relative to its size.
        rounding = torch.finfo(torch.float32).eps / 2 * float(reference.abs().max() * exact[1].abs().max())
        assert (actual - reference).abs().max() <= 2 * max(float((low - reference).abs().max()), rounding)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_scale(scale: float):
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 70, special_tokens=2)
    assert within_budget(error_ratios(layout, torch.bfloat16, head_size=32, scale=scale, backend="cpu"))


def test_tables_that_do_not_fit_are_refused():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 1), 20, special_tokens=2)
    q = torch.randn(1, 1, 60, 32)
    good = cpu.tables(layout, torch.float32, 32)
    for i in range(len(good)):
        for value in (-1, 10**6):
            bad = [table.clone() for table in good]
            bad[i].view(-1)[0] = value
            with pytest.raises(ValueError, match="the tables of a layout must fit it"):
                cpu.forward(q, q, q, bad, 1.0, False)


def test_says_why_amx_is_unused(monkeypatch: pytest.MonkeyPatch):
    used = NATIVE.why_amx_is_unused() == ""
    assert used or "amx_bf16" not in NATIVE.instruction_sets()
    refused = SimpleNamespace(why_amx_is_unused=lambda: "the system refused", instruction_sets=lambda: ["avx2"])
    monkeypatch.setattr(cpu, "extension", lambda: refused)
    assert cpu.notes(torch.bfloat16) == {"avx2": None, "amx_bf16": "the system refused"}
    assert cpu.notes(torch.float32) == {"avx2": None}


def test_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    assert "float16, bfloat16 and float32, got torch.float64" in str(cpu.unsupported(CPU, torch.float64, 64))
    assert "needs tensors on the CPU, got cuda" in str(cpu.unsupported(torch.device("cuda"), torch.float32, 64))
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_found", {})
        patch.setattr(cpu, "instruction_set", lambda: "baseline")
        assert "without it PyTorch is faster" in str(cpu.unsupported(CPU, torch.float32, 64))
    monkeypatch.setattr(cpu, "_found", {})
    monkeypatch.setattr(cpu, "extension", lambda: exec("raise ImportError('no such file')"))
    assert "its C++ extension is not there: no such file" in str(cpu.unsupported(CPU, torch.float32, 64))
