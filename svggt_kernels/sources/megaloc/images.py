"""Graphs from a model's images, described once by MegaLoc and remembered by what they show."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...graph import CovisibilityGraph
from ..similarity import MegaLocSimilarity
from .network import IMAGENET_DEVIATION, IMAGENET_MEAN, MegaLoc

__all__ = ["ImageGraphs"]

# Image sets whose graphs are kept.
GRAPHS_KEPT = 16
# Sizes of images, by device, whose factors are kept.
FACTORS_KEPT = 4
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Integers of at most 32 bits that an element is read as, by the bytes of the element."""


class ImageGraphs:
    """Turns images into graphs; images of the same content give the same graph object again, without a network.

    MegaLoc is loaded at once, so that weights which cannot be had are found out before a model runs. A copy of this
    object loads its own when it is first used.

    Args:
        source: How.
        normalised: Whether the images come with ImageNet's mean and deviation taken out.

    Raises:
        FileNotFoundError: If the weights cannot be had.
        ValueError: If they are not MegaLoc's.
    """

    def __init__(self, source: MegaLocSimilarity, *, normalised: bool) -> None:
        self.source = source
        self.normalised = normalised
        self._megaloc: MegaLoc | None = self._load()
        self._graphs: OrderedDict[tuple[bytes, int | None], CovisibilityGraph] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_megaloc": None, "_graphs": OrderedDict()}

    def forget(self) -> None:
        """Drop the graphs kept."""
        self._graphs.clear()

    def graph(
        self,
        images: Tensor,  # [S, 3, H, W]
        reference_frame: int | None,
        step: Callable[[str], AbstractContextManager[None]],
    ) -> CovisibilityGraph:
        """Return the graph of one sample's images.

        Args:
            images: As the model takes them.
            reference_frame: The model's reference frame.
            step: Times what is done inside its context under a name.
        """
        with step("look-up"):
            key = (fingerprint(images), reference_frame)
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        with step("descriptors"):
            descriptors = self._describe(images)
        with step("graph"):
            graph = self.source.from_descriptors(descriptors, reference_frame)
        self._graphs[key] = graph
        if len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        return graph

    def _describe(self, images: Tensor) -> Tensor:
        if self._megaloc is None:
            self._megaloc = self._load()
        if self._megaloc is not self.source.weights:
            default = torch.bfloat16 if images.device.type == "cuda" else torch.float32
            self._megaloc.to(images.device, self.source.dtype or default)
        if self.normalised:
            precision = torch.promote_types(images.dtype, torch.float32)
            mean, deviation = (
                torch.tensor(values, dtype=precision, device=images.device).view(3, 1, 1)
                for values in (IMAGENET_MEAN, IMAGENET_DEVIATION)
            )
            images = images * deviation + mean
        return self._megaloc.describe(images, size=self.source.size, batch_size=self.source.batch_size)

    def _load(self) -> MegaLoc:
        weights = self.source.weights
        return weights if isinstance(weights, MegaLoc) else MegaLoc.from_pretrained(weights)


def fingerprint(
    images: Tensor,  # [S, 3, H, W]
) -> bytes:
    """Return 128 bits per image, computed where the images are, and their dtype and shape.

    Images that differ in one bit differ in it. Each half is the sum of the image's words times fixed random 64-bit
    numbers, modulo 2^64: two different images agree in both with a probability of at most 2^-64 (the words are at most
    32 bits wide; multilinear hashing, Dietzfelbinger et al. 1997). That is no protection against someone who makes
    images agree on purpose.
    """
    if images.device.type == "mps":  # its 64-bit integers have gaps
        images = images.cpu()
    words = images.detach().contiguous().flatten(1).view(WORDS[images.element_size()])
    factors = _factors(words.shape[1], images.device)
    sums = [torch.stack([(word * factor).sum() for factor in factors]) for word in words]
    return torch.stack(sums).cpu().numpy().tobytes() + repr((images.dtype, tuple(images.shape))).encode()


@lru_cache(maxsize=FACTORS_KEPT)
def _factors(words: int, device: torch.device) -> Tensor:
    """Return the same random numbers in every process, `[2, words]` int64."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (2, words), generator=generator, device="cpu").to(device)
