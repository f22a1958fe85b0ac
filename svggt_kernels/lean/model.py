"""Which parts of one patched model run lean, and the proof that they compute what upstream does."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import blocks, outputs
from .within_frames import AttentionWithinFrames

Precision = Literal["upstream", "bf16"]
Outputs = Literal["read", "all"]
PROOF_TOKENS = 2048


class Lean:
    """The lean parts of a model.

    Args:
        model: The model that was given to `patch`, with its heads.
        root: The module in it that runs the blocks.
        attention: The attention modules that are patched.
        precision: Dtype of the residual stream and of the layer outputs kept: upstream's, or bfloat16.
        keep: Keep the layer outputs that heads read, or all.
        backend: The backend that the patch was given, or None.

    Attributes:
        blocks: The blocks that can run lean, by name in `root`.
        layers: The layers whose outputs are kept; None for all.
        heads: With bfloat16 outputs the heads that read them and must be given float32.
        not_lean: Why blocks with an attention cannot, by name of their class.
        runs: Blocks run lean in the last forward.
        within_frames: The attention of the blocks whose attention is not patched.

    Raises:
        ValueError: If residuals should be bfloat16 and no block can run lean.
    """

    def __init__(
        self,
        model: nn.Module,
        root: nn.Module,
        attention: Collection[nn.Module],
        precision: Precision,
        keep: Outputs,
        backend: str | None,
    ) -> None:
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.blocks: dict[str, nn.Module] = {}
        self.not_lean: dict[str, str] = {}
        for name, module in root.named_modules():
            if isinstance(getattr(module, "attn", None), nn.Module):
                reason = blocks.obstacle(module)
                if reason is None:
                    self.blocks[name] = module
                else:
                    self.not_lean[type(module).__name__] = reason
        staged = outputs.are_upstreams(type(root))
        if self.dtype is not None and not (self.blocks and staged):
            reasons = [f"{name}: {reason}" for name, reason in self.not_lean.items()]
            reasons += [] if staged else [f"{type(root).__name__} lacks {' and '.join(outputs.STAGES)}"]
            raise ValueError(
                "precision=\"bf16\" needs blocks of VGGT's shape and an aggregator that runs them as VGGT's does, and "
                f'{type(root).__name__} has none ({"; ".join(reasons)}); leave precision="upstream"'
            )
        depth = len(getattr(root, "global_blocks", ()))
        self.layers = outputs.layers_read(model, depth) if staged and keep == "read" else None
        self.heads = {name: head for name, head in model.named_modules() if outputs.reads(head)} if self.dtype else {}
        self.runs = 0
        self.within_frames = AttentionWithinFrames(backend)
        self._unpatched = [block for block in self.blocks.values() if block.attn not in attention]
        self._proven: dict[Hashable, bool] = {}

    def begin(self) -> None:
        """Count anew what runs in a forward."""
        self.runs = 0
        self.within_frames.ran.clear()

    def run(self, block: Any, x: Tensor, pos: Tensor | None, attend: blocks.Attend | None) -> Tensor | None:
        """Run a block lean, or return None if it must run as it is.

        Args:
            block: One of `blocks`.
            x: Its tokens `[B, N, C]`.
            pos: Their positions, or None.
            attend: Its attention if that is patched, else None.
        """
        if not blocks.can_run_now(block) or not self._is_proven(block, x, pos):
            return None
        self.runs += 1
        return blocks.run(block, x, pos, attend or self.within_frames, self.dtype)

    def _is_proven(self, block: Any, x: Tensor, pos: Tensor | None) -> bool:
        """Whether a block like this, run lean on a few of its tokens, once, gave what its own forward gives.

        A block whose attention is patched has no forward of its own to compare with; another stands in for it.
        """
        key = blocks.anatomy(block)
        if key in self._proven:
            return self._proven[key]
        alike = [other for other in self._unpatched if blocks.anatomy(other) == key]
        if not alike:
            return self._conclude(block, "no block like it attends within frames, where it could be compared")
        other = next((other for other in alike if blocks.can_run_now(other)), None)
        if other is None:
            return False  # in this call; it proves nothing
        x, pos = x[:1, :PROOF_TOKENS], None if pos is None else pos[:1, :PROOF_TOKENS]
        forward = blocks.own_forward(other)
        expected = forward(x) if pos is None else forward(x, pos)
        actual = blocks.run(other, x, pos, self.within_frames, None)
        # Rounding of what a block adds, a few times over; another formula is wrong by as much as it adds.
        allowed = min(50 * torch.finfo(blocks.compute_dtype(block)).eps, 0.1)
        error, added = (actual - expected).float().norm(), (expected - x).float().norm()
        if not error.isfinite():
            return False  # by the tokens of this call; they prove nothing
        same = actual.dtype == expected.dtype and bool(error <= allowed * added)
        return self._conclude(block, None if same else "its forward computes something else than the fused block")

    def _conclude(self, block: nn.Module, reason: str | None) -> bool:
        """Keep why blocks like this one cannot run lean, or that they can, and return whether they can."""
        self._proven[blocks.anatomy(block)] = reason is None
        if reason is not None:
            self.not_lean[type(block).__name__] = reason
        return reason is None
