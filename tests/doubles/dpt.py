"""A double of VGGT's DPT head, convolutions and all: upstream's names and formulas, our own code, small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualUnit(nn.Module):
    """Its ReLU works in place, so that what is added at the end is max(0, x)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))
        self.norm1 = self.norm2 = None
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.conv1(self.activation(x)))) + x


class Fusion(nn.Module):
    def __init__(self, features: int, has_residual: bool = True) -> None:
        super().__init__()
        self.align_corners, self.size, self.has_residual = True, None, has_residual
        self.out_conv = nn.Conv2d(features, features, 1)
        if has_residual:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)

    def forward(self, *maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        fused = maps[0]
        if self.has_residual:
            fused = fused + self.resConfUnit1(maps[1])
        fused = self.resConfUnit2(fused)
        size = size or (2 * fused.shape[2], 2 * fused.shape[3])
        return self.out_conv(F.interpolate(fused, size, mode="bilinear", align_corners=True))


class ConvolutionalHead(nn.Module):
    def __init__(
        self,
        dim: int = 256,
        activation: str = "exp",
        patch_size: int = 14,
        features: int = 16,
        widths: tuple[int, ...] = (8, 12, 16, 20),
        pos_embed: bool = True,
        feature_only: bool = False,
        down_ratio: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size, self.activation, self.conf_activation = patch_size, activation, "expp1"
        self.pos_embed, self.feature_only, self.down_ratio = pos_embed, feature_only, down_ratio
        self.intermediate_layer_idx = [0, 1, 2, 3]
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, width, 1) for width in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for level, width in enumerate(widths, 1):
            setattr(self.scratch, f"layer{level}_rn", nn.Conv2d(width, features, 3, padding=1, bias=False))
            setattr(self.scratch, f"refinenet{level}", Fusion(features, has_residual=level < 4))
        self.scratch.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.scratch.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 2 if activation == "exp" else 4, 1),
        )

    def forward(
        self, aggregated_tokens_list: list[Tensor], images: Tensor, patch_start_idx: int, frames_chunk_size: int = 4
    ) -> Tensor | tuple[Tensor, Tensor]:
        starts = range(0, images.shape[1], frames_chunk_size)
        given = aggregated_tokens_list, images, patch_start_idx
        some = [self._forward_impl(*given, start, start + frames_chunk_size) for start in starts]
        if self.feature_only:
            return torch.cat(some, 1)
        return tuple(torch.cat(parts, 1) for parts in zip(*some, strict=True))

    def _forward_impl(self, layers, images, first, start=None, end=None):
        samples, count = images[:, start:end].shape[:2]
        height, width = images.shape[-2:]
        grid = height // self.patch_size, width // self.patch_size
        maps = []
        for index, project, resize in zip(self.intermediate_layer_idx, self.projects, self.resize_layers, strict=True):
            tokens = self.norm(layers[index][:, start:end, first:].flatten(0, 1))
            x = project(tokens.mT.unflatten(2, grid))
            maps.append(resize(self._apply_pos_embed(x, width, height) if self.pos_embed else x))
        fused = self.scratch_forward(maps)
        size = tuple(int(each * self.patch_size / self.down_ratio) for each in grid)
        fused = F.interpolate(fused, size, mode="bilinear", align_corners=True)
        if self.pos_embed:
            fused = self._apply_pos_embed(fused, width, height)
        if self.feature_only:
            return fused.unflatten(0, (samples, count))
        made = self.scratch.output_conv2(fused).movedim(1, -1).unflatten(0, (samples, count))
        values, confidence = made[..., :-1], 1 + made[..., -1].exp()
        if self.activation == "inv_log":
            return values.sign() * values.abs().expm1(), confidence
        return (values.exp() if self.activation == "exp" else values), confidence

    def _apply_pos_embed(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        """Add sines and cosines of a pixel's column, then of its row, as parts of the image's diagonal."""
        quarter = x.shape[1] // 4
        frequency = 100.0 ** (-torch.arange(quarter, dtype=torch.float64, device=x.device) / quarter)
        angles = []
        for length, side in ((x.shape[3], width), (x.shape[2], height)):
            span = side / (width**2 + height**2) ** 0.5 * (length - 1) / length
            places = torch.linspace(-span, span, length, dtype=x.dtype, device=x.device)
            angles.append(frequency[:, None] * places)
        columns, rows = (torch.cat([angle.sin(), angle.cos()]).float() for angle in angles)
        columns, rows = columns[:, None].expand(-1, *x.shape[2:]), rows[:, :, None].expand(-1, *x.shape[2:])
        return x + ratio * torch.cat([columns, rows])

    def scratch_forward(self, maps: list[Tensor]) -> Tensor:
        first, second, third, fourth = (getattr(self.scratch, f"layer{level}_rn")(x) for level, x in enumerate(maps, 1))
        fused = self.scratch.refinenet4(fourth, size=third.shape[2:])
        fused = self.scratch.refinenet3(fused, third, size=second.shape[2:])
        fused = self.scratch.refinenet2(fused, second, size=first.shape[2:])
        return self.scratch.output_conv1(self.scratch.refinenet1(fused, first))


def random_head(dtype: torch.dtype = torch.float32, **options: object) -> ConvolutionalHead:
    """Return a head of patches of 9 pixels and tokens of 64 channels, no part of which is too small to matter."""
    torch.manual_seed(0)
    head = ConvolutionalHead(**{"dim": 64, "patch_size": 9, **options}).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.5).add_(0.02 * torch.randn_like(parameter))
    return head.to(dtype)
