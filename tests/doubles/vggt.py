"""A double of VGGT down to its blocks and heads: upstream's names and formulas, our own code, tiny."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, PATCH, SPECIAL = 128, 2, 14, 5
DEPTH = 4


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_frequency = 100.0

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        quarter = x.shape[-1] // 4
        frequency = self.base_frequency ** (-torch.arange(quarter, dtype=x.dtype, device=x.device) / quarter)
        out = []
        for half, axis in zip(x.chunk(2, -1), (0, 1), strict=True):
            angle = (positions[:, None, :, axis, None] * frequency).repeat(1, 1, 1, 2)
            first, second = half.chunk(2, -1)
            out.append(half * angle.cos() + torch.cat([-second, first], -1) * angle.sin())
        return torch.cat(out, -1)


class Attention(nn.Module):
    def __init__(self, rope: Rotary) -> None:
        super().__init__()
        self.num_heads, self.rope = HEADS, rope
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q_norm, self.k_norm = nn.LayerNorm(DIM // HEADS), nn.LayerNorm(DIM // HEADS)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.rope(self.q_norm(q), pos), self.rope(self.k_norm(k), pos)
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, rope: Rotary) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ls1, self.ls2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM), LayerScale(), LayerScale()
        self.attn = Attention(rope)
        self.mlp = Mlp()

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Conv2d):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        patches = super().forward(images).flatten(2).mT
        return {"x_norm_patchtokens": patches, "x_prenorm": patches}


class Aggregator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rope = Rotary()
        self.patch_size, self.patch_start_idx = PATCH, SPECIAL
        self.aa_order, self.aa_block_size = ["frame", "global"], 1
        self.patch_embed = PatchEmbed(3, DIM, PATCH, PATCH)
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, DIM))
        self.register_token = nn.Parameter(torch.randn(1, 2, SPECIAL - 1, DIM))
        self.frame_blocks = nn.ModuleList(Block(self.rope) for _ in range(DEPTH))
        self.global_blocks = nn.ModuleList(Block(self.rope) for _ in range(DEPTH))
        for name, value in (("_resnet_mean", 0.45), ("_resnet_std", 0.23)):
            self.register_buffer(name, torch.full((1, 1, 3, 1, 1), value), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        B, S, _, H, W = images.shape
        images = (images - self._resnet_mean) / self._resnet_std
        patches = self.patch_embed(images.flatten(0, 1))
        if isinstance(patches, dict):
            patches = patches["x_norm_patchtokens"]
        special = torch.cat([self.camera_token, self.register_token], 2)[0]  # [2, R, C]
        special = torch.cat([special[:1], special[1:].expand(S - 1, -1, -1)]).repeat(B, 1, 1)
        tokens = torch.cat([special, patches], 1)
        grid = torch.cartesian_prod(torch.arange(H // PATCH), torch.arange(W // PATCH)) + 1
        pos = F.pad(grid, (0, 0, SPECIAL, 0)).to(images.device).expand(B * S, -1, -1)
        P, layers = len(grid) + SPECIAL, []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            within = frame_block(tokens.reshape(B * S, P, DIM), pos=pos)
            tokens = global_block(within.reshape(B, S * P, DIM), pos=pos.reshape(B, S * P, 2))
            layers.append(torch.cat([within.view(B, S, P, DIM), tokens.view(B, S, P, DIM)], dim=-1))
        return layers, SPECIAL


class DPTHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.intermediate_layer_idx = [1, 3]
        self.project = nn.Linear(2 * DIM, 2)

    def forward(
        self, aggregated_tokens_list: list[Tensor], images: Tensor, patch_start_idx: int, frames_chunk_size: int = 4
    ) -> tuple[Tensor, Tensor]:
        read = [aggregated_tokens_list[i][:, :, patch_start_idx:] for i in self.intermediate_layer_idx]
        depth, confidence = sum(self.project(x) for x in read).chunk(2, -1)
        assert depth.shape[1] == images.shape[1]
        return depth, confidence


class CameraHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pose = nn.Linear(2 * DIM, 9)

    def forward(self, aggregated_tokens_list: list[Tensor], num_iterations: int = 4) -> Tensor:
        return self.pose(aggregated_tokens_list[-1][:, :, 0])


class VGGT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator, self.depth_head, self.camera_head = Aggregator(), DPTHead(), CameraHead()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images if images.dim() == 5 else images[None]
        layers, first = self.aggregator(images)
        with torch.autocast(images.device.type, enabled=False):
            pose = self.camera_head(layers)
            depth, confidence = self.depth_head(layers, images=images, patch_start_idx=first)
        return {"pose": pose, "depth": depth, "confidence": confidence}
