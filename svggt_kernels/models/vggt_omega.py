"""VGGT-Omega."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .base import ForwardInputs, ModelRecord, block_attention, has_blocks, inputs_from_images

__all__ = ["VGGT_OMEGA"]


def _matches(module: nn.Module) -> bool:
    names = ("inter_frame_attention_types", "patch_token_start")
    return has_blocks(module, "inter_frame_blocks") and all(hasattr(module, name) for name in names)


def _global_attention(module: Any) -> dict[str, nn.Module]:
    kinds = module.inter_frame_attention_types
    blocks = enumerate(block_attention(module, "inter_frame_blocks").items())
    return {name: attention for i, (name, attention) in blocks if kinds[i] == "global"}


def _read(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return inputs_from_images(module, arguments, module.patch_token_start, module.patch_size)


VGGT_OMEGA = ModelRecord(
    name="VGGT-Omega",
    structure="inter_frame_blocks, inter_frame_attention_types and patch_token_start",
    matches=_matches,
    global_attention=_global_attention,
    read=_read,
    known=("patch_embed", "frame_blocks", "inter_frame_blocks"),
)
