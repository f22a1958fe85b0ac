"""From images to tokens: a convolutional patch embedding, then blocks within frames and across frames in turn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, Rotary2D

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEM_CHANNELS = 40


class Aggregator(nn.Module):
    """Alternates attention inside each frame with attention over the tokens of all frames.

    Tokens lie frame after frame, `P` per frame: one camera token, the register tokens, one token per image patch in
    row-major order. The camera and register tokens have two learned variants: one for frame 0, the reference, and one
    shared by all others. Names and stages are those of VGGT's aggregator.

    Attributes:
        patch_size: Side of a square image patch in pixels.
        patch_start_idx: Special tokens at the start of each frame; the first patch token follows them.
        frame_blocks: Blocks that attend within a frame.
        global_blocks: Blocks that attend over all frames; `.attn` is the attention of a block.
        aa_order: Which stage follows which.
        aa_block_size: Blocks that a stage runs.

    Args:
        dim: Channels of a token, `C`.
        depth: Number of frame blocks, and of global blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of an MLP per channel of a token.
        patch_size: Side of a square image patch in pixels, even.
        num_registers: Register tokens per frame.
    """

    _resnet_mean: Tensor
    _resnet_std: Tensor

    def __init__(
        self, dim: int, depth: int, num_heads: int, mlp_ratio: float, patch_size: int, num_registers: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_start_idx = 1 + num_registers
        self.aa_order = ["frame", "global"]
        self.aa_block_size = 1
        self.patch_embed = PatchEmbedding(dim, patch_size)
        self.camera_token = nn.Parameter(0.5 * torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(0.5 * torch.randn(1, 2, num_registers, dim))
        self.rope = Rotary2D()
        self.frame_blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, self.rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, self.rope) for _ in range(depth))
        for name, values in (("_resnet_mean", IMAGENET_MEAN), ("_resnet_std", IMAGENET_DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(1, 1, 3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
    ) -> tuple[list[Tensor], int]:
        """Return the tokens after each pair of blocks, and the index of the first patch token.

        Args:
            images: RGB in [0, 1]; height and width are multiples of `patch_size`.

        Returns:
            For each of the `depth` pairs `[B, S, P, 2 C]`, the output of its frame block beside that of its global
            block; and `patch_start_idx`.
        """
        B, S, _, H, W = images.shape
        normalised = (images - self._resnet_mean) / self._resnet_std
        patches = self.patch_embed(normalised.flatten(0, 1))
        special = torch.cat([self.camera_token, self.register_token], dim=2)  # [1, 2, R, C]
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, S - 1, -1, -1)], dim=1)
        tokens = torch.cat([special.expand(B, -1, -1, -1).flatten(0, 1), patches], dim=1)
        pos = self.positions(H, W, images.device).expand(B * S, -1, -1)
        P, C = tokens.shape[1:]

        layers = []
        frame_idx = global_idx = 0
        for _ in self.frame_blocks:
            tokens, frame_idx, within = self._process_frame_attention(tokens, B, S, P, C, frame_idx, pos=pos)
            tokens, global_idx, across = self._process_global_attention(tokens, B, S, P, C, global_idx, pos=pos)
            layers += [torch.cat(pair, dim=-1) for pair in zip(within, across, strict=True)]
        return layers, self.patch_start_idx

    def positions(self, height: int, width: int, device: torch.device) -> Tensor:
        """Return the (row, column) of each token of a frame `[P, 2]`: special tokens (0, 0), patches from 1."""
        rows, columns = height // self.patch_size, width // self.patch_size
        grid = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
        )
        return F.pad(grid, (0, 0, self.patch_start_idx, 0))

    def _process_frame_attention(
        self, tokens: Tensor, B: int, S: int, P: int, C: int, frame_idx: int, pos: Tensor
    ) -> tuple[Tensor, int, list[Tensor]]:
        """Run a frame block; return its tokens `[B S, P, C]`, the index of the next block, and the outputs to keep."""
        tokens = self.frame_blocks[frame_idx](tokens.reshape(B * S, P, C), pos=pos)
        return tokens, frame_idx + 1, [tokens.view(B, S, P, C)]

    def _process_global_attention(
        self, tokens: Tensor, B: int, S: int, P: int, C: int, global_idx: int, pos: Tensor
    ) -> tuple[Tensor, int, list[Tensor]]:
        """Run a global block; return its tokens `[B, S P, C]`, the index of the next block, and the outputs to keep."""
        tokens = self.global_blocks[global_idx](tokens.reshape(B, S * P, C), pos=pos.reshape(B, S * P, 2))
        return tokens, global_idx + 1, [tokens.view(B, S, P, C)]


class PatchEmbedding(nn.Module):
    """Three convolutions at half resolution, then one linear map of each patch.

    The convolutions find structure between pixels that a single linear map misses. They also see where in the image a
    pixel lies, in units of half its width, so that the direction of a ray can be read from a token.

    Args:
        dim: Channels of a token, `C`.
        patch_size: Side of a patch in pixels, even.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(5, STEM_CHANNELS, 3, stride=2, padding=1)
        self.second = nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1)
        self.third = nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, padding=1)
        self.patches = nn.Conv2d(STEM_CHANNELS, dim, patch_size // 2, stride=patch_size // 2)

    def forward(
        self,
        images: Tensor,  # [F, 3, H, W], normalised
    ) -> Tensor:
        """Return tokens `[F, P, C]`, patches in row-major order."""
        x = torch.cat([images, _image_plane(images).expand(len(images), -1, -1, -1)], dim=1)
        x = F.gelu(self.first(x.contiguous(memory_format=torch.channels_last)))
        x = F.gelu(self.second(x))
        x = x + F.gelu(self.third(x))
        return self.patches(x).flatten(2).transpose(1, 2)


def _image_plane(images: Tensor) -> Tensor:
    """Return x and y of each pixel from the middle of the image, in units of half its width, `[2, H, W]`."""
    height, width = images.shape[-2:]
    y, x = (torch.arange(n, device=images.device, dtype=images.dtype) - (n - 1) / 2 for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)]) * (2 / width)
