"""Graphs from a model's images, described by MegaLoc."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..base import Scene
from ..cache import LRUCache
from ..similarity import ImageSimilarity
from .network import SIZE, MegaLoc
from .weights import PUBLISHED


@dataclass(frozen=True)
class MegaLocSimilarity(ImageSimilarity):
    """Finds covisibility in the images, by MegaLoc's descriptors: the default of `patch`.

    The other attributes are those of `Similarity`.

    Attributes:
        weights: Where MegaLoc's weights are, as `MegaLoc.from_pretrained` takes it, or a MegaLoc.
        size: Pixels on each side that MegaLoc sees.
        batch_size: Images that it describes at a time.
        dtype: Its precision; None for bfloat16 on CUDA and float32 elsewhere. Ignored if `weights` is a MegaLoc.
    """

    weights: str | Path | MegaLoc = PUBLISHED
    size: int = SIZE
    batch_size: int = 32
    dtype: torch.dtype | None = None
    _loaded: LRUCache[MegaLoc] = field(default_factory=LRUCache, init=False, repr=False, compare=False)

    by: ClassVar[str] = "MegaLoc"

    def opened(self) -> MegaLocSimilarity:
        """Return the same source with a cache of its own and the weights loaded.

        Raises:
            FileNotFoundError: If the weights cannot be had.
            ValueError: If they are not MegaLoc's.
            ImportError: If a package is missing that fetches or reads them.
        """
        source = replace(self)
        source._network()
        return source

    def descriptors(self, scene: Scene) -> Tensor:
        """Return MegaLoc's descriptor of each image, `[S, D]` float32."""
        images, network = scene.rgb, self._network()
        if network is not self.weights:
            default = torch.bfloat16 if images.device.type == "cuda" else torch.float32
            network.to(images.device, self.dtype or default)
        return network.describe(images, size=self.size, batch_size=self.batch_size, progress=scene.progress)

    def _network(self) -> MegaLoc:
        if isinstance(self.weights, MegaLoc):
            return self.weights
        weights = self.weights
        return self._loaded.get("network", lambda: MegaLoc.from_pretrained(weights))
