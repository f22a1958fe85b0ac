"""The transformer block that the aggregator and the camera head share, with VGGT's names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """One pre-norm transformer block: attention, then an MLP, each scaled per channel and added to the tokens.

    Args:
        dim: Channels of a token, `C`.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP per channel of a token.
        rope: Rotary embedding of queries and keys, or None for tokens without a position.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, rope: Rotary2D | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, rope)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.ls2 = LayerScale(dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        pos: Tensor | None = None,  # [B, N, 2]
    ) -> Tensor:
        """Return the updated tokens `[B, N, C]`."""
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised, then rotated by their position.

    Args:
        dim: Channels of a token, `C`.
        num_heads: Attention heads.
        rope: Rotary embedding, or None.
    """

    def __init__(self, dim: int, num_heads: int, rope: Rotary2D | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = _linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.proj = _linear(dim, dim, gain=0.5)
        self.rope = rope

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        pos: Tensor | None = None,  # [B, N, 2]
    ) -> Tensor:
        """Return the attended tokens `[B, N, C]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them.

    Args:
        dim: Channels of a token.
        hidden: Channels between the layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = _linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = _linear(hidden, dim, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return new tokens `[..., C]`."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """Scales each channel by a learned factor, large enough at the start for every block to matter without training."""

    def __init__(self, dim: int, initial: float = 0.5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * gamma`."""
        return x * self.gamma


class Rotary2D(nn.Module):
    """Rotates head channels by the patch position: the first half of a head by its row, the second by its column.

    Su et al., "RoFormer" (arXiv 2104.09864), along two axes. Inside a half of size `D / 2`, channel `c` is paired with
    channel `c + D / 4` and turned by `position * base_frequency^(-4 c / D)` radians.

    Args:
        base_frequency: Ratio of the fastest to the (excluded) slowest frequency.
    """

    def __init__(self, base_frequency: float = 100.0) -> None:
        super().__init__()
        self.base_frequency = base_frequency

    def forward(
        self,
        x: Tensor,  # [B, H, N, D]
        pos: Tensor,  # [B, N, 2]
    ) -> Tensor:
        """Return the rotated queries or keys `[B, H, N, D]`, in the dtype of `x`."""
        quarter = x.shape[-1] // 4
        frequency = self.base_frequency ** -(torch.arange(quarter, device=x.device) / quarter)
        angle = pos[:, None, :, :, None] * frequency  # [B, 1, N, 2, D / 4]
        cos, sin = angle.cos(), angle.sin()
        a, b = x.unflatten(-1, (2, 2, quarter)).unbind(-2)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2).flatten(-3).to(x.dtype)


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer whose outputs begin with `gain` times the size of its inputs."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=gain * inputs**-0.5)
    nn.init.zeros_(layer.bias)
    return layer
