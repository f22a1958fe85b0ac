"""Pi3 (Wang et al., arXiv 2507.13347), whose frames are all alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .base import (
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_parts,
    read_images,
)
from .cameras import intrinsics_of_points, poses_as_they_are


def _build() -> nn.Module:
    from pi3.models.pi3 import Pi3

    return Pi3()


def _outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    outputs = first_sample(result, ("local_points", "points", "conf", "camera_poses"))
    return {"depth": outputs["local_points"][..., 2]} | outputs


def _confidence(outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the probability whose logit is `conf`, `[S, H, W, 1]`."""
    return outputs["conf"][..., 0].sigmoid()


PI3 = ModelRecord(
    name="Pi3",
    structure="decoder (blocks with attn), encoder, register_token and patch_start_idx",
    matches=partial(has_parts, blocks=("decoder",), attributes=("encoder", "register_token", "patch_start_idx")),
    global_attention=partial(block_attention, path="decoder", start=1, step=2),
    read=partial(read_images, special_tokens="patch_start_idx", name="imgs"),
    known=("encoder", "decoder", "point_decoder", "conf_decoder", "camera_decoder"),
    reference_frame=None,
    runnable=RunnableModel(
        name="pi3",
        build=_build,
        outputs=_outputs,
        cameras=poses_as_they_are,
        intrinsics=intrinsics_of_points,
        confidence=_confidence,
        requirement="pip install --no-deps git+https://github.com/yyfz/Pi3 && pip install huggingface_hub safetensors",
        published="yyfz233/Pi3",
    ),
)
