"""What is measured: the backends of svggt_kernels and the peers they are compared with, behind one small interface.

A contender is asked whether it can run a case, then prepares a call without arguments: layouts, masks and tables are
made in `prepare`, outside the timed region. Adding a peer is one entry in `PEERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from svggt_kernels import backends, block_sparse_attention

from .cases import Case

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Contender:
    """One implementation of attention on a case.

    Attributes:
        name: What the results call it.
        about: One line on what it does.
        unsupported: `unsupported(case, q)` returns why it cannot run the case for such a q (dtype, device, gradient
            required), or None if it can.
        prepare: `prepare(case, q, k, v)` returns a call without arguments that gives the output `[B, H, N, D]`,
            differentiable in q, k and v if they require it.
        storage: How q, k, v `[B, H, N, D]` should lie in memory, "bhnd" or "bnhd": each contender gets what it likes.
        lse: `lse(case, q, k, v)` returns the log-sum-exp `[B, H, N]` in nats, where the contender offers one.
    """

    name: str
    about: str
    unsupported: Callable[[Case, Tensor], str | None]
    prepare: Callable[[Case, Tensor, Tensor, Tensor], Callable[[], Tensor]]
    storage: str = "bhnd"
    lse: Callable[[Case, Tensor, Tensor, Tensor], Tensor] | None = None


def backend(name: str) -> Contender:
    """Return the backend of svggt_kernels called `name` as a contender."""

    def unsupported(case: Case, q: Tensor) -> str | None:
        return backends.reasons(q.device, q.dtype, q.shape[-1])[name]

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        layout = case.layout(q.device)
        return lambda: block_sparse_attention(q, k, v, layout, backend=name)

    def lse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, case.layout(q.device), backend=name, return_lse=True)[1]

    return Contender(name, f"svggt_kernels, backend {name}", unsupported, prepare, lse=lse)


def _dense_sdpa(name: str, kernel: SDPBackend) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if not case.is_dense:
            return "it has no sparsity; name a dense case"
        if kernel is SDPBackend.CUDNN_ATTENTION and q.device.type != "cuda":
            return f"cuDNN needs a CUDA device, got {q.device}"
        return None

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    return Contender(name, f"PyTorch's dense attention by {kernel.name.lower()}", unsupported, prepare)


def _frames_only(case: Case) -> str | None:
    return "it has no special tokens, only whole frames" if case.special else None


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
                    F.scaled_dot_product_attention(query, gathered(k, keys, seen), gathered(v, values, seen))
                    for query, seen in zip(queries, visible, strict=True)
                ],
                2,
            )

    return call


def flex_mask(case: Case, device: torch.device) -> BlockMask:
    """Return FlexAttention's block mask of the case, full and partial blocks told apart by counting visible pairs."""
    num_tokens, tokens, special = case.frames * case.tokens, case.tokens, case.special
    visible = case.visible.to(device)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = visible[row // tokens, column // tokens]
        return seen if special == 0 else seen | (row % tokens < special) | (column % tokens < special)

    # Tokens of each kind in each block: patches by frame, special ones together.
    token = torch.arange(num_tokens, device=device)
    is_patch = token % tokens >= special
    num_blocks = -(-num_tokens // FLEX_BLOCK)
    patches = torch.zeros(num_blocks, case.frames, dtype=torch.float64, device=device)
    patches.index_put_((token // FLEX_BLOCK, token // tokens), is_patch.double(), accumulate=True)
    total = torch.bincount(token // FLEX_BLOCK, minlength=num_blocks).double()
    specials = total - patches.sum(1)
    pairs = patches @ visible.double() @ patches.T
    pairs += specials[:, None] * total + patches.sum(1)[:, None] * specials
    full = pairs == FLEX_BLOCK**2
    partial = (pairs > 0) & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), FLEX_BLOCK, mask_mod, seq_lengths=(num_tokens, num_tokens)
    )


@lru_cache(maxsize=1)
def _flex(case: Case, device: torch.device) -> tuple[Callable[..., Tensor], BlockMask]:
    torch._dynamo.reset()
    # Donated buffers forbid the retained graph on which the backward alone is timed.
    import_module("torch._functorch.config").donated_buffer = False
    return torch.compile(flex_attention, dynamic=False), flex_mask(case, device)


def _flex_unsupported(case: Case, q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"compiled FlexAttention is compared on CUDA only, got {q.device}"
    if case.head_size & (case.head_size - 1):
        return f"it needs a head size that is a power of two, got {case.head_size}"
    return None


def _flex_prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    compiled, mask = _flex(case, q.device)
    return lambda: compiled(q, k, v, block_mask=mask)


@lru_cache(maxsize=1)
def _fa4() -> Any:
    """Return FlashAttention-4's interface, or the reason why it cannot be imported."""
    try:
        return import_module("flash_attn.cute.interface")
    except Exception as error:  # a third party's import may fail in any way; the reason is shown, not hidden
        return f"flash_attn.cute cannot be imported ({type(error).__name__}: {error}); install flash-attn-4"


def _fa4_unsupported(case: Case, q: Tensor) -> str | None:
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16 on CUDA, got {q.dtype} on {q.device}"
    module = _fa4()
    return module if isinstance(module, str) else None


def _fa4_dense_unsupported(case: Case, q: Tensor) -> str | None:
    return _fa4_unsupported(case, q) if case.is_dense else "it is run without sparsity; name a dense case"


def _fa4_dense(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attention = _fa4().flash_attn_func

    def call() -> Tensor:
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def _fa4_paged(name: str, tile: tuple[int, int] | None) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if q.requires_grad:
            return "paged keys are forward only"
        if case.batch != 1:
            return f"its batch is the frames, so the case's must be 1, got {case.batch}"
        return _frames_only(case) or _fa4_unsupported(case, q)

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attention = _fa4()._flash_attn_fwd
        degree = case.visible.sum(1)
        # Visible frames first; the entries behind a frame's degree are never read.
        pages = case.visible.int().argsort(dim=1, descending=True, stable=True)[:, : int(degree.max())].int()
        used = (degree * case.tokens).int().to(q.device)
        paged = [x.transpose(1, 2).reshape(case.frames, case.tokens, case.heads, case.head_size) for x in (q, k, v)]
        options: dict[str, Any] = {"page_table": pages.contiguous().to(q.device), "seqused_k": used} | (
            {"tile_mn": tile} if tile else {}
        )
        return lambda: attention(*paged, **options)[0].reshape(1, -1, case.heads, case.head_size).transpose(1, 2)

    about = "FlashAttention-4 over paged keys, a page per frame, tile " + (
        f"{tile[0]}x{tile[1]}" if tile else "default"
    )
    return Contender(name, about, unsupported, prepare, storage="bnhd")


PEERS: dict[str, Contender] = {
    peer.name: peer
    for peer in (
        _dense_sdpa("sdpa-dense-flash", SDPBackend.FLASH_ATTENTION),
        _dense_sdpa("sdpa-dense-cudnn", SDPBackend.CUDNN_ATTENTION),
        Contender(
            "sdpa-gather",
            "one call of PyTorch's attention per frame over its gathered keys, cuDNN first",
            lambda case, q: _frames_only(case),
            _gather,
        ),
        Contender(
            "flex",
            f"FlexAttention, compiled, block mask of {FLEX_BLOCK} x {FLEX_BLOCK} from the frames",
            _flex_unsupported,
            _flex_prepare,
        ),
        Contender("fa4-dense", "FlashAttention-4, dense", _fa4_dense_unsupported, _fa4_dense, storage="bnhd"),
        _fa4_paged("fa4-paged", None),
        _fa4_paged("fa4-paged-128x128", (128, 128)),
        _fa4_paged("fa4-paged-192x128", (192, 128)),
    )
}
"""The peers by name."""
