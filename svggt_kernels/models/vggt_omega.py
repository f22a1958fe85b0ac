"""VGGT-Omega."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .base import ModelRecord, block_attention, has_parts, read_images, trunk_attention


def _global_attention(module: Any) -> dict[str, nn.Module]:
    kinds = module.inter_frame_attention_types
    blocks = enumerate(block_attention(module, "inter_frame_blocks").items())
    return {name: attention for i, (name, attention) in blocks if kinds[i] == "global"}


def _followers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention among the special tokens of all frames, and that of a camera head."""
    others = trunk_attention(model)
    for path, module in model.named_modules():
        if VGGT_OMEGA.matches(module):
            known = _global_attention(module)
            every = block_attention(module, "inter_frame_blocks")
            prefix = f"{path}." if path else ""
            others |= {prefix + name: attention for name, attention in every.items() if name not in known}
    return others


VGGT_OMEGA = ModelRecord(
    name="VGGT-Omega",
    structure="inter_frame_blocks, inter_frame_attention_types and patch_token_start",
    matches=partial(
        has_parts, blocks=("inter_frame_blocks",), attributes=("inter_frame_attention_types", "patch_token_start")
    ),
    global_attention=_global_attention,
    read=partial(read_images, special_tokens="patch_token_start"),
    known=("patch_embed", "frame_blocks", "inter_frame_blocks"),
    followers=_followers,
)
