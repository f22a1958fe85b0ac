"""The model with what only its training needs: further heads on the tokens, and the queries and keys that shall match.

The loss of the model's own heads reaches the middle of the model late and gives one vector a frame. Heads on the tokens
of the middle and of the last layer give each patch a gradient of its own from the first step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svggt_kernels.demo.model import RoomsModel
from svggt_kernels.demo.model.heads import INITIAL_CAMERA

MATCHED_LAYERS = (1, 2, 4)
"""Global blocks whose head 0 is taught to find the same point in other frames."""

Matched = tuple[Tensor, Tensor]
"""Queries and keys of the patches `[B, S, N, D]`."""


@dataclass(frozen=True)
class Prediction:
    """What a forward in training gives.

    Attributes:
        estimates: Unconstrained cameras after each iteration of the camera head, `[T, B, S, 11]`.
        readings: Unconstrained cameras read from the middle and the last layer, `[2, B, S, 11]`.
        points: The point of each patch, from the middle and the last layer, `[2, B, S, N, 3]`.
        point_confidence: Logarithms, `[2, B, S, N]`.
        depth: `[B, S, H, W]`.
        depth_confidence: Above 1, `[B, S, H, W]`.
        matched: Queries and keys of the layers that are taught to match; empty if none shall.
    """

    estimates: Tensor
    readings: Tensor
    points: Tensor
    point_confidence: Tensor
    depth: Tensor
    depth_confidence: Tensor
    matched: Sequence[Matched]


class CameraReader(nn.Module):
    """Reads the camera of each frame from its own camera token alone, `[B, S, 11]`.

    Args:
        dim: Channels of a token; a layer has twice as many.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, dim)
        self.camera = nn.Linear(dim, len(INITIAL_CAMERA))
        nn.init.normal_(self.camera.weight, std=0.01)
        with torch.no_grad():
            self.camera.bias.copy_(torch.tensor(INITIAL_CAMERA))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return unconstrained cameras of camera tokens `[B, S, 2 C]`."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.camera(F.gelu(self.hidden(self.norm(tokens.float()))))


class PointReader(nn.Module):
    """Reads the point of each patch in the axes of frame 0, and a confidence.

    Args:
        dim: Channels of a token; a layer has twice as many.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.point = nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return point and logarithm of the confidence `[B, S, N, 4]` of patch tokens `[B, S, N, 2 C]`."""
        return self.point(self.norm(tokens)).float()


class TrainingNetwork(nn.Module):
    """A model with the heads that only its training needs.

    Args:
        model: The model to train.
    """

    def __init__(self, model: RoomsModel) -> None:
        super().__init__()
        dim, depth = int(model.sizes["dim"]), int(model.sizes["depth"])
        self.model = model
        self.read_layers = (max(0, depth // 2 - 1), depth - 1)
        self.matched_layers = tuple(layer for layer in MATCHED_LAYERS if layer < depth) or (0,)
        self.cameras = nn.ModuleList(CameraReader(dim) for _ in self.read_layers)
        self.points = nn.ModuleList(PointReader(dim) for _ in self.read_layers)

    def forward(self, images: Tensor, match: bool) -> Prediction:
        """Predict from images `[B, S, 3, H, W]` in [0, 1]; with the queries and keys of matching if `match`."""
        layers, start = self.model.aggregator(images)
        read = [layers[layer] for layer in self.read_layers]
        estimates = self.model.camera_head.refine(layers[-1][:, :, 0])
        depth, confidence = self.model.depth_head(layers, images, start, frames_chunk_size=None)
        points = [reader(layer[:, :, start:]) for reader, layer in zip(self.points, read, strict=True)]
        point, point_confidence = torch.stack(points).split([3, 1], dim=-1)
        return Prediction(
            estimates=torch.stack(estimates),
            readings=torch.stack([reader(layer[:, :, 0]) for reader, layer in zip(self.cameras, read, strict=True)]),
            points=point,
            point_confidence=point_confidence[..., 0].clamp(-5, 5),
            depth=depth[..., 0],
            depth_confidence=confidence,
            matched=[self._matched(layers[layer], layer, images) for layer in self.matched_layers] if match else [],
        )

    def _matched(self, layer: Tensor, index: int, images: Tensor) -> Matched:
        """Return queries and keys of head 0 of a global block, for the patches.

        The first half of a layer's channels is what enters its global block.
        """
        aggregator = self.model.aggregator
        block: Any = aggregator.global_blocks[index]
        attn, start = block.attn, aggregator.patch_start_idx
        channels, size = attn.qkv.in_features, attn.head_dim
        tokens = block.norm1(layer[:, :, start:, :channels].flatten(0, 1))  # [B S, N, C]
        height, width = images.shape[-2:]
        positions = aggregator.positions(height, width, images.device)[start:].expand(len(tokens), -1, -1)
        both = []
        for norm, first in ((attn.q_norm, 0), (attn.k_norm, channels)):
            rows = slice(first, first + size)
            projected = norm(F.linear(tokens, attn.qkv.weight[rows], attn.qkv.bias[rows]))
            both.append(attn.rope(projected[:, None], positions)[:, 0].unflatten(0, images.shape[:2]))
        return both[0], both[1]
