"""Small cases of every kernel of the Hopper backend, to be run under compute-sanitizer; a program, not a test.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/sanitize_hopper.py
    compute-sanitizer --tool racecheck python tests/sanitize_hopper.py --every-lane

Errors of the driver's interface are left out: its bindings ask it for functions that it may not have.

racecheck does not understand that lane 0 arrives at a barrier for its warp; with --every-lane all do. A __syncwarp that
is missing before such an arrival can then not be found.
"""

from __future__ import annotations

import argparse
import math

import torch

from svggt_kernels import BlockLayout, CoarseGraph, CoarseLayout, CovisibilityGraph, block_sparse_attention
from svggt_kernels.backends import _nvrtc as runtime
from svggt_kernels.backends import hopper

# Tokens of a frame, special ones of them, head size, dtype, scale. Row tiles: 330 tokens are 192 and 138, 216 ordinary
# ones 192 and 24, 300 192 and 108, rests of three, one and two warpgroups. 6 x 50 special tokens are more than a tile.
CASES = (
    (330, 0, 64, torch.bfloat16, None),
    (350, 50, 64, torch.bfloat16, None),
    (219, 3, 64, torch.bfloat16, math.log(2)),
    (219, 3, 128, torch.bfloat16, None),
    (330, 0, 128, torch.bfloat16, math.log(2)),
    (219, 3, 64, torch.float16, None),
    (330, 0, 128, torch.float16, None),
)


def layout(tokens: int, special: int) -> BlockLayout:
    """Each frame sees four of five, more than 8 tiles of columns; a sixth sees itself."""
    visible = torch.zeros(6, 6, dtype=torch.bool)
    visible[:5, :5] = ~torch.eye(5, dtype=torch.bool).roll(2, 1)
    graph = CovisibilityGraph.from_dense(visible, square=True).to("cuda")
    return BlockLayout.from_graph(graph, tokens, special_tokens=special)


def run(tokens: int, special: int, head_size: int, dtype: torch.dtype, scale: float | None) -> None:
    seen = layout(tokens, special)
    shape = (1, 1, seen.num_tokens, head_size)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in "qkv")
    for softmax, gradients in (("bounded", "deterministic"), ("online", "accumulated")):
        with hopper.softmax(softmax), hopper.gradients(gradients):
            out, lse = block_sparse_attention(q, k, v, seen, scale=scale, return_lse=True, backend="hopper")
            torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    with torch.no_grad():
        q[:, :, [100, 210]] *= 100  # rows that fail the proof of the bounded softmax
        block_sparse_attention(q, k, v, seen, scale=scale, backend="hopper")
        weighted = CoarseGraph.core(6, [0, 1], [3, 4], stride=2).to("cuda")
        coarse = CoarseLayout.from_graph(weighted, (1, tokens - special), special_tokens=special)
        for return_lse in (False, True):
            block_sparse_attention(q, k, v, coarse, scale=scale, return_lse=return_lse, backend="hopper")
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every-lane", action="store_true", help="compile the kernels with EVERY_LANE_ARRIVES")
    if parser.parse_args().every_lane:
        compile_to_cubin = runtime.compile_to_cubin
        every_lane = {"EVERY_LANE_ARRIVES": 1}
        runtime.compile_to_cubin = lambda source, target, defines: compile_to_cubin(
            source, target, defines | every_lane
        )
    torch.manual_seed(0)
    for case in CASES:
        print(*case, flush=True)
        run(*case)


if __name__ == "__main__":
    main()
