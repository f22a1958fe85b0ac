"""MagiAttention's flexible flash attention: any ranges of queries and keys (written against 1.1.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from .contender import Contender, frames_only, half_on_cuda, one_sequence, package


def _magi() -> Any:
    return package("magi_attention.functional.flex_flash_attn", "MagiAttention from its repository")


def _unsupported(case: Case, q: Tensor) -> str | None:
    if case.head_size not in (64, 128):
        return f"it needs a head size of 64 or 128, got {case.head_size}"
    module = one_sequence(case) or frames_only(case) or half_on_cuda(q) or _magi()
    return module if isinstance(module, str) else None


def ranges(case: Case, merged: bool) -> tuple[Tensor, Tensor]:
    """Return the ranges of query and key tokens that see each other, int32 `[n, 2]` each, every pair of tokens once.

    Args:
        case: The problem.
        merged: Whether adjacent visible frames become one range of keys, as is best forward. Backward sums over the
            queries of each range of keys, so ranges of keys must not overlap: then every range is one frame.
    """
    before = torch.zeros(case.frames, 1, dtype=torch.bool)
    first = case.visible & ~torch.cat([before, case.visible[:, :-1]], 1) if merged else case.visible
    last = case.visible & ~torch.cat([case.visible[:, 1:], before], 1) if merged else case.visible
    query, start = first.nonzero().T
    end = last.nonzero()[:, 1] + 1
    pairs = (torch.stack([query, query + 1], 1), torch.stack([start, end], 1))
    return (pairs[0] * case.tokens).int(), (pairs[1] * case.tokens).int()


def _prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attention = _magi().flex_flash_attn_func
    queries, keys = (x.to(q.device) for x in ranges(case, merged=not q.requires_grad))

    def call() -> Tensor:
        out, _ = attention(
            *(x[0].transpose(0, 1) for x in (q, k, v)),
            queries,
            keys,
            auto_range_merge=True,
            max_seqlen_q=case.tokens,
            softmax_scale=case.scale,
            disable_fwd_atomic_reduction=True,
            disable_bwd_dkv_atomic_reduction=True,
        )
        return out.transpose(0, 1)[None]

    return call


CONTENDERS = (
    Contender("magi-ffa", "MagiAttention's flexible flash attention over ranges", _unsupported, _prepare, "bnhd"),
)
