"""FlashAttention-4 on Hopper: dense, over paged keys, and with its own block sparsity (written against 4.0.0b36)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case
from .contender import Contender, dense_only, frames_only, half_on_cuda, one_sequence, package

BLOCK = 128
"""Rows and columns of a block of its block sparsity, which must be those of its tiles."""


def interface(part: str = "interface") -> Any:
    """Return a module of FlashAttention-4, or the reason why it cannot be imported."""
    return package(f"flash_attn.cute.{part}", "flash-attn-4")


def installed() -> str | None:
    """Return why FlashAttention-4 cannot be imported, or None if it can."""
    module = interface()
    return module if isinstance(module, str) else None


def _dense_unsupported(case: Case, q: Tensor) -> str | None:
    return dense_only(case) or half_on_cuda(q) or installed()


def _dense(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attention = interface().flash_attn_func
    return lambda: attention(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=case.scale)[0].transpose(1, 2)


def _paged(name: str, tile: tuple[int, int] | None) -> Contender:
    def unsupported(case: Case, q: Tensor) -> str | None:
        if q.requires_grad:
            return "paged keys are forward only"
        return one_sequence(case) or frames_only(case) or half_on_cuda(q) or installed()

    def prepare(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        attention = interface()._flash_attn_fwd
        degree = case.visible.sum(1)
        used = (degree * case.tokens).int().to(q.device)
        # Its batch is the frames; the entries behind a frame's degree are never read.
        paged = [x.transpose(1, 2).reshape(case.frames, case.tokens, case.heads, case.head_size) for x in (q, k, v)]
        pages = _seen_first(case.visible).to(q.device)
        options: dict[str, Any] = {"page_table": pages, "seqused_k": used, "softmax_scale": case.scale}
        if tile:
            options["tile_mn"] = tile
        return lambda: attention(*paged, **options)[0].reshape(1, -1, case.heads, case.head_size).transpose(1, 2)

    about = "FlashAttention-4 over paged keys, a page per frame, tile " + (
        f"{tile[0]}x{tile[1]}" if tile else "default"
    )
    return Contender(name, about, unsupported, prepare, storage="bnhd")


def _block_sparse_unsupported(case: Case, q: Tensor) -> str | None:
    if case.head_size > 128:
        return f"its tiles have {BLOCK} columns at head sizes up to 128, got {case.head_size}"
    return frames_only(case) or half_on_cuda(q) or installed()


def _block_sparse(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    attention = interface().flash_attn_func
    tokens, padded = case.tokens, -(-case.tokens // BLOCK) * BLOCK
    forward, backward = block_lists(case, q.device)
    options: dict[str, Any] = {"block_sparse_tensors": forward, "softmax_scale": case.scale}
    if padded > tokens:
        options["mask_mod"] = _real_keys(tokens, padded)
    if q.requires_grad:
        options["block_sparse_tensors_bwd"] = backward

    def pad(x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).unflatten(1, (case.frames, tokens))
        return F.pad(frames, (0, 0, 0, 0, 0, padded - tokens)).flatten(1, 2)

    # Without gradients q, k and v are padded before the time is taken, as a model could keep them padded.
    ready = None if q.requires_grad else [pad(x) for x in (q, k, v)]

    def call() -> Tensor:
        out = attention(*(ready or [pad(x) for x in (q, k, v)]), **options)[0]
        return out.unflatten(1, (case.frames, padded))[:, :, :tokens].flatten(1, 2).transpose(1, 2)

    return call


def block_lists(case: Case, device: torch.device) -> tuple[Any, Any]:
    """Return FlashAttention-4's block lists of the case, frames padded to whole blocks: forward and transposed.

    Forward lists the blocks of keys that each block of queries sees, backward the blocks of queries that see each block
    of keys. Blocks that hold padding keys are in the lists of masked blocks, the others in those of full blocks.
    """
    blocks = -(-case.tokens // BLOCK)
    full = case.tokens // BLOCK  # blocks of a frame without padding
    count, seen = case.visible.sum(1).int(), _seen_first(case.visible)
    seen_count, seeing = case.visible.sum(0).int(), _seen_first(case.visible.T)

    def of_frames(frames: Tensor, first: int, last: int) -> Tensor:
        """Return the blocks from `first` to before `last` of each listed frame, at least one column."""
        listed = (frames[..., None] * blocks + torch.arange(first, last)).flatten(1)
        return listed if last > first else torch.zeros(case.frames, 1)

    def lists(masked: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]) -> Any:
        tables = [x.int().contiguous()[None, None].to(device) for x in (*masked, *full)]
        return interface("block_sparsity").BlockSparseTensorsTorch(*tables, block_size=(BLOCK, BLOCK))

    def every_block(x: Tensor) -> Tensor:
        return x.repeat_interleave(blocks, 0)

    forward = lists(
        (every_block(count * (blocks - full)), every_block(of_frames(seen, full, blocks))),
        (every_block(count * full), every_block(of_frames(seen, 0, full))),
    )
    is_full = (torch.arange(blocks) < full).repeat(case.frames)
    seeing_count, rows = every_block(seen_count * blocks), every_block(of_frames(seeing, 0, blocks))
    backward = lists((seeing_count * ~is_full, rows), (seeing_count * is_full, rows))
    return forward, backward


def _real_keys(tokens: int, padded: int) -> Any:
    def real_keys(batch: Any, head: Any, row: Any, column: Any, lengths: Any, tensors: Any) -> Any:
        return column % padded < tokens

    return package("cutlass.cute", "nvidia-cutlass-dsl").jit(real_keys)


def _seen_first(visible: Tensor) -> Tensor:
    """Return the frames that each frame sees, int32 `[S, largest degree]`; what is behind its degree means nothing."""
    order = visible.int().argsort(dim=1, descending=True, stable=True)
    return order[:, : int(visible.sum(1).max())].int().contiguous()


CONTENDERS = (
    Contender("fa4-dense", "FlashAttention-4, dense", _dense_unsupported, _dense, storage="bnhd"),
    _paged("fa4-paged", None),
    _paged("fa4-paged-128x128", (128, 128)),
    _paged("fa4-paged-192x128", (192, 128)),
    Contender(
        "fa4-block-sparse",
        f"FlashAttention-4, block sparse, frames padded to a multiple of {BLOCK} tokens",
        _block_sparse_unsupported,
        _block_sparse,
        storage="bnhd",
    ),
)
