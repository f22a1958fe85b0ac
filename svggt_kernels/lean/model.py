"""Which parts of one patched model run lean, and the proof that they compute what upstream does."""

from __future__ import annotations

from collections.abc import Callable
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
        self, model: nn.Module, root: nn.Module, precision: Precision, keep: Outputs, backend: str | None
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
        self._proven: dict[tuple[type, type, bool], bool] = {}

    def begin(self) -> None:
        """Count anew what runs in a forward."""
        self.runs = 0
        self.within_frames.ran.clear()

    def run(
        self,
        block: Any,
        x: Tensor,
        pos: Tensor | None,
        attend: blocks.Attend | None,
        original: Callable[..., Any],
    ) -> Tensor | None:
        """Run a block lean, or return None if it must run as it is.

        Args:
            block: One of `blocks`.
            x: Its tokens `[B, N, C]`.
            pos: Their positions, or None.
            attend: Its attention if that is patched, else None.
            original: The block's own forward.
        """
        if not isinstance(x, Tensor) or not blocks.can_run_now(block):
            return None
        if not self._is_proven(block, x, pos, attend, original):
            return None
        self.runs += 1
        return blocks.run(block, x, pos, attend or self.within_frames, self.dtype)

    def _is_proven(
        self, block: Any, x: Tensor, pos: Tensor | None, attend: blocks.Attend | None, original: Callable[..., Any]
    ) -> bool:
        """Whether a block of this class, run lean on a few tokens, once, gave what its own forward gives."""
        key = type(block), type(block.attn), block.attn.rope is None
        if key in self._proven or attend is not None:
            return self._proven.get(key, False)
        x, pos = x[:1, :PROOF_TOKENS], None if pos is None else pos[:1, :PROOF_TOKENS]
        expected = original(x) if pos is None else original(x, pos=pos)
        actual = blocks.run(block, x, pos, self.within_frames, None)
        # Rounding of what a block adds, a few times over; another formula is wrong by as much as it adds.
        allowed = min(50 * torch.finfo(blocks.compute_dtype(block)).eps, 0.1)
        error, added = (actual - expected).float().norm(), (expected - x).float().norm()
        if not error.isfinite():
            return False  # by the tokens of this call; they prove nothing
        self._proven[key] = bool(error <= allowed * added)
        if not self._proven[key]:
            self.not_lean[type(block).__name__] = "its forward computes something else than the fused block"
        return self._proven[key]
