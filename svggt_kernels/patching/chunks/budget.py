"""A memory budget for the runs of a scene: what the plan of one forward does not count, and how many frames fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...coarse import MOST_PARTS
from ...inference import memory
from ...inference.fused_forward import FusedForward
from .attention import CoreAttention, Run

MOST_FRAMES = 256
"""The most frames of a chunk; more at once are no faster."""

CHUNK_PARTS = 2
"""Parts of the keys of a chunk where frames are seen at a stride; special tokens are kept with those in full."""


class Budget:
    """Keeps the runs of a session to a budget, as `inference.memory` keeps one forward.

    Beside a forward there are the kept keys and values of the core, in a chunk those of one layer with the chunk's
    behind them, and what comes and goes meanwhile: the next images and the last outputs.

    Args:
        own: The fused forward that keeps to a plan.
        attention: Holds what is kept.
        gib: GiB, or "auto": what is free on the device when a run begins, less 1 GiB.

    Attributes:
        held: Bytes on the device that the caller holds beside: images and results of all frames.
    """

    def __init__(self, own: FusedForward, attention: CoreAttention, gib: memory.MemoryBudget) -> None:
        self.own, self.attention, self.gib = own, attention, gib
        self.held = 0

    def begin(self, run: Run) -> None:
        """Leave to the forward that begins what is not needed beside it.

        Raises:
            ValueError: If that is too little.
        """
        images, tokens = run.inputs.images, run.inputs.tokens_per_frame
        if tokens is None or images.device.type not in memory.DEVICES:
            return  # the fused forward says what is wrong
        is_core, closed = run.sees_itself is None, self.attention.closed
        seen, self.own.key_parts = tokens * run.frames, (1, 0)
        if closed is not None and closed.coarse and run.inputs.patch_grid is not None:
            seen = closed.tokens_seen(tokens, run.inputs.patch_grid)
            self.own.key_parts = (MOST_PARTS, seen - closed.full * tokens) if is_core else (CHUNK_PARTS, 0)
        sizes = self.own.sizes(images.shape, images.itemsize, tokens)
        if run.describes is not None:
            beside = self.held
        else:
            beside = self._beside_core(sizes, seen) if is_core else self._beside_chunk(sizes)
        allowed = self._allowed(images.device, sizes.present)
        least = memory.least_bytes(sizes) + beside
        if least > allowed:
            raise ValueError(
                f"memory_budget must be at least {memory.rounded_up(least):.1f} GiB for {run.frames} frames and the "
                f"keys of the core, got {allowed / memory.GIB:.2f} GiB; give a smaller core or chunk, or smaller images"
            )
        self.own.budget = (allowed - beside) / memory.GIB

    def frames_of_chunk(self, shape: Sequence[int], itemsize: int, tokens: int, device: torch.device) -> int:
        """Return how many further frames run together, the reference frame beside them, when the core has run.

        Args:
            shape: Of the images of the core, `[..., 3, H, W]`.
            itemsize: Bytes of one of their values.
            tokens: Tokens of a frame.
            device: Where they run.
        """
        closed = self.attention.closed
        self.own.key_parts = (CHUNK_PARTS if closed is not None and closed.coarse else 1), 0
        of_one = self.own.sizes((1, 1, *shape[-3:]), itemsize, tokens)  # counts all weights, which takes a while

        def sizes(frames: int) -> memory.Sizes:
            alone = replace(of_one, frames=frames + 1)
            images = frames * math.prod(shape[-3:]) * itemsize
            return replace(alone, present=alone.present + images + self._beside_chunk(alone))

        return memory.most_frames(sizes, self._allowed(device, of_one.present), MOST_FRAMES)

    def _allowed(self, device: torch.device, present: int) -> int:
        assert self.gib is not None
        allowed = memory.allowed(self.gib, device, present)
        return allowed + self.attention.kept_bytes + self.held if self.gib == "auto" else allowed

    def _beside_core(self, sizes: memory.Sizes, seen: int) -> int:
        """Return the bytes beside a run of the closed frames, of which so many tokens will be seen."""
        return self.held + sizes.depth * 2 * seen * sizes.channels * sizes.product

    def _beside_chunk(self, sizes: memory.Sizes) -> int:
        """Return the bytes beside a run of a chunk."""
        kept = self.attention.kept_bytes
        own = 2 * sizes.frames * sizes.tokens * sizes.channels * sizes.product
        passing = sizes.frames * sizes.pixels * (3 * sizes.wide + memory.OUTPUTS_PER_PIXEL * sizes.heads)
        return self.held + kept + kept // sizes.depth + own + passing
