"""Masks that a model gives to its attention: allowed where the graph hides at least as much."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..coarse import CoarseLayout
from ..layout import BlockLayout

PAIRS_AT_ONCE = 2**24


CheckedMasks = dict[tuple[Any, ...], Tensor]
"""Masks that were checked, each by what changes where another takes its memory or it is written to."""


def require_redundant(
    name: str, attn_mask: Tensor, layouts: tuple[BlockLayout | CoarseLayout, ...], checked: CheckedMasks
) -> None:
    """Raise unless an attention mask leaves alone every pair of tokens that the layouts show; waits for the device.

    Args:
        name: What the message calls the attention module.
        attn_mask: As `scaled_dot_product_attention` takes it, `[..., N, N]`, True or 0 where tokens may attend.
        layouts: One per sample, or one for all.
        checked: Masks that need no check for these layouts; this one is added, so that its memory is no other's.

    Raises:
        ValueError: If the mask hides or weighs a visible pair, or has another shape.
    """
    sizes = layouts[0].num_tokens, layouts[0].num_key_tokens
    if not 2 <= attn_mask.dim() <= 4 or any(
        given not in (1, size) for given, size in zip(attn_mask.shape[-2:], sizes, strict=True)
    ):
        raise ValueError(
            f"the attn_mask of {name} must have shape [..., N, N] with N = {sizes[0]}, got {list(attn_mask.shape)}"
        )
    # Tensors of inference mode do not count their changes, and so are checked each time.
    version = None if attn_mask.is_inference() else attn_mask._version
    key = (attn_mask.data_ptr(), attn_mask.shape, attn_mask.stride(), attn_mask.dtype, attn_mask.device, version)
    if version is not None and key in checked:
        return
    mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    for sample, layout in enumerate(layouts):
        of_sample = mask[sample : sample + 1] if len(layouts) == len(mask) else mask
        if _hides(of_sample, layout):
            raise ValueError(
                f"{name} is given an attn_mask that hides or weighs tokens which the covisibility graph shows. "
                "Leave the mask out, or give a graph that shows only what the mask does"
            )
    if version is not None:
        checked[key] = attn_mask


def _hides(mask: Tensor, layout: BlockLayout | CoarseLayout) -> bool:
    """Whether a mask `[B or 1, H or 1, N or 1, N or 1]` hides or weighs a pair that the layout shows."""
    if mask.shape[-2] > 1 and mask.stride(-2) == 0:
        mask = mask[..., :1, :]
    step = max(1, PAIRS_AT_ONCE // layout.num_key_tokens)
    for first in range(0, layout.num_tokens, step):
        rows = slice(first, first + step)
        some = mask if mask.shape[-2] == 1 else mask[..., rows, :]
        allowed = some if mask.dtype == torch.bool else some == 0
        if not bool(allowed.all()) and bool((layout.to_dense(rows) & ~allowed).any()):
            return True
    return False
