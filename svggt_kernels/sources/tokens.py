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
FRAMES_AT_ONCE = 16
GOLDEN_RATIO = (5**0.5 - 1) / 2


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
    frames is the mean over patches of one of the highest cosine with a patch of the other, then the mean of both ways,
    as late interaction ranks documents (Khattab and Zaharia 2020). All patches can be found; of frames with more than
    `MOST_PATCHES` as many ask, and tokens are read in bfloat16. No other network runs, and any model has such tokens.
    """

    by: ClassVar[str] = "patches of the model"
    needs: ClassVar[Literal["tokens"]] = "tokens"

    @staticmethod
    def read(
        tokens: Tensor,  # [S, P, C]
    ) -> Tensor:
        """Return what is read of some frames' tokens, `[S, P, C]`."""
        return tokens if tokens.shape[1] <= MOST_PATCHES else tokens.to(torch.bfloat16)

    def compared(self, scene: Scene) -> ScoreMatrix:
        """Return the scores of all pairs of frames, on the device of the tokens; on the CPU for those on MPS.

        Raises:
            ValueError: If tokens are NaN or infinite.
        """
        tokens = self.read(finite_tokens(scene))
        frames, count, _ = tokens.shape
        mean = tokens.mean((0, 1), dtype=torch.float32)
        asking = _unit(tokens[:, _spread(count).to(tokens.device)], mean)
        highest = torch.empty(frames, frames, device=tokens.device)
        for columns in torch.arange(frames).split(FRAMES_AT_ONCE):
            found = _unit(tokens[columns], mean).flatten(0, 1).T
            for rows in torch.arange(frames).split(FRAMES_AT_ONCE):
                all_ask = asking.shape[1] == count
                if all_ask and rows[0] > columns[0]:
                    continue
                cosines = (asking[rows].flatten(0, 1) @ found).view(len(rows), -1, len(columns), count)
                highest[rows[:, None], columns] = cosines.amax(3).float().mean(1)
                if all_ask:
                    highest[columns[:, None], rows] = cosines.amax(1).float().mean(2).T
        scores = ((highest + highest.T) / 2).clamp_(-1, 1).fill_diagonal_(1)
        return ScoreMatrix(scores.cpu() if scores.device.type == "mps" else scores)


def _unit(tokens: Tensor, mean: Tensor) -> Tensor:
    return F.normalize(tokens.float() - mean, dim=-1)


def _spread(count: int) -> Tensor:
    """Return at most `MOST_PATCHES` of so many patches, evenly spread at no distance that columns of patches repeat."""
    if count <= MOST_PATCHES:
        return torch.arange(count)
    return (torch.arange(MOST_PATCHES, dtype=torch.float64) * GOLDEN_RATIO % 1 * count).long().unique()


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
