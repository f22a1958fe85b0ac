"""Pi3 (Wang et al., arXiv 2507.13347), whose frames are all alike."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .base import (
    ForwardInputs,
    ModelRecord,
    RunnableModel,
    block_attention,
    first_sample,
    has_blocks,
    inputs_from_images,
)

__all__ = ["PI3"]


def _matches(module: nn.Module) -> bool:
    names = ("encoder", "register_token", "patch_start_idx")
    return has_blocks(module, "decoder") and all(hasattr(module, name) for name in names)


def _read(module: Any, arguments: Mapping[str, Any]) -> ForwardInputs:
    return inputs_from_images(module, arguments, module.patch_start_idx, module.patch_size, name="imgs")


def _build() -> nn.Module:
    from pi3.models.pi3 import Pi3

    return Pi3()


def _outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    outputs = first_sample(result, "local_points", "points", "conf", "camera_poses")
    return {"depth": outputs["local_points"][..., 2]} | outputs


PI3 = ModelRecord(
    name="Pi3",
    structure="decoder (blocks with attn), encoder, register_token and patch_start_idx",
    matches=_matches,
    global_attention=partial(block_attention, path="decoder", start=1, step=2),
    read=_read,
    known=("encoder", "decoder", "point_decoder", "conf_decoder", "camera_decoder"),
    reference_frame=None,
    runnable=RunnableModel(
        name="pi3",
        build=_build,
        outputs=_outputs,
        requirement="pip install --no-deps git+https://github.com/yyfz/Pi3 && pip install huggingface_hub safetensors",
    ),
)
