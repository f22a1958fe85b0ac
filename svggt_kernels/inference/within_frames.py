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
from ..streams import is_capturing

PYTORCH = "pytorch"


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return PyTorch's attention of each sample's queries to its own keys, all `[B, H, N, D]`."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class AttentionWithinFrames:
    """Full attention by the operator where a backend is faster there than PyTorch's attention, elsewhere by PyTorch's.

    The rule needs no trial, see `backends.faster_than_dense`; a patch that was given a backend by name uses no other.

    Args:
        backend: The backend that the patch was given, or None.

    Attributes:
        ran: What has run since it was last cleared: names of backends, "pytorch".
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
        of_one_frame = q.shape[2], q.device
        if of_one_frame not in self._layouts:
            graph = CovisibilityGraph.all_visible(1).to(q.device)
            self._layouts[of_one_frame] = BlockLayout.from_graph(graph, q.shape[2])
        out = block_sparse_attention(q, k, v, self._layouts[of_one_frame], scale=scale, backend=runner)
        assert isinstance(out, Tensor)
        return out

    def runner(self, q: Tensor) -> str:
        """Return what runs queries `[B, H, N, D]`: a backend or "pytorch"."""
        samples, _, tokens, head_size = q.shape
        if (tokens, q.device) not in self._layouts and is_capturing(q.device):
            return PYTORCH  # a layout and its tables cannot be made while a CUDA graph is captured
        return backends.faster_than_dense(q.device, q.dtype, head_size, samples * tokens, self.backend) or PYTORCH
