"""The CPU kernels in tiles (AMX), with tiles emulated: csrc/cpu/tiles.h."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11
import pytest
import torch
from builds import once
from layouts import random_layout
from tiers import every

from svggt_kernels import BlockLayout, CovisibilityGraph
from svggt_kernels.backend_errors import error_ratios
from svggt_kernels.backends import cpu
from svggt_kernels.proof import within_budget

SOURCE = Path(__file__).parents[2] / "csrc" / "cpu"
COMPILER = os.environ.get("CXX", "c++")
INCLUDES = [pybind11.get_include(), sysconfig.get_path("include")]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs a C++ compiler, {COMPILER} is not there")


def build_tiles(target: Path) -> None:
    """Build the extension with nothing but the kernels in tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SOURCE)
        from rules import EMULATED_TILES, SHARED, rules
    (target.parent / "build.ninja").write_text(rules(target, "bindings.cpp", "-O1", SHARED, INCLUDES, EMULATED_TILES))
    build = subprocess.run([Path(ninja.BIN_DIR, "ninja")], cwd=target.parent, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    target = once(f"tiles/_native{sysconfig.get_config_var('EXT_SUFFIX')}", build_tiles)
    spec = importlib.util.spec_from_file_location("_native", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def backend_in_tiles(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "extension", lambda: emulated)
    monkeypatch.setattr(cpu, "_found", {})


def assert_within_budget(layout: BlockLayout, head_size: int, seed: int, batch: int = 1) -> None:
    ratios = error_ratios(layout, torch.bfloat16, head_size=head_size, backend="cpu", batch=batch, seed=seed)
    assert within_budget(ratios), (seed, head_size, ratios)


def test_runs_in_tiles():
    assert cpu.instruction_set() == "amx_bf16"


@pytest.mark.parametrize("start", every(4, range(0, 40, 5)))
def test_fuzz_against_float64(start: int):
    for seed in range(start, start + 5):
        assert_within_budget(random_layout(seed, max_tokens=40), (8, 32, 64, 20, 130)[seed % 5], seed)


def test_every_tail_length():
    graph = CovisibilityGraph.from_pairs(3, [(0, 2), (2, 0)])
    for tokens in (*range(1, 66, 3), 31, 32, 33, 63, 65):
        assert_within_budget(BlockLayout.from_graph(graph, tokens), 32, tokens)


def test_many_blocks_and_tiles():
    """More rows than a tile of rows has, more columns than a tile of columns, two batches."""
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(2), 530, special_tokens=3)
    assert_within_budget(layout, 64, 0, batch=2)


def test_any_number_of_threads_gives_the_same_bits():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(4, 1), 210, special_tokens=3)
    q, k, v, grad = (torch.randn(1, 2, layout.num_tokens, 64, dtype=torch.bfloat16) for _ in range(4))
    tables, backward_tables = (make(layout, q.dtype, 64) for make in (cpu.tables, cpu.backward_tables))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, lse = cpu.forward(q, k, v, tables, 0.125, True)
            found.append([out, lse, *cpu.backward(grad, None, q, k, v, out, lse, backward_tables, 0.125)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def attend(layout: BlockLayout, q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return cpu.forward(q, k, v, cpu.tables(layout, q.dtype, q.shape[-1]), scale, True)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_padding_has_no_weight_whatever_the_scale(scale: float):
    """33 keys are padded to 64. Times the scale, scores are about 1e-30, 1, or below -1e30."""
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1), 33)
    q, k, v = torch.zeros(1, 1, 33, 32), torch.zeros(1, 1, 33, 32), torch.rand(1, 1, 33, 32)
    q[..., 0], k[..., 0] = (2.0**50, -(2.0**50)) if scale > 1 else (1.0, -1.0)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, lse = attend(layout, q, k, v, scale)
    scores = q.double() @ k.double().mT * scale
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=2**-20, atol=2**-8)


def test_a_weight_that_underflows_counts_for_nothing():
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1), 40)
    q, k, v = torch.zeros(1, 1, 40, 32), torch.zeros(1, 1, 40, 32), torch.rand(1, 1, 40, 32)
    q[..., 0], k[:, :, 5, 0] = 100.0, -100.0
    q, k, v = (x.bfloat16() for x in (q, k, v))
    v[:, :, 5] = 0
    expected = attend(layout, q, k, v, 0.25)
    v[:, :, 5] = 1e38
    assert all(torch.equal(a, b) for a, b in zip(attend(layout, q, k, v, 0.25), expected, strict=True))


def test_nan_scores_give_nan():
    layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 0), 20)
    q, k, v = (torch.randn(1, 1, 60, 32, dtype=torch.bfloat16) for _ in range(3))
    k[0, 0, 25, 3] = torch.nan
    sees_nan = torch.arange(60) // 20 == 1
    for result in attend(layout, q, k, v, 0.25):
        assert torch.equal(result[0, 0].reshape(60, -1).isnan().all(-1), sees_nan)
        assert torch.equal(result[0, 0].reshape(60, -1).isnan().any(-1), sees_nan)


def test_long_rows_keep_their_digits():
    """Weights are 1 and 2^-26, exact: the error is that of the sum, and 2e-4 where 1 + 2^-25 is 1."""
    tokens = 250_000
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(1, 1), 2, key_tokens_per_frame=tokens)
    q, k, v = torch.zeros(1, 1, 2, 32), torch.zeros(1, 1, tokens, 32), torch.rand(1, 1, tokens, 32)
    q[..., 0], k[..., 0], k[:, :, 0, 0] = 1.0, -26.0, 0.0
    q, k, v = (x.bfloat16() for x in (q, k, v))
    _, lse = attend(layout, q, k, v, math.log(2))
    torch.testing.assert_close(
        lse.double(), (q.double() @ k.double().mT * math.log(2)).logsumexp(-1), rtol=0, atol=1e-6
    )


def test_scores_far_apart_stay_finite():
    layout = BlockLayout.from_graph(CovisibilityGraph.all_visible(2), 300)
    q, k, v = (100 * torch.randn(1, 1, 600, 64, dtype=torch.bfloat16) for _ in range(3))
    out, lse = cpu.forward(q, k, v, cpu.tables(layout, q.dtype, 64), 0.125, True)
    gradients = cpu.backward(v, None, q, k, v, out, lse, cpu.backward_tables(layout, q.dtype, 64), 0.125)
    assert all(bool(x.isfinite().all()) for x in (out, lse, *gradients))
