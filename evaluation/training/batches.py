"""The batch of each step, a function of seed, step and share: what is resumed needs no random state."""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svggt_kernels.demo.scenes import Draws

from ..layouts import Known
from .curriculum import draw_batch, vary_exposure
from .truth import Truth

STEPS_OF_A_SEED = 2**32


@dataclass(frozen=True)
class Batch:
    """What one step learns from.

    Attributes:
        images: `[B, S, 3, H, W]` in [0, 1].
        truth: Of the same scenes.
        draws: Random numbers for the loss.
        known: What a layout may know of the scenes.
    """

    images: Tensor
    truth: Truth
    draws: Draws
    known: Known


class Batches:
    """Draws batches. The next one can be drawn by a thread, while the device and the host learn from the one before.

    Args:
        seed: Of all batches.
        frames: Frames of a batch.
        lengths: Frames of a scene at least and at most.
        size: Height and width in pixels.
        patch_size: Of the model.
        device: Where the batches are.
    """

    def __init__(
        self,
        seed: int,
        frames: int,
        lengths: tuple[int, int],
        size: tuple[int, int],
        patch_size: int,
        device: torch.device,
    ) -> None:
        self.seed, self.frames, self.lengths = seed, frames, lengths
        self.size, self.patch_size, self.device = size, patch_size, device
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[Batch]] | None = None

    def draw(self, step: int, share: float) -> Batch:
        """Return the batch of a step, at a share of the curriculum."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1].result()
        return self._draw(step, share)

    def draw_ahead(self, step: int, share: float) -> None:
        """Begin to draw the batch of a step, for `draw`."""
        self._ahead = step, self._thread.submit(self._draw, step, share)

    def _draw(self, step: int, share: float) -> Batch:
        host = random.Random(f"{self.seed} {step}")
        seed = self.seed * STEPS_OF_A_SEED + step
        draws = Draws(seed, self.device)
        scenes = draw_batch(share, self.frames, self.lengths, self.size, host, draws)
        images = vary_exposure(scenes.images, draws)
        return Batch(images, Truth.of(scenes, self.patch_size), draws, Known(scenes, seed))
