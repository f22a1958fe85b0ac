"""Graphs from a model's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .base import Scene
from .similarity import Similarity


@dataclass(frozen=True)
class TokenSimilarity(Similarity):
    """Finds covisibility in the tokens that enter a model's first global attention.

    The descriptor of a frame is the mean of its patch tokens minus the mean over all frames, in float32 (float64 for
    float64 tokens). What all frames share would otherwise make every pair look alike. No other network runs, and any
    model has such tokens. The attributes are those of `Similarity`.
    """

    by: ClassVar[str] = "tokens of the model"
    needs: ClassVar[Literal["tokens"]] = "tokens"

    def descriptors(self, scene: Scene) -> Tensor:
        """Return the centred mean token of each frame, `[S, C]`.

        Raises:
            ValueError: If tokens are NaN or infinite.
        """
        tokens = scene.tokens.detach()
        pooled = tokens.mean(dim=1, dtype=torch.promote_types(tokens.dtype, torch.float32))
        broken = [frame for frame, sound in enumerate(pooled.isfinite().all(dim=1).tolist()) if not sound]
        if broken:
            raise ValueError(
                f"the tokens of every frame must be finite, but those of frames {broken[:8]} hold NaN or infinity; "
                "check these images, or the model's weights and dtype"
            )
        mean = pooled.mean(dim=0)
        centred = pooled - mean
        # A frame that equals the mean frame (one frame alone, one image repeated) would have no direction.
        return torch.where((centred == 0).all(dim=1, keepdim=True), mean, centred)
