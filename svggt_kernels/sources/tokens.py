"""Frames compared by a model's own tokens: by the mean of a frame, or patch by patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph.pair_scores import ScoreMatrix
from .base import Scene
from .similarity import Similarity

MOST_PATCHES = 128


@dataclass(frozen=True)
class TokenSimilarity(Similarity):
    """Finds covisibility in the tokens that enter a model's first global attention.

    The descriptor of a frame is the mean of its patch tokens minus the mean over all frames, in float32 (float64 for
    float64 tokens). What all frames share would otherwise make every pair look alike. No other network runs, and any
    model has such tokens. The attributes are those of `Similarity`.
    """

    by: ClassVar[str] = "tokens of the model"
    needs: ClassVar[Literal["tokens"]] = "tokens"

    @staticmethod
    def read(
        tokens: Tensor,  # [S, P, C]
    ) -> Tensor:
        """Return what is read of some frames' tokens: the mean of each frame, `[S, 1, C]`."""
        return tokens.mean(dim=1, keepdim=True, dtype=torch.promote_types(tokens.dtype, torch.float32))

    def descriptors(self, scene: Scene) -> Tensor:
        """Return the centred mean token of each frame, `[S, C]`.

        Raises:
            ValueError: If tokens are NaN or infinite.
        """
        pooled = self.read(finite_tokens(scene))[:, 0]
        mean = pooled.mean(dim=0)
        centred = pooled - mean
        # A frame that equals the mean frame (one frame alone, one image repeated) would have no direction.
        return torch.where((centred == 0).all(dim=1, keepdim=True), mean, centred)


@dataclass(frozen=True)
class PatchSimilarity:
    """Tells how alike frames are by whether their patches find one another; for `Core`.

    It reads the patch tokens that enter a model's first global attention, the mean of all taken out. The score of two
    frames is the mean over the patches of one of the highest cosine with a patch of the other, then the mean of both
    ways, as late interaction ranks documents (Khattab and Zaharia 2020). Of a frame with more than `MOST_PATCHES`
    patches every n-th is read. No other network runs, and any model has such tokens.
    """

    by: ClassVar[str] = "patches of the model"
    needs: ClassVar[Literal["tokens"]] = "tokens"

    @staticmethod
    def read(
        tokens: Tensor,  # [S, P, C]
    ) -> Tensor:
        """Return what is read of some frames' tokens: every n-th patch, `[S, P', C]`."""
        return tokens[:, :: -(-tokens.shape[1] // MOST_PATCHES)]

    def compared(self, scene: Scene) -> ScoreMatrix:
        """Return the scores of all pairs of frames, on the device of the tokens.

        Raises:
            ValueError: If tokens are NaN or infinite.
        """
        patches = self.read(finite_tokens(scene)).float()
        patches = F.normalize(patches - patches.mean((0, 1)), dim=-1)
        scores = torch.ones(len(patches), len(patches), device=patches.device)
        for frame, own in enumerate(patches):
            cosines = torch.einsum("pc,snc->psn", own, patches[frame:])
            ways = cosines.amax(2).float().mean(0) + cosines.amax(0).float().mean(1)
            scores[frame, frame:] = scores[frame:, frame] = (ways / 2).clamp(-1, 1)
        return ScoreMatrix(scores.fill_diagonal_(1))


def finite_tokens(scene: Scene) -> Tensor:
    """Return the patch tokens of a scene, `[S, P, C]`, without their history.

    Raises:
        ValueError: If those of a frame hold NaN or infinity.
    """
    tokens = scene.tokens.detach()
    sums = tokens.sum(dim=(1, 2), dtype=torch.promote_types(tokens.dtype, torch.float32))
    broken = [frame for frame, sound in enumerate(sums.isfinite().tolist()) if not sound]
    if broken:
        raise ValueError(
            f"the tokens of every frame must be finite, but those of frames {broken[:8]} hold NaN or infinity; "
            "check these images, or the model's weights and dtype"
        )
    return tokens
