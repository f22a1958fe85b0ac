"""Depth Anything 3 (Lin et al., arXiv 2511.10647), which moves a reference view to the front."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import (
    ForwardInputs,
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_parts,
    inputs_from_images,
)
from .cameras import intrinsics_as_they_are, poses_of_extrinsics

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _matches(module: nn.Module) -> bool:
    # The wrapper of the transformer, which others call; the transformer itself has no forward.
    transformer = getattr(module, "pretrained", None)
    return has_parts(transformer, blocks=("blocks",)) and getattr(transformer, "alt_start", -1) >= 0


def _global_attention(module: Any) -> dict[str, nn.Module]:
    first_odd = module.pretrained.alt_start | 1
    return block_attention(module, "pretrained.blocks", start=first_odd, step=2)


def _reorders_between(module: Any) -> tuple[str, str] | None:
    first = module.pretrained.alt_start
    return (f"pretrained.blocks.{first - 2}", f"pretrained.blocks.{first - 1}") if first >= 2 else None


def _read(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    transformer = module.pretrained
    return inputs_from_images(module, arguments, 1 + transformer.num_register_tokens, transformer.patch_size, name="x")


def _build_small() -> nn.Module:
    os.environ.setdefault("DA3_LOG_LEVEL", "WARN")  # its notes would mix with the report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its dependencies warn it of is not for our users
        import depth_anything_3
        from depth_anything_3.cfg import create_object, load_config

        return create_object(load_config(str(Path(depth_anything_3.__path__[0]) / "configs" / "da3-small.yaml")))


def _feed(frames: Tensor) -> Tensor:
    mean, deviation = (frames.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return ((frames - mean) / deviation)[None]


DEPTH_ANYTHING_3 = ModelRecord(
    name="Depth Anything 3",
    structure="pretrained.blocks and pretrained.alt_start of 0 or more",
    matches=_matches,
    global_attention=_global_attention,
    read=_read,
    known=("pretrained",),
    reorders_between=_reorders_between,
    images_are_normalised=True,
    first_is_reference={"ref_view_strategy": "first"},
    runnable=RunnableModel(
        name="da3-small",
        build=_build_small,
        outputs=partial(first_sample, names=("depth", "depth_conf", "extrinsics", "intrinsics")),
        cameras=poses_of_extrinsics,
        intrinsics=intrinsics_as_they_are,
        confidence=itemgetter("depth_conf"),
        feed=_feed,
        requirement="pip install --no-deps depth-anything-3 && "
        "pip install einops omegaconf addict huggingface_hub safetensors",
        published="depth-anything/DA3-SMALL",
        long_side=504,
        key_prefix="model.",
    ),
)
