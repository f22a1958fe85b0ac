"""Frames that may share nothing with the core of their scene: a rule without a threshold of our own.

A frame is told to be apart if the model is less sure of it than of every frame of the core (the median over its pixels
of the model's confidence), or if it is less like the core than every frame of the core is (the similarity of its
descriptor to that of the most similar frame of the core). Both only compare with what holds among the frames of the
core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sources.base import Scene
from ..sources.similarity import Similarity


@dataclass(frozen=True)
class Yardstick:
    """What holds among the frames of a core.

    Attributes:
        confidence: The least of their confidences; None if the model states none.
        descriptors: Theirs, `[K, C]`, of length 1; None if none were made, or there is one frame.
        likeness: The least of the similarities of each to the most similar of the others.
    """

    confidence: float | None
    descriptors: Tensor | None
    likeness: float

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], descriptors: Tensor | None) -> Yardstick:
        """Return the yardstick of a core.

        Args:
            outputs: The model's outputs of its frames.
            descriptors: Their descriptors `[K, C]`, or None.
        """
        confidence = confidences(outputs)
        least = None if confidence is None else float(confidence.min())
        if descriptors is None or len(descriptors) < 2:
            return cls(least, None, -1.0)
        unit = F.normalize(descriptors.float(), dim=1)
        others = (unit @ unit.T).fill_diagonal_(-1)
        return cls(least, unit, float(others.amax(1).min()))

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
            likeness = F.normalize(descriptors.float(), dim=1) @ self.descriptors.T
            apart |= (likeness.amax(1) < self.likeness).to(apart.device)
        return apart


def confidences(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Return the median over pixels of the first output whose name says that it is a confidence, `[n]`, or None."""
    for name, tensor in outputs.items():
        if "conf" in name and tensor.dim() > 1:
            return tensor.flatten(1).float().median(1).values
    return None


def described(similarity: Similarity | None, frames: Tensor) -> Tensor | None:
    """Return the descriptors of frames `[n, 3, H, W]` by a similarity of images, in host memory; None by another."""
    if similarity is None or similarity.needs != "images":
        return None
    return similarity.descriptors(Scene(len(frames), images=frames)).to("cpu")
