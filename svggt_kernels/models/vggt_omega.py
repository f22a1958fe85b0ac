"""VGGT-Omega."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .base import ModelRecord, block_attention, has_parts, read_images


def _global_attention(module: Any) -> dict[str, nn.Module]:
    kinds = module.inter_frame_attention_types
    blocks = enumerate(block_attention(module, "inter_frame_blocks").items())
    return {name: attention for i, (name, attention) in blocks if kinds[i] == "global"}


VGGT_OMEGA = ModelRecord(
    name="VGGT-Omega",
    structure="inter_frame_blocks, inter_frame_attention_types and patch_token_start",
    matches=partial(
        has_parts, blocks=("inter_frame_blocks",), attributes=("inter_frame_attention_types", "patch_token_start")
    ),
    global_attention=_global_attention,
    read=partial(read_images, special_tokens="patch_token_start"),
    known=("patch_embed", "frame_blocks", "inter_frame_blocks"),
)
