"""The package's own small model, `svggt_kernels.demo.model`: a VGGT in all but size."""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter

from torch import nn

from ..demo.model import RoomsModel
from ..demo.model.aggregator import Aggregator
from .base import RunnableModel
from .cameras import intrinsics_of_encoding, poses_of_encoding
from .vggt import VGGT, vggt_outputs


def _is_own(module: nn.Module) -> bool:
    return isinstance(module, Aggregator)


TOY = replace(
    VGGT,
    name="toy",
    structure="the aggregator of svggt_kernels.demo.model.RoomsModel",
    matches=_is_own,
    runnable=RunnableModel(
        name="toy",
        build=RoomsModel,
        outputs=vggt_outputs,
        cameras=poses_of_encoding,
        intrinsics=intrinsics_of_encoding,
        confidence=itemgetter("depth_conf"),
        long_side=154,
        one_size=(154, 112),
        trained=RoomsModel.trained,
    ),
)
