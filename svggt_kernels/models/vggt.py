"""VGGT (Wang et al., arXiv 2503.11651), StreamVGGT, and forks such as FastVGGT and HunyuanWorld-Mirror."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from .base import (
    ForwardInputs,
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_parts,
    read_images,
    trunk_attention,
)
from .cameras import intrinsics_of_encoding, poses_of_encoding


def _build() -> nn.Module:
    from vggt.models.vggt import VGGT

    # FastVGGT has the same names, and leaves the point head out unless told.
    is_fastvggt = "merging" in inspect.signature(VGGT.__init__).parameters
    return VGGT(enable_point=True) if is_fastvggt else VGGT()


def vggt_outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the outputs of one sample by name; depth loses its last axis."""
    outputs = first_sample(result, ("depth", "depth_conf", "pose_enc", "world_points", "world_points_conf"))
    return outputs | {"depth": outputs["depth"][..., 0]}


VGGT = ModelRecord(
    name="VGGT",
    structure="frame_blocks, global_blocks and patch_start_idx; so have forks of VGGT and HunyuanWorld-Mirror",
    matches=partial(has_parts, blocks=("frame_blocks", "global_blocks"), attributes=("patch_start_idx",)),
    global_attention=partial(block_attention, path="global_blocks"),
    read=partial(read_images, special_tokens="patch_start_idx"),
    known=("patch_embed", "frame_blocks", "global_blocks"),
    followers=trunk_attention,
    runnable=RunnableModel(
        name="vggt",
        build=_build,
        outputs=vggt_outputs,
        cameras=poses_of_encoding,
        intrinsics=intrinsics_of_encoding,
        confidence=itemgetter("depth_conf"),
        requirement="pip install --no-deps git+https://github.com/facebookresearch/vggt && "
        "pip install einops huggingface_hub safetensors",
        published="facebook/VGGT-1B",
    ),
)


def _is_streaming(module: nn.Module) -> bool:
    return VGGT.matches(module) and "past_key_values" in inspect.signature(type(module).forward).parameters


def _read_streaming(module: nn.Module, arguments: Mapping[str, Any]) -> ForwardInputs:
    if arguments.get("use_cache"):
        raise ValueError(
            "a patched StreamVGGT runs all frames at once, without a KV cache, but got use_cache=True; "
            "call undo() on the patch before streaming"
        )
    return VGGT.read(module, arguments)


STREAM_VGGT = replace(
    VGGT,
    name="StreamVGGT",
    structure="frame_blocks, global_blocks and patch_start_idx, and a forward that takes past_key_values",
    matches=_is_streaming,
    read=_read_streaming,
    causal=True,
    runnable=None,
)
