"""What is read from the tokens: cameras, and a depth for each pixel. Signatures are those of VGGT's heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block
from .poses import encode_poses

# Centre 0, no rotation, a field of view of 55 by 71 degrees.
INITIAL_CAMERA = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, -0.65, -0.35)
CAMERA_TRUNK = 2
DEPTH_LATENT, DEPTH_CHANNELS = 192, 32


class Cameras(NamedTuple):
    """Cameras in the axes of frame 0.

    Attributes:
        rotation: Camera to frame 0, `[..., 3, 3]`.
        centre: `[..., 3]`, in units of the scene's scale.
        half_view: Tangent of half the vertical and half the horizontal field of view, `[..., 2]`.
    """

    rotation: Tensor
    centre: Tensor
    half_view: Tensor


class CameraHead(nn.Module):
    """Refines the camera of each frame a few times, each time looking at the estimates of all frames.

    An estimate is eleven numbers without constraints: centre, two axes of the rotation before orthogonalisation (Zhou
    et al., "On the continuity of rotation representations", arXiv 1812.07035), logarithms of the tangents of half the
    fields of view. It enters the camera tokens, which attend across frames and state all cameras anew: steps from one
    estimate to the next would add up the errors of all iterations.

    Args:
        dim: Channels of a token, `C`; the layers have `2 C`.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of an MLP per channel of a token.
    """

    initial_camera: Tensor

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(2 * dim)
        self.embed_token = nn.Linear(2 * dim, dim)
        self.embed_camera = nn.Linear(len(INITIAL_CAMERA), dim)
        self.trunk = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(CAMERA_TRUNK))
        self.trunk_norm = nn.LayerNorm(dim)
        self.camera = nn.Linear(dim, len(INITIAL_CAMERA))
        nn.init.normal_(self.camera.weight, std=0.01)
        nn.init.zeros_(self.camera.bias)
        self.register_buffer("initial_camera", torch.tensor(INITIAL_CAMERA), persistent=False)

    def forward(self, aggregated_tokens_list: Sequence[Tensor], num_iterations: int = 4) -> list[Tensor]:
        """Return the pose encodings `[B, S, 9]` after each iteration, the best last; see `poses`.

        Args:
            aggregated_tokens_list: Layers `[B, S, P, 2 C]`; the last is read, the first token of each frame.
            num_iterations: How often to refine.
        """
        refined = self.refine(aggregated_tokens_list[-1][:, :, 0], num_iterations)
        return [encode_poses(*cameras(estimate)) for estimate in refined]

    def refine(
        self,
        camera_tokens: Tensor,  # [B, S, 2 C]
        num_iterations: int = 4,
    ) -> list[Tensor]:
        """Return the estimates `[B, S, 11]` after each iteration, in float32 or wider; `cameras` reads them.

        No gradient passes from an iteration to the one before it.
        """
        with torch.autocast(camera_tokens.device.type, enabled=False):
            tokens = self.embed_token(self.token_norm(camera_tokens.to(self.token_norm.weight.dtype)))
            initial = _at_least_float32(self.initial_camera)
            estimate = initial.expand(*tokens.shape[:2], -1)
            refined = []
            for _ in range(num_iterations):
                x = tokens + self.embed_camera(estimate.detach().to(tokens.dtype))
                for block in self.trunk:
                    x = block(x)
                estimate = initial + self.camera(self.trunk_norm(x))
                refined.append(estimate)
        return refined


def cameras(
    estimate: Tensor,  # [..., 11]
) -> Cameras:
    """Return the cameras that the unconstrained numbers of `CameraHead.refine` stand for."""
    centre, first, second, view = estimate.split([3, 3, 3, 2], dim=-1)
    x_axis = F.normalize(first, dim=-1, eps=1e-6)
    y_axis = F.normalize(second - (x_axis * second).sum(-1, keepdim=True) * x_axis, dim=-1, eps=1e-6)
    rotation = torch.stack([x_axis, y_axis, torch.linalg.cross(x_axis, y_axis)], dim=-1)
    return Cameras(rotation, centre, view.clamp(-4, 2).exp())


class DepthHead(nn.Module):
    """Reads depth and confidence from the patch tokens of three layers and, for detail, from the image itself.

    Each patch token paints a square of features at half resolution, to which features of the image are added; two
    convolutions turn them into logarithms of depth and confidence at full resolution.

    Attributes:
        intermediate_layer_idx: The layers that it reads.

    Args:
        dim: Channels of a token, `C`; the layers have `2 C`.
        depth: Number of layers.
        patch_size: Side of a patch in pixels, even.
    """

    def __init__(self, dim: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.intermediate_layer_idx = [max(0, depth * third // 3 - 1) for third in (1, 2, 3)]
        self.half_patch = patch_size // 2
        self.norm = nn.LayerNorm(2 * dim)
        self.projects = nn.ModuleList(nn.Linear(2 * dim, DEPTH_LATENT) for _ in self.intermediate_layer_idx)
        self.paint = nn.Linear(DEPTH_LATENT, DEPTH_CHANNELS * self.half_patch**2)
        self.image = nn.Conv2d(3, DEPTH_CHANNELS, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(DEPTH_CHANNELS, DEPTH_CHANNELS, 3, padding=1)
        self.values = nn.Conv2d(DEPTH_CHANNELS, 8, 3, padding=1)  # depth and confidence of 2 x 2 pixels

    def forward(
        self,
        aggregated_tokens_list: Sequence[Tensor],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> tuple[Tensor, Tensor]:
        """Return depth `[B, S, H, W, 1]`, positive, and confidence `[B, S, H, W]`, above 1; at least float32.

        Args:
            aggregated_tokens_list: Layers `[B, S, P, 2 C]`.
            images: RGB in [0, 1], `[B, S, 3, H, W]`.
            patch_start_idx: The first token of a frame that is a patch.
            frames_chunk_size: Frames that run at once; None for all. Frames do not influence one another.
        """
        frames = images.shape[1]
        at_once = frames_chunk_size or frames
        read = [aggregated_tokens_list[index] for index in self.intermediate_layer_idx]
        parts = []
        for start in range(0, frames, at_once):
            chunk = slice(start, start + at_once)
            parts.append(self._logarithms([layer[:, chunk, patch_start_idx:] for layer in read], images[:, chunk]))
        log_depth, log_confidence = torch.cat(parts, dim=1).unbind(2)
        return log_depth.clamp(-6, 4).exp()[..., None], 1 + log_confidence.clamp(-5, 5).exp()

    def _logarithms(self, read: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return the logarithms of depth and confidence of some frames, `[B, S, 2, H, W]`."""
        rows, columns = (side // (2 * self.half_patch) for side in images.shape[-2:])
        projected = [project(self.norm(tokens)) for project, tokens in zip(self.projects, read, strict=True)]
        squares = self.paint(F.gelu(torch.stack(projected).sum(0))).flatten(0, 1)
        squares = squares.unflatten(1, (rows, columns)).unflatten(-1, (-1, self.half_patch, self.half_patch))
        x = squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B S, channels, H / 2, W / 2]
        x = x + self.image(2 * images.flatten(0, 1).to(self.image.weight.dtype) - 1)
        x = F.gelu(x.contiguous(memory_format=torch.channels_last))
        x = x + F.gelu(self.mix(x))
        return _at_least_float32(F.pixel_shuffle(self.values(x), 2)).unflatten(0, images.shape[:2])


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
