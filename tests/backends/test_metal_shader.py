"""The Metal shader as a source: its language, its memory, and whether these tests would see it broken."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from metal import clang, emulator, lint
from metal.bugs import BUGS, Bug
from tiers import every
from torch import Tensor

from svggt_kernels import BlockLayout, CovisibilityGraph
from svggt_kernels.backends import metal
from svggt_kernels.backends.metal import shader
from svggt_kernels.proof import error_ratios_of, within_budget

pytestmark = pytest.mark.skipif(not emulator.AVAILABLE, reason="the emulator needs g++")
needs_clang = pytest.mark.skipif(clang.CLANG is None, reason="clang++ is not installed: apt install clang-19")

VARIANTS = [
    (dtype, head_size, backward)
    for dtype in shader.ELEMENTS
    for head_size in shader.HEAD_SIZES
    for backward in (False, True)
]
SANITIZED = [(torch.float16, 64), (torch.float32, 128)]
LANES = ("lint", "clang", "compiler", "emulator", "numbers", "sanitizer")
BUGS_BY_LANE = [case for lane in LANES for case in every(7, [bug for bug in BUGS if bug.lane == lane])]
Change = Callable[[str], str]


def name(variant: object) -> str:
    return str(variant).removeprefix("torch.")


@pytest.fixture
def ratios_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Errors of the shader on a small layout that has everything; a part of it may be changed and built otherwise."""

    def run(
        dtype: torch.dtype,
        head_size: int = 64,
        flags: tuple[str, ...] = emulator.PLAIN,
        schedules: int = emulator.ALL_SCHEDULES,
        change: Change = str,
        changed_backward: bool | None = None,
    ) -> dict[str, float]:
        def compile_shader(text: str) -> emulator.Library:
            if changed_backward is None or f"#define BACKWARD {int(changed_backward)}\n" in text:
                return emulator.Library(change(text), flags, schedules)
            return emulator.Library(text, emulator.PLAIN, schedules=1)

        def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
            if changed_backward is False:
                return *metal._forward(layout, *inputs[:3]), *(torch.zeros_like(x) for x in inputs[:3])
            return metal._attend(layout, *inputs)

        monkeypatch.setattr(torch.mps, "compile_shader", compile_shader, raising=False)
        monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
        monkeypatch.setattr(shader, "_libraries", {})
        graph = CovisibilityGraph.from_pairs(3, [(0, 1), (2, 0)], num_key_frames=2)
        layout = BlockLayout.from_graph(graph, [33, 3, 5], key_tokens_per_frame=[37, 2])
        found = error_ratios_of(attend, layout, dtype, head_size=head_size, batch=2, heads=2)
        layout = BlockLayout.from_graph(CovisibilityGraph.sequential(3, 0), 35, special_tokens=2)
        dense = error_ratios_of(attend, layout, dtype, head_size=head_size, heads=2)
        return {
            quantity: max(ratio, dense[quantity], key=lambda x: (x != x, x))
            for quantity, ratio in found.items()
            if changed_backward is not False or quantity in ("out", "lse")
        }

    return run


def flags_for(bug: Bug) -> tuple[str, ...]:
    return emulator.SANITIZED if bug.lane == "sanitizer" else emulator.PLAIN


@pytest.mark.parametrize(("dtype", "head_size", "backward"), VARIANTS, ids=name)
class TestLanguage:
    def test_lint(self, dtype: torch.dtype, head_size: int, backward: bool):
        assert lint.complaints(shader.source(dtype, head_size, backward)) == []

    @needs_clang
    @pytest.mark.parametrize("standard", clang.STANDARDS)
    def test_address_spaces(self, dtype: torch.dtype, head_size: int, backward: bool, standard: str):
        assert clang.complaints(shader.source(dtype, head_size, backward), standard) == []


@pytest.mark.parametrize(("dtype", "head_size"), every(2, SANITIZED), ids=name)
def test_sanitizers_find_nothing(dtype: torch.dtype, head_size: int, ratios_of):
    """No byte beyond a buffer or a threadgroup array, no misaligned access, no undefined arithmetic."""
    assert within_budget(ratios_of(dtype, head_size, emulator.SANITIZED, schedules=1))


@pytest.mark.parametrize("dtype", every(2, [torch.float16, torch.bfloat16]), ids=name)
def test_fast_math_stays_within_the_budget(dtype: torch.dtype, ratios_of):
    """PYTORCH_MPS_FAST_MATH=1 lets the compiler reorder sums and assume that nothing is infinite."""
    assert within_budget(ratios_of(dtype, flags=emulator.FAST_MATH, schedules=1))


@pytest.mark.parametrize("bug", BUGS_BY_LANE, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, ratios_of):
    if bug.lane == "clang" and clang.CLANG is None:
        pytest.skip("clang++ is not installed: apt install clang-19")
    text = bug.plant(shader.source(bug.dtype, 64, bug.backward))
    if bug.lane == "lint":
        assert re.search(bug.says, "\n".join(lint.complaints(text)))
    elif bug.lane == "clang":
        assert re.search(bug.says, "\n".join(clang.complaints(text, "c++14")))
    elif bug.lane == "numbers":
        ratios = ratios_of(bug.dtype, schedules=1, change=bug.plant, changed_backward=bug.backward)
        assert not within_budget(ratios)
    else:
        with pytest.raises(emulator.EmulatorError, match=bug.says):
            ratios_of(bug.dtype, flags=flags_for(bug), change=bug.plant, changed_backward=bug.backward)


def test_the_list_of_bugs_is_long_and_covers_every_lane():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
    assert {bug.lane for bug in BUGS} == set(LANES)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("dtype", "head_size"), every(2, [(torch.bfloat16, 64), (torch.float32, 128)]), ids=name)
def test_compiles_as_cuda(dtype: torch.dtype, head_size: int, backward: bool):
    """So that a GPU can run it at full size; tests/metal/cuda/run.sh does."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from metal import on_cuda

    cubin = on_cuda.compile_to_cubin(shader.source(dtype, head_size, backward))
    names = (
        [b"run_attention_backward_queries", b"run_attention_backward_keys"] if backward else [b"run_attention_forward"]
    )
    assert all(name in cubin for name in names)
