"""The backends of svggt_kernels as contenders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from svggt_kernels import backends, block_sparse_attention

from ..cases import Case
from .contender import Contender

ONLINE = "hopper-online"
"""Backend hopper with the textbook's online softmax in place of its bounded one."""


def names() -> list[str]:
    """Return the names that `backend` knows, best backend first."""
    return [*backends.BACKENDS, ONLINE]


def backend(name: str) -> Contender:
    """Return the backend of svggt_kernels called `name`, or its variant, as a contender."""
    if name == ONLINE:
        return _online(backend("hopper"))

    def unsupported(case: Case, q: Tensor) -> str | None:
        return backends.reasons(q.device, q.dtype, q.shape[-1])[name]

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        layout = case.layout(q.device)
        return lambda: block_sparse_attention(q, k, v, layout, backend=name)

    def lse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, case.layout(q.device), backend=name, return_lse=True)[1]

    about = f"svggt_kernels, backend {name}"
    return Contender(name, about, unsupported, prepare, lse=lse, softmax=_softmax if name == "hopper" else None)


def _softmax(dtype: torch.dtype) -> str:
    return "bounded" if dtype == torch.bfloat16 else "online"


def _online(bounded: Contender) -> Contender:
    # Imported when it runs: the choice is made by a context manager, as a call without arguments has nowhere to say it.
    def online() -> AbstractContextManager[None]:
        return import_module("svggt_kernels.backends.hopper").softmax("online")

    def unsupported(case: Case, q: Tensor) -> str | None:
        if q.dtype != torch.bfloat16:
            return f"only bfloat16 has a choice of softmax, got {q.dtype}; name {bounded.name}"
        return bounded.unsupported(case, q)

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        call = bounded.prepare(case, q, k, v)

        def in_context() -> Tensor:
            with online():
                return call()

        return in_context

    def lse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert bounded.lse is not None
        with online():
            return bounded.lse(case, q, k, v)

    return replace(
        bounded,
        name=ONLINE,
        about=f"{bounded.about}, online softmax",
        unsupported=unsupported,
        prepare=prepare,
        lse=lse,
        variant_of=bounded.name,
        softmax=lambda dtype: "online",
    )
