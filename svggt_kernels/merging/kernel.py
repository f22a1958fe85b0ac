"""`merge` as a Triton kernel: of up to four parts each is read once, and the sum written once."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS, MOST_SAMPLES, MOST_ROWS = 4, 2**16 - 1, 2**31 - 64
ROWS = 32
"""Rows of D values that one program merges."""


def obstacle(outs: list[Tensor]) -> str | None:
    """Return why the kernel cannot merge such parts, or None."""
    B, H, N, _ = outs[0].shape
    if outs[0].dtype == torch.float64:
        return "it sums in float32"
    if B > MOST_SAMPLES or H * N > MOST_ROWS:
        return f"it takes {MOST_SAMPLES} samples and {MOST_ROWS} rows of each"
    return None


# The count differs from call to call; nothing is wider where it is a multiple of 16.
@triton.jit(do_not_specialize=["tokens"])
def _merge(
    out0, out1, out2, out3, lse0, lse1, lse2, lse3, out, lse, tokens,
    PARTS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Outputs lie as [B, N, H, D], whose rows of D are numbered as they lie in a sample; LSEs as [B, H, N]."""
    outs, lses = (out0, out1, out2, out3), (lse0, lse1, lse2, lse3)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    exists = row < tokens * HEADS
    first = tl.program_id(1).to(tl.int64) * tokens * HEADS
    place = first + (row % HEADS).to(tl.int64) * tokens + row // HEADS
    at = (first + row)[:, None] * D + column[None, :]
    inside = exists[:, None] & (column < D)[None, :]

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        highest = tl.maximum(highest, tl.load(lses[i] + place, mask=exists, other=float("-inf")))
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in tl.static_range(PARTS):
        of_part = tl.load(lses[i] + place, mask=exists, other=float("-inf"))
        weight = tl.exp(of_part - highest)
        sees = inside & (of_part != float("-inf"))[:, None]
        total += weight
        merged += weight[:, None] * tl.load(outs[i] + at, mask=sees, other=0.0).to(tl.float32)
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    tl.store(out + at, (merged / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, tl.where(blind, float("-inf"), highest + tl.log(total)), mask=exists)


def merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `merging.merge`; for parts to which there is no `obstacle`.

    Of more parts than `MOST_PARTS` the first ones become one part in float32, until there are no more.
    """
    dtype = outs[0].dtype
    while len(outs) > MOST_PARTS:
        out, lse = _launch(outs[:MOST_PARTS], lses[:MOST_PARTS], torch.float32)
        outs, lses = [out, *outs[MOST_PARTS:]], [lse, *lses[MOST_PARTS:]]
    return _launch(outs, lses, dtype)


def _launch(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge at most `MOST_PARTS` parts to an output of a dtype."""
    B, H, N, D = outs[0].shape
    outs = [x.transpose(1, 2).contiguous() for x in outs]
    lses = [x.contiguous() for x in lses]
    out, lse = torch.empty_like(outs[0], dtype=dtype), torch.empty_like(lses[0])
    if out.numel():
        unused = MOST_PARTS - len(outs)
        with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
            _merge[(triton.cdiv(N * H, ROWS), B)](
                *outs, *outs[:1] * unused, *lses, *lses[:1] * unused, out, lse, N,
                PARTS=len(outs), HEADS=H, D=D, BLOCK_D=triton.next_power_of_2(D), ROWS=ROWS, num_warps=4,
            )  # fmt: skip
    return out.transpose(1, 2), lse
