"""FlashInfer's block-sparse attention, with frames as blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svggt_kernels import CovisibilityGraph

from ..cases import Case
from .contender import Contender, frames_only, half_on_cuda, one_sequence, package

WORKSPACE = 2**27
"""Bytes of the workspace, as its documentation recommends."""


def _flashinfer() -> Any:
    return package("flashinfer", "flashinfer-python")


def _unsupported(case: Case, q: Tensor) -> str | None:
    if q.requires_grad:
        return "it is forward only"
    module = one_sequence(case) or frames_only(case) or half_on_cuda(q) or _flashinfer()
    return module if isinstance(module, str) else None


def _prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    wrapper = _flashinfer().BlockSparseAttentionWrapper(torch.empty(WORKSPACE, dtype=torch.uint8, device=q.device))
    graph = CovisibilityGraph.from_dense(case.visible)
    num_tokens = case.frames * case.tokens
    wrapper.plan(
        graph.indptr.to(q.device),
        graph.indices.to(q.device),
        num_tokens,
        num_tokens,
        case.tokens,
        case.tokens,
        case.heads,
        case.heads,
        case.head_size,
        sm_scale=case.scale,
        q_data_type=q.dtype,
        o_data_type=q.dtype,
    )
    tokens_first = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
    return lambda: wrapper.run(*tokens_first).transpose(0, 1)[None]


CONTENDERS = (
    Contender("flashinfer", "FlashInfer's block-sparse attention, a block per frame", _unsupported, _prepare, "bnhd"),
)
