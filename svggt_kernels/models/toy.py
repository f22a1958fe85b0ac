"""The package's own small model, `svggt_kernels.demo.toy`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..demo.toy import ToyMultiViewTransformer
from .base import (
    ForwardInputs,
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_blocks,
    inputs_from_images,
)

__all__ = ["TOY"]


def _matches(module: nn.Module) -> bool:
    return has_blocks(module, "frame_blocks", "global_blocks") and hasattr(module, "num_special_tokens")


def _read(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return inputs_from_images(module, arguments, module.num_special_tokens, module.patch_size)


def _outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    return first_sample(result, "depth", "depth_conf", "pose_enc")


TOY = ModelRecord(
    name="toy",
    structure="frame_blocks, global_blocks and num_special_tokens (svggt_kernels.demo.toy)",
    matches=_matches,
    global_attention=partial(block_attention, path="global_blocks"),
    read=_read,
    known=("frame_blocks", "global_blocks"),
    runnable=RunnableModel(
        name="toy",
        build=ToyMultiViewTransformer,
        outputs=_outputs,
        long_side=336,
        trainable=False,
        cell=14,
    ),
)
