"""FlexAttention, with the frames as block mask, by its Triton backend and by FlashAttention-4."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..cases import Case
from .contender import Contender, half_on_cuda
from .flash_attention_4 import installed

BLOCK = 128


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
    num_blocks = -(-num_tokens // BLOCK)
    patches = torch.zeros(num_blocks, case.frames, dtype=torch.float64, device=device)
    patches.index_put_((token // BLOCK, token // tokens), is_patch.double(), accumulate=True)
    total = torch.bincount(token // BLOCK, minlength=num_blocks).double()
    specials = total - patches.sum(1)
    pairs = patches @ visible.double() @ patches.T
    pairs += specials[:, None] * total + patches.sum(1)[:, None] * specials
    full = pairs == BLOCK**2
    partial = (pairs > 0) & ~full

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1).int()[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK, mask_mod, seq_lengths=(num_tokens, num_tokens)
    )


@lru_cache(maxsize=1)
def compiled(case: Case, backend: str | None) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled anew for each case and backend."""
    torch._dynamo.reset()
    # Donated buffers forbid the retained graph on which the backward alone is timed.
    import_module("torch._functorch.config").donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def _unsupported(case: Case, q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"compiled FlexAttention is compared on CUDA only, got {q.device}"
    if case.head_size & (case.head_size - 1):
        return f"it needs a head size that is a power of two, got {case.head_size}"
    return None


def _flash_unsupported(case: Case, q: Tensor) -> str | None:
    return _unsupported(case, q) or half_on_cuda(q) or installed()


def _prepare(backend: str | None, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attention, mask = compiled(case, backend), flex_mask(case, q.device)
    options = backend and {"BACKEND": backend}
    return lambda: attention(q, k, v, block_mask=mask, scale=case.scale, kernel_options=options)


CONTENDERS = (
    Contender(
        "flex",
        f"FlexAttention, compiled, block mask of {BLOCK} x {BLOCK} from the frames",
        _unsupported,
        partial(_prepare, None),
    ),
    Contender(
        "flex-flash",
        "FlexAttention by FlashAttention-4, with the same block mask",
        _flash_unsupported,
        partial(_prepare, "FLASH"),
    ),
)
