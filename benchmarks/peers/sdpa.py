"""PyTorch's own dense attention: alone on dense cases, and frame by frame over gathered keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases import Case
from .contender import Contender, dense_only, frames_only


def _dense(name: str, kernel: SDPBackend) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if kernel is SDPBackend.CUDNN_ATTENTION and q.device.type != "cuda":
            return f"cuDNN needs a CUDA device, got {q.device}"
        return dense_only(case)

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, scale=case.scale)

        return call

    return Contender(name, f"PyTorch's dense attention by {kernel.name.lower()}", unsupported, prepare)


def _gather(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    visible = [row.nonzero()[:, 0].tolist() for row in case.visible]
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def gathered(x: Tensor, frames: tuple[Tensor, ...], seen: list[int]) -> Tensor:
        # Adjacent frames need no copy. Under autograd a slice would cost a full-size zero gradient for every frame.
        if len(seen) == seen[-1] - seen[0] + 1 and (len(seen) == case.frames or not x.requires_grad):
            return x[:, :, seen[0] * case.tokens : (seen[-1] + 1) * case.tokens]
        return torch.cat([frames[frame] for frame in seen], 2)

    def call() -> Tensor:
        queries, keys, values = (x.split(case.tokens, 2) for x in (q, k, v))
        with sdpa_kernel(kernels, set_priority=True):
            return torch.cat(
                [
                    F.scaled_dot_product_attention(
                        query, gathered(k, keys, seen), gathered(v, values, seen), scale=case.scale
                    )
                    for query, seen in zip(queries, visible, strict=True)
                ],
                2,
            )

    return call


CONTENDERS = (
    _dense("sdpa-dense-flash", SDPBackend.FLASH_ATTENTION),
    _dense("sdpa-dense-cudnn", SDPBackend.CUDNN_ATTENTION),
    Contender(
        "sdpa-gather",
        "one call of PyTorch's attention per frame over its gathered keys, cuDNN first",
        lambda case, q: frames_only(case),
        _gather,
    ),
)
