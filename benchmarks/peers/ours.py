"""The backends of svggt_kernels and their variants as contenders; a variant's lines carry its backend's name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from svggt_kernels import backends, block_sparse_attention

from ..cases import Case
from .contender import Contender


def names() -> list[str]:
    """Return the names that `backend` knows, best backend first, then the variants, as hopper-online."""
    kinds = backends.BACKENDS.items()
    return [*backends.BACKENDS, *(f"{name}-{variant}" for name, each in kinds for variant in each.TRAITS.variants)]


def backend(name: str) -> Contender:
    """Return the backend of svggt_kernels called `name`, or its variant, as a contender."""
    stem, _, variant = name.partition("-")
    kernels = backends.load(stem)

    def unsupported(case: Case, q: Tensor) -> str | None:
        return backends.reasons(q.device, q.dtype, q.shape[-1])[kernels.NAME]

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        layout = case.layout(q.device)
        return lambda: block_sparse_attention(q, k, v, layout, scale=case.scale, backend=kernels.NAME)

    def lse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = case.layout(q.device)
        return block_sparse_attention(q, k, v, layout, scale=case.scale, backend=kernels.NAME, return_lse=True)[1]

    about = f"svggt_kernels, backend {kernels.NAME}"
    contender = Contender(
        kernels.NAME, about, unsupported, prepare, lse=lse, strides=True, choices=kernels.TRAITS.choices
    )
    return _varied(contender, variant, kernels.TRAITS.variants[variant]) if variant else contender


def _varied(usual: Contender, variant: str, context: Callable[[], AbstractContextManager[None]]) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        direction = "bwd" if q.requires_grad else "fwd"
        if varied.labels(q.dtype, direction) == usual.labels(q.dtype, direction):
            return f"it computes what {usual.name} computes in {q.dtype}, direction {direction}; name {usual.name}"
        return usual.unsupported(case, q)

    varied = replace(
        usual,
        name=f"{usual.name}-{variant}",
        about=f"{usual.about}, {variant}",
        unsupported=unsupported,
        variant_of=usual.name,
        context=context,
    )
    return varied
