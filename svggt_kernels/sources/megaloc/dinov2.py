"""DINOv2's vision transformer without registers, for inference, with attention through PyTorch's SDPA.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023; LayerScale after Touvron et al.,
"Going deeper with Image Transformers", 2021. Parameters bear the names of the published weights.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14  # pixels
NORM_EPSILON = 1e-6
# DINOv2 resamples its position grid by the factor (n + 0.1) / grid, so that rounding never gives n - 1 rows.
GRID_OFFSET = 0.1


class DINOv2(nn.Module):
    """Images to one class token and one token per patch, both after the last norm.

    Args:
        dim: Channels C of a token.
        depth: Blocks.
        num_heads: Heads of each attention.
        grid: Patches on each side of the learned grid of positions; other sizes are resampled from it.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPSILON)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
    ) -> tuple[Tensor, Tensor]:
        """Return the class token `[B, C]` and the patch tokens `[B, n, C]`, row after row.

        Args:
            images: Normalised by ImageNet's mean and deviation; H and W are multiples of 14.
        """
        patches = self.patch_embed["proj"](images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
        tokens = tokens + self.positions(*patches.shape[-2:])
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the position of the class token and of each patch, `[1, 1 + rows * columns, C]`."""
        if rows == columns == self.grid:
            return self.pos_embed
        of_class, of_patches = self.pos_embed.split([1, self.grid**2], dim=1)
        factors = [(count + GRID_OFFSET) / self.grid for count in (rows, columns)]
        grid = of_patches.mT.unflatten(2, (self.grid, self.grid)).float()
        resampled = F.interpolate(grid, scale_factor=factors, mode="bicubic").flatten(2).mT
        return torch.cat([of_class, resampled.to(of_class.dtype)], dim=1)


class Block(nn.Module):
    """One transformer block: attention, then an MLP, each on normed tokens, scaled by channel and added."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        self.attn = Attention(dim, num_heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.empty(dim)})
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPSILON)
        mlp = {"fc1": nn.Linear(dim, 4 * dim), "gelu": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.ls2 = nn.ParameterDict({"gamma": torch.empty(dim)})

    def forward(
        self,
        tokens: Tensor,  # [B, N, C]
    ) -> Tensor:
        """Return the tokens `[B, N, C]` after this block."""
        tokens = tokens + self.ls1["gamma"] * self.attn(self.norm1(tokens))
        return tokens + self.ls2["gamma"] * self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Tensor,  # [B, N, C]
    ) -> Tensor:
        """Return what each token gathers, `[B, N, C]`."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
