"""Frames that may share nothing with the core of their scene: a rule without a threshold of our own.

A frame is told to be apart if the model is less sure of it than of every frame of the core, or if it is less like the
core than every image is among which the core was chosen. How sure: the mean over pixels of log(1 + c), of the model's
confidence c (with its sign, where it may be negative). How like: the similarity of its descriptor to that of the most
similar frame of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sources import PatchSimilarity
from ..sources.base import Scene
from ..sources.similarity import Similarity

ROUNDING = 2**-10
"""What two cosines of the same descriptors may differ by where they are computed in TF32, among others or not."""


@dataclass(frozen=True)
class Yardstick:
    """What holds among the frames of a core.

    Attributes:
        confidence: The least of their confidences; None if the model states none.
        descriptors: Theirs, `[K, C]`; None if none were made.
        likeness: The least similarity to the core of the images among which it was chosen.
    """

    confidence: float | None
    descriptors: Tensor | None
    likeness: float

    @classmethod
    def of(
        cls, outputs: Mapping[str, Tensor], descriptors: Tensor | None = None, likeness: float | None = None
    ) -> Yardstick:
        """Return the yardstick of a core.

        Args:
            outputs: The model's outputs of its frames.
            descriptors: Their descriptors `[K, C]`, or None.
            likeness: Of the images among which it was chosen; None for the frames of the core to one another.
        """
        confidence = confidences(outputs)
        least = None if confidence is None else float(confidence.min())
        if descriptors is None:
            return cls(least, None, -1.0)
        if likeness is None:
            unit = F.normalize(descriptors.float(), dim=1)
            likeness = float((unit @ unit.T).fill_diagonal_(-1).amax(1).min())
        return cls(least, descriptors, likeness)

    def apart(self, outputs: Mapping[str, Tensor], descriptors: Tensor | None) -> Tensor:
        """Return which frames are apart, `[n]` bool.

        Args:
            outputs: The model's outputs of the frames.
            descriptors: Their descriptors `[n, C]`; needed if the yardstick has some.
        """
        first = next(iter(outputs.values()))
        apart = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        confidence = confidences(outputs)
        if confidence is not None and self.confidence is not None:
            apart |= confidence < self.confidence
        if self.descriptors is not None and descriptors is not None:
            likeness = likeness_of(descriptors, self.descriptors.to(descriptors.device))
            apart |= likeness < self.likeness - ROUNDING
        return apart


def confidences(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return how sure a model is of frames, `[n]`, by the first output whose name says so; None if it does not say."""
    for name, tensor in outputs.items():
        if "conf" in name and tensor.dim() > 1:
            values = tensor.flatten(1).float()
            return (values.sign() * values.abs().log1p()).mean(1)
    return None


def more_than_by_chance(apart: int, frames: int, core: int) -> bool:
    """Whether more than twice as many frames are told to be apart as by chance.

    Of K + 1 frames alike one is the least sure, so one of K + 1 further frames is told to be apart by chance.

    Args:
        apart: How many are.
        frames: Of how many.
        core: Frames K of the core.
    """
    return apart > 2 * frames / (core + 1)


def likeness_of(
    descriptors: Tensor,  # [n, C]
    core: Tensor,  # [K, C]
) -> Tensor:
    """Return the cosine of each descriptor with the most similar one of a core, `[n]`."""
    units = (F.normalize(each.float(), dim=1) for each in (descriptors, core))
    return torch.matmul(next(units), next(units).T).amax(1)


def described(similarity: Similarity | PatchSimilarity | None, frames: Tensor) -> Tensor | None:
    """Return the descriptors of frames `[n, 3, H, W]` by a similarity of images; None by another."""
    if not isinstance(similarity, Similarity) or similarity.needs != "images":
        return None
    return similarity.descriptors(Scene(len(frames), images=frames))
