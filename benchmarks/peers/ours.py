"""The backends of svggt_kernels as contenders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from svggt_kernels import backends, block_sparse_attention
from svggt_kernels.backends import hopper

from ..cases import Case
from .contender import Contender

ONLINE = "hopper-online"
"""Backend hopper with the textbook's online softmax in place of its bounded one."""

ACCUMULATED = "hopper-accumulated"
"""Backend hopper with the gradient of q added up in no fixed order in place of its deterministic one."""


def names() -> list[str]:
    """Return the names that `backend` knows, best backend first."""
    return [*backends.BACKENDS, ONLINE, ACCUMULATED]


def backend(name: str) -> Contender:
    """Return the backend of svggt_kernels called `name`, or its variant, as a contender."""
    if name == ONLINE:
        return _online(backend("hopper"))
    if name == ACCUMULATED:
        return _accumulated(backend("hopper"))

    def unsupported(case: Case, q: Tensor) -> str | None:
        return backends.reasons(q.device, q.dtype, q.shape[-1])[name]

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        layout = case.layout(q.device)
        return lambda: block_sparse_attention(q, k, v, layout, scale=case.scale, backend=name)

    def lse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = case.layout(q.device)
        return block_sparse_attention(q, k, v, layout, scale=case.scale, backend=name, return_lse=True)[1]

    contender = Contender(name, f"svggt_kernels, backend {name}", unsupported, prepare, lse=lse)
    return replace(contender, softmax=_softmax, gradients="deterministic") if name == hopper.NAME else contender


def _softmax(dtype: torch.dtype) -> str:
    return "bounded" if dtype == torch.bfloat16 else "online"


def _online(bounded: Contender) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if q.dtype != torch.bfloat16:
            return f"only bfloat16 has a choice of softmax, got {q.dtype}; name {bounded.name}"
        return bounded.unsupported(case, q)

    return replace(
        bounded,
        name=ONLINE,
        about=f"{bounded.about}, online softmax",
        unsupported=unsupported,
        variant_of=bounded.name,
        softmax=lambda dtype: "online",
        context=partial(hopper.softmax, "online"),
    )


def _accumulated(deterministic: Contender) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if not q.requires_grad:
            return f"only the backward pass has a choice of gradients, got direction fwd; name {deterministic.name}"
        return deterministic.unsupported(case, q)

    return replace(
        deterministic,
        name=ACCUMULATED,
        about=f"{deterministic.about}, accumulated gradients",
        unsupported=unsupported,
        variant_of=deterministic.name,
        gradients="accumulated",
        context=partial(hopper.gradients, "accumulated"),
    )
