"""Attention of every sample of a batch to itself: what frame blocks and image encoders do, a frame a sample."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..attention import block_sparse_attention
from ..graph import CovisibilityGraph
from ..layout import BlockLayout

FASTER = "hopper"
"""The backend that is faster than PyTorch's attention even where every token sees every other."""

PYTORCH = "pytorch"

FEWEST_TOKENS = 2**15
"""Of all samples together. With fewer the host takes longer to launch the operator than the device to run PyTorch's."""


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return PyTorch's attention of each sample's queries to its own keys, all `[B, H, N, D]`."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class AttentionWithinFrames:
    """Full attention by the operator where its Hopper backend runs, elsewhere by PyTorch's.

    The rule needs no trial: the Hopper backend runs if it can, there are `FEWEST_TOKENS`, and the patch was given no
    other backend by name.

    Args:
        backend: The backend that the patch was given, or None.

    Attributes:
        ran: What has run since it was last cleared: "hopper", "pytorch".
    """

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self.ran: set[str] = set()
        self._layouts: dict[tuple[int, torch.device], BlockLayout] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layouts": {}}

    def __call__(
        self,
        q: Tensor,  # [B, H, N, D]
        k: Tensor,  # [B, H, N, D]
        v: Tensor,  # [B, H, N, D]
        scale: float,
    ) -> Tensor:
        """Return the attention of each sample's queries to its own keys, `[B, H, N, D]`."""
        runner = self.runner(q)
        self.ran.add(runner)
        if runner == PYTORCH:
            return by_pytorch(q, k, v, scale)
        out = block_sparse_attention(q, k, v, self._layout(q.shape[2], q.device), scale=scale, backend=runner)
        assert isinstance(out, Tensor)
        return out

    def runner(self, q: Tensor) -> str:
        """Return what runs queries `[B, H, N, D]`: "hopper" or "pytorch"."""
        if self.backend not in (None, FASTER) or q.shape[0] * q.shape[2] < FEWEST_TOKENS:
            return PYTORCH
        if q.is_cuda and torch.cuda.is_current_stream_capturing() and (q.shape[2], q.device) not in self._layouts:
            return PYTORCH  # a layout and its tables cannot be made while a CUDA graph is captured
        reason = backends.load(FASTER).unsupported(q.device, q.dtype, q.shape[-1])
        return FASTER if reason is None else PYTORCH

    def _layout(self, tokens: int, device: torch.device) -> BlockLayout:
        """Return the layout of one frame that sees itself; made once."""
        if (tokens, device) not in self._layouts:
            graph = CovisibilityGraph.all_visible(1).to(device)
            self._layouts[tokens, device] = BlockLayout.from_graph(graph, tokens)
        return self._layouts[tokens, device]
