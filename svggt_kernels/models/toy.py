"""The package's own small model, `svggt_kernels.demo.toy`."""

from __future__ import annotations

from functools import partial

from ..demo.toy import ToyMultiViewTransformer
from .base import (
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_parts,
    read_images,
)
from .cameras import poses_of_encoding

TOY = ModelRecord(
    name="toy",
    structure="frame_blocks, global_blocks and num_special_tokens (svggt_kernels.demo.toy)",
    matches=partial(has_parts, blocks=("frame_blocks", "global_blocks"), attributes=("num_special_tokens",)),
    global_attention=partial(block_attention, path="global_blocks"),
    read=partial(read_images, special_tokens="num_special_tokens"),
    known=("frame_blocks", "global_blocks"),
    runnable=RunnableModel(
        name="toy",
        build=ToyMultiViewTransformer,
        outputs=partial(first_sample, names=("depth", "depth_conf", "pose_enc")),
        cameras=poses_of_encoding,
        long_side=336,
        trainable=False,
        cell=14,
    ),
)
