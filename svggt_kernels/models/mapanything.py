"""MapAnything (Keetha et al., arXiv 2509.13414), through the transformer of UniCeption that it runs on feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .base import ForwardInputs, ModelRecord, argument, block_attention, has_parts

TRANSFORMER = "MultiViewAlternatingAttentionTransformer"


def _matches(module: nn.Module) -> bool:
    classes = (cls.__name__ for cls in type(module).__mro__)
    return has_parts(module, blocks=("self_attention_blocks",)) and TRANSFORMER in classes


def _has_features(value: object) -> bool:
    return hasattr(value, "features")


def _read(module: nn.Module, arguments: Mapping[str, Any]) -> ForwardInputs:
    views = argument(module, arguments, "model_input", "a MultiViewTransformerInput", _has_features)
    per_view, trailing = views.additional_input_tokens_per_view, views.additional_input_tokens
    last = 0 if per_view is None else per_view[0].shape[-1]
    rows, columns = views.features[0].shape[-2:]
    return ForwardInputs(
        images=views.features,
        frames=len(views.features),
        tokens_per_frame=rows * columns + last,
        special_tokens=(0, last),
        trailing_tokens=0 if trailing is None else trailing.shape[-1],
        patch_grid=(rows, columns),
    )


def _growth(attention: Any, tokens: int) -> float:
    """Return the factor that options put on queries, rounded as there: log N, or sqrt(g log N / log N0), or both."""
    factor, logarithm = torch.ones(()), torch.log(torch.tensor(tokens))
    if getattr(attention, "use_scalable_softmax", False):
        factor = factor * logarithm
    if getattr(attention, "use_entropy_scaling", False):
        base = torch.log(torch.tensor(attention.base_token_count_for_entropy_scaling))
        factor = factor.double() * torch.sqrt(attention.entropy_scaling_growth_factor * logarithm / base).double()
    return float(factor)


MAPANYTHING = ModelRecord(
    name="MapAnything",
    structure=f"UniCeption's class {TRANSFORMER}, with self_attention_blocks",
    matches=_matches,
    global_attention=partial(block_attention, path="self_attention_blocks", step=2),
    read=_read,
    known=("self_attention_blocks",),
    growth=_growth,
)
