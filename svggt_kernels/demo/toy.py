"""A small multi-view transformer with VGGT's shape and random weights, for tests and demonstrations.

Read it from top to bottom to see what the family has in common: frames become tokens, blocks alternate between
attention inside each frame and attention over all frames, and small heads read cameras and depth from the tokens.

The weights are random and nothing is trained: **the outputs mean nothing geometrically.** The model exists to exercise
attention at a size that a CPU can run. The shape follows Wang et al., "VGGT: Visual Geometry Grounded Transformer"
(CVPR 2025, arXiv 2503.11651); the code is our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ToyMultiViewTransformer"]


class ToyMultiViewTransformer(nn.Module):
    """Turns the images of one scene into cameras and depth maps, the way VGGT does, with untrained weights.

    Tokens lie frame after frame, `P` per frame: one camera token, the register tokens, one token per image patch in
    row-major order. Frame attention runs on `[B * S, P, C]`, global attention on `[B, S * P, C]`. The special tokens
    (camera and registers) have two learned variants: one for frame 0, the reference, and one shared by all others.

    Attributes:
        patch_size: Side of a square image patch in pixels.
        num_special_tokens: Special tokens at the start of each frame.
        reference_frame: Index of the frame that has special tokens of its own, 0.
        frame_blocks: Blocks that attend within a frame.
        global_blocks: Blocks that attend over all frames; `.attn` is the attention of a block.

    Args:
        dim: Channels of a token, `C`.
        depth: Number of frame blocks, and of global blocks.
        num_heads: Attention heads; `dim / num_heads` must be a multiple of 4, for the rotary embedding.
        patch_size: Side of a square image patch in pixels.
        num_registers: Register tokens per frame.

    Raises:
        ValueError: If `depth` is 0 or `dim` does not split into heads whose size is a multiple of 4.
    """

    reference_frame = 0

    def __init__(
        self, dim: int = 192, depth: int = 4, num_heads: int = 3, patch_size: int = 14, num_registers: int = 4
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if dim % num_heads or dim // num_heads % 4:
            raise ValueError(
                f"dim / num_heads must be a multiple of 4, got dim={dim} and num_heads={num_heads}; "
                f"dim={64 * num_heads} gives heads of size 64"
            )
        self.patch_size = patch_size
        self.num_special_tokens = 1 + num_registers

        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.camera_token = nn.Parameter(torch.randn(2, 1, dim))  # [0]: reference frame, [1]: all other frames
        self.register_tokens = nn.Parameter(torch.randn(2, num_registers, dim))
        self.frame_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.camera_head = CameraHead(2 * dim)
        self.depth_head = DepthHead(2 * dim, patch_size)

    @classmethod
    def create(cls, seed: int = 0, **sizes: int) -> ToyMultiViewTransformer:
        """Build the model on the CPU, in eval mode, with the random weights that `seed` determines.

        Args:
            seed: Seed of the weights. The global random state is left as it was.
            **sizes: Arguments of the constructor.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return cls(**sizes).eval()

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Return `P`, the number of tokens of one frame of `height` x `width` pixels, special tokens included."""
        return self.num_special_tokens + (height // self.patch_size) * (width // self.patch_size)

    def forward(
        self,
        images: Tensor,  # [S, 3, H, W] or [B, S, 3, H, W]
    ) -> dict[str, Tensor]:
        """Predict cameras and depth maps of all frames at once.

        Args:
            images: RGB in [0, 1]; height and width are multiples of `patch_size`.

        Returns:
            `pose_enc` `[B, S, 9]`: translation (3), unit quaternion (4), fields of view in radians (2);
            `depth` `[B, S, H, W]`: positive; `depth_conf` `[B, S, H, W]`: confidence, above 1. At least float32.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If the shape is not one of the above.
        """
        images = self._checked(images)
        tokens, positions = self._embed(images)
        batch, frames, per_frame, dim = tokens.shape

        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            tokens = frame_block(tokens.reshape(batch * frames, per_frame, dim), positions.flatten(0, 1))
            within_frame = tokens
            tokens = global_block(tokens.reshape(batch, frames * per_frame, dim), positions.flatten(1, 2))

        shape = (batch, frames, per_frame, dim)
        tokens = torch.cat([within_frame.reshape(shape), tokens.reshape(shape)], dim=-1)
        depth, confidence = self.depth_head(tokens[:, :, self.num_special_tokens :], images.shape[-2:])
        return {"pose_enc": self.camera_head(tokens[:, :, 0]), "depth": depth, "depth_conf": confidence}

    def _checked(self, images: Tensor) -> Tensor:
        """Return the images as `[B, S, 3, H, W]` in the dtype of the weights."""
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; divide bytes by 255")
        if images.dim() not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape:
            raise ValueError(f"images must be [S, 3, H, W] or [B, S, 3, H, W] and not empty, got {list(images.shape)}")
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            nearest = " x ".join(str(max(1, round(n / self.patch_size)) * self.patch_size) for n in (height, width))
            raise ValueError(
                f"image height and width must be multiples of the patch size {self.patch_size}, "
                f"got {height} x {width}; resize or crop, for example to {nearest}"
            )
        return images.reshape(-1, *images.shape[-4:]).to(self.patch_embed.weight.dtype)

    def _embed(
        self,
        images: Tensor,  # [B, S, 3, H, W]
    ) -> tuple[Tensor, Tensor]:
        """Return tokens `[B, S, P, C]` and (row, column) positions `[B, S, P, 2]`: special (0, 0), patches from 1."""
        batch, frames = images.shape[:2]
        patches = self.patch_embed(2 * images.flatten(0, 1) - 1)  # [B * S, C, rows, columns]
        rows, columns = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))

        special = torch.cat([self.camera_token, self.register_tokens], dim=1).to(patches.dtype)  # [2, R, C]
        special = torch.cat([special[:1], special[1:].expand(frames - 1, -1, -1)]).expand(batch, -1, -1, -1)

        grid = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=images.device), torch.arange(1, columns + 1, device=images.device)
        )
        positions = F.pad(grid, (0, 0, self.num_special_tokens, 0))
        return torch.cat([special, patches], dim=2), positions.expand(batch, frames, -1, -1)


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP, each scaled per channel and added to the tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.ls2 = LayerScale(dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        pos: Tensor,  # [B, N, 2]
    ) -> Tensor:
        """Return the updated tokens `[B, N, C]`."""
        x = x + self.ls1(self.attn(self.norm1(x), pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised, then rotated. Frame and global blocks share it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.rope = Rotary2D()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        pos: Tensor,  # [B, N, 2]
    ) -> Tensor:
        """Return the attended tokens `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        q, k = self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Rotary2D(nn.Module):
    """Rotates head channels by the patch position: the first half of a head by its row, the second by its column.

    Su et al., "RoFormer" (arXiv 2104.09864), along two axes. Inside a half of size `D / 2`, channel `c` is paired with
    channel `c + D / 4` and turned by `position * base^(-4 c / D)` radians.

    Args:
        base: Ratio of the fastest to the (excluded) slowest frequency.
    """

    def __init__(self, base: float = 100.0) -> None:
        super().__init__()
        self.base = base

    def forward(
        self,
        x: Tensor,  # [B, H, N, D]
        pos: Tensor,  # [B, N, 2]
    ) -> Tensor:
        """Return the rotated queries or keys `[B, H, N, D]`, in the dtype of `x`."""
        quarter = x.shape[-1] // 4
        frequency = self.base ** -(torch.arange(quarter, device=x.device) / quarter)
        angle = pos[:, None, :, :, None] * frequency  # [B, 1, N, 2, D / 4]
        cos, sin = angle.cos(), angle.sin()
        a, b = x.unflatten(-1, (2, 2, quarter)).unbind(-2)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2).flatten(-3).to(x.dtype)


class LayerScale(nn.Module):
    """Scales each channel by a learned factor, large enough at the start for every block to matter without training."""

    def __init__(self, dim: int, initial: float = 0.5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * gamma`."""
        return x * self.gamma


class CameraHead(nn.Module):
    """Reads one pose encoding per frame from its camera token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 9)

    def forward(
        self,
        camera_tokens: Tensor,  # [B, S, 2 C]
    ) -> Tensor:
        """Return `[B, S, 9]`: translation, unit quaternion, field of view in (0, pi)."""
        encoding = _at_least_float32(self.linear(self.norm(camera_tokens)))
        translation, quaternion, view = encoding.split([3, 4, 2], dim=-1)
        return torch.cat([translation, F.normalize(quaternion, dim=-1), math.pi * view.sigmoid()], dim=-1)


class DepthHead(nn.Module):
    """Reads a square of depths and confidences from each patch token and tiles them to the full image."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, 2 * patch_size**2)

    def forward(
        self,
        patch_tokens: Tensor,  # [B, S, rows * columns, 2 C]
        size: tuple[int, int],  # (H, W) in pixels
    ) -> tuple[Tensor, Tensor]:
        """Return depth and confidence, each `[B, S, H, W]`."""
        rows = size[0] // self.patch_size
        squares = _at_least_float32(self.linear(self.norm(patch_tokens))).unflatten(2, (rows, -1))
        log_depth, log_confidence = F.pixel_shuffle(squares.movedim(-1, -3), self.patch_size).unbind(-3)
        return log_depth.exp(), 1 + log_confidence.exp()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
