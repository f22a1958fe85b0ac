"""Structural doubles of the model family: the same attribute names and token orders as upstream, our own code, tiny.

Each turns images `[B, S, 3, H, W]` into tokens `[B, S, P', C]`, frames in the order of the images. Frames meet nowhere
but in global attention (and in the choice of DA3's reference view, which the caller makes here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from svggt_kernels import CovisibilityGraph, Patch, patch

DIM, HEADS, PATCH = 32, 2, 4
HEIGHT, WIDTH = 8, 12
PATCHES = (HEIGHT // PATCH) * (WIDTH // PATCH)


class Attention(nn.Module):
    """VGGT's: queries and keys normalised, so under autocast they are float32 while values are not."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = True
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.q_norm, self.k_norm = nn.LayerNorm(DIM // HEADS), nn.LayerNorm(DIM // HEADS)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(DIM, DIM)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        else:
            x = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: type[Attention] = Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, **options: object) -> Tensor:
        x = x + self.attn(self.norm1(x), **options)
        return x + self.mlp(self.norm2(x))


class Embedding(nn.Module):
    """Images `[B, S, 3, H, W]` to patch tokens `[B * S, P', C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images.flatten(0, 1)).flatten(2).transpose(1, 2)


def special_tokens(number: int) -> nn.Parameter:
    """One set for the first frame and one for all others."""
    return nn.Parameter(torch.randn(2, number, DIM))


def with_special(patches: Tensor, special: Tensor, batch: int) -> Tensor:
    frames = len(patches) // batch
    each = torch.cat([special[:1], special[1:].expand(frames - 1, -1, -1)]).repeat(batch, 1, 1)
    return torch.cat([each, patches], dim=1)


class Aggregator(nn.Module):
    """VGGT's, with its checkpointing in training."""

    def __init__(self, attention: type[Attention] = Attention, num_special: int = 3) -> None:
        super().__init__()
        self.patch_embed = Embedding()
        self.special = special_tokens(num_special)
        self.patch_start_idx = num_special
        self.patch_size = PATCH
        self.frame_blocks = nn.ModuleList(Block() for _ in range(2))
        self.global_blocks = nn.ModuleList(Block(attention) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        return self.alternate(images), self.patch_start_idx

    def alternate(self, images: Tensor, **options: object) -> list[Tensor]:
        batch, frames = images.shape[:2]
        tokens, outputs = with_special(self.patch_embed(images), self.special, batch), []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            tokens = self.run(frame_block, tokens)
            tokens = self.run(global_block, tokens.reshape(batch, -1, DIM), **options).reshape(batch * frames, -1, DIM)
            outputs.append(tokens.unflatten(0, (batch, frames)))
        return outputs

    def run(self, block: Block, tokens: Tensor, **options: object) -> Tensor:
        if self.training:
            return checkpoint(block, tokens, use_reentrant=False, **options)
        return block(tokens, **options)


class VGGT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator = Aggregator()

    def forward(self, images: Tensor) -> Tensor:
        outputs, start = self.aggregator(images if images.dim() == 5 else images[None])
        return outputs[-1][:, :, start:]


class WorldMirror(nn.Module):
    """VGGT's structure at another place, with two more special tokens per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.visual_geometry_transformer = Aggregator(num_special=5)

    def forward(self, images: Tensor) -> Tensor:
        outputs, start = self.visual_geometry_transformer(images)
        return outputs[-1][:, :, start:]


class StreamAttention(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2))


class StreamAggregator(Aggregator):
    def forward(
        self, images: Tensor, past_key_values: list | None = None, use_cache: bool = False
    ) -> tuple[list[Tensor], int]:
        frame = torch.arange(images.shape[1]).repeat_interleave(self.patch_start_idx + PATCHES)
        later = (frame[:, None] < frame).to(images.dtype) * torch.finfo(images.dtype).min
        return self.alternate(images, attn_mask=later), self.patch_start_idx


class StreamVGGT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator = StreamAggregator(StreamAttention)

    def forward(self, views: list[dict[str, Tensor]] | Tensor) -> Tensor:
        images = views if isinstance(views, Tensor) else torch.stack([view["img"] for view in views], dim=1)
        outputs, start = self.aggregator(images)
        return outputs[-1][:, :, start:]


class OmegaAggregator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Embedding()
        self.special = special_tokens(4)
        self.patch_token_start = 4
        self.patch_size = PATCH
        self.frame_blocks = nn.ModuleList(Block() for _ in range(3))
        self.inter_frame_blocks = nn.ModuleList(Block() for _ in range(3))
        self.inter_frame_attention_types = ["global", "register", "global"]

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        start = self.patch_token_start
        tokens = with_special(self.patch_embed(images), self.special, batch)
        for i, kind in enumerate(self.inter_frame_attention_types):
            tokens = self.frame_blocks[i](tokens).reshape(batch, -1, DIM)
            if kind == "global":
                tokens = self.inter_frame_blocks[i](tokens)
            tokens = tokens.reshape(batch * frames, -1, DIM)
            if kind == "register":
                registers = self.inter_frame_blocks[i](tokens[:, :start].reshape(batch, -1, DIM))
                tokens = torch.cat([registers.reshape(batch * frames, start, DIM), tokens[:, start:]], dim=1)
        return tokens.unflatten(0, (batch, frames))[:, :, start:]


class VGGTOmega(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator = OmegaAggregator()

    def forward(self, images: Tensor) -> Tensor:
        return self.aggregator(images)


class FlashAttention(Attention):
    """Pi3's: attention inside a context that admits certain backends only."""

    def forward(self, x: Tensor, xpos: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        q, k = q.to(v.dtype), k.to(v.dtype)
        allowed = (
            [SDPBackend.FLASH_ATTENTION]
            if q.dtype == torch.bfloat16
            else [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
        )
        with sdpa_kernel(allowed):
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Pi3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Embedding()
        self.register_token = nn.Parameter(torch.randn(1, 1, 2, DIM))
        self.patch_start_idx = 2
        self.patch_size = PATCH
        self.decoder = nn.ModuleList(Block(FlashAttention) for _ in range(4))

    def forward(self, imgs: Tensor) -> Tensor:
        batch, frames = imgs.shape[:2]
        hidden = self.encoder(imgs)
        hidden = torch.cat([self.register_token[0].expand(len(hidden), -1, -1), hidden], dim=1)
        for i, block in enumerate(self.decoder):
            hidden = block(hidden if i % 2 == 0 else hidden.reshape(batch, -1, DIM), xpos=None)
            hidden = hidden.reshape(batch * frames, -1, DIM)
        return hidden.unflatten(0, (batch, frames))[:, :, self.patch_start_idx :]


class Dino(nn.Module):
    """DA3's transformer: frames move, reference first, before block `alt_start - 1`; odd blocks after it are global."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Embedding()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.camera_token = special_tokens(1)
        self.num_register_tokens = 0
        self.patch_size = PATCH
        self.alt_start = 2
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def get_intermediate_layers(self, x: Tensor, reference: list[int]) -> Tensor:
        batch, frames = x.shape[:2]
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1).unflatten(0, (batch, frames))
        order = torch.tensor([[r, *(i for i in range(frames) if i != r)] for r in reference])
        sample = torch.arange(batch)[:, None]
        for i, block in enumerate(self.blocks):
            if i == self.alt_start - 1 and frames >= 3:
                tokens = tokens[sample, order]
            if i == self.alt_start:
                camera = torch.cat([self.camera_token[:1], self.camera_token[1:].expand(frames - 1, -1, -1)])
                tokens = torch.cat([camera.expand(batch, -1, -1, -1), tokens[:, :, 1:]], dim=2)
            is_global = i >= self.alt_start and i % 2 == 1
            flat = tokens.flatten(1, 2) if is_global else tokens.flatten(0, 1)
            tokens = block(flat, pos=None, attn_mask=None).reshape(tokens.shape)
        if frames >= 3:
            tokens = tokens[sample, order.argsort(dim=1)]
        return tokens[:, :, 1:]


class DinoWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pretrained = Dino()

    def forward(self, x: Tensor, **kwargs: list[int]) -> Tensor:
        return self.pretrained.get_intermediate_layers(x, **kwargs)


class DepthAnything3(nn.Module):
    """The reference view is the middle one, as with upstream's strategy "middle", or the first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = DinoWrapper()

    def forward(self, x: Tensor, reference: list[int] | None = None, ref_view_strategy: str = "middle") -> Tensor:
        chosen = 0 if ref_view_strategy == "first" else x.shape[1] // 2
        return self.backbone(x, reference=reference or [chosen] * len(x))


class MultiViewAlternatingAttentionTransformer(nn.Module):
    """UniCeption's: even blocks global; tokens of a view at its end, further tokens after all views."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention_blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, model_input: SimpleNamespace) -> Tensor:
        views = [feature.flatten(2) for feature in model_input.features]
        if model_input.additional_input_tokens_per_view is not None:
            tokens = zip(views, model_input.additional_input_tokens_per_view, strict=True)
            views = [torch.cat(pair, dim=2) for pair in tokens]
        x = torch.stack(views, dim=1).transpose(2, 3)  # [B, S, P, C]
        shape, trailing = x.shape, x.new_zeros(len(x), 0, DIM)
        if model_input.additional_input_tokens is not None:
            trailing = model_input.additional_input_tokens.transpose(1, 2)
        for i, block in enumerate(self.self_attention_blocks):
            if i % 2 == 0:
                x, trailing = block(torch.cat([x.flatten(1, 2), trailing], dim=1)).split_with_sizes(
                    [shape[1] * shape[2], trailing.shape[1]], dim=1
                )
                x = x.reshape(shape)
            else:
                x = block(x.flatten(0, 1)).reshape(shape)
        return x


class MapAnything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Embedding()
        self.view_tokens = nn.Parameter(torch.randn(DIM, 2))
        self.scale_token = nn.Parameter(torch.randn(DIM, 1))
        self.info_sharing = MultiViewAlternatingAttentionTransformer()

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        features = self.encoder(images).transpose(1, 2).unflatten(2, (HEIGHT // PATCH, WIDTH // PATCH))
        model_input = SimpleNamespace(
            features=list(features.unflatten(0, (batch, frames)).unbind(1)),
            additional_input_tokens_per_view=[self.view_tokens.expand(batch, -1, -1)] * frames,
            additional_input_tokens=self.scale_token.expand(batch, -1, -1),
        )
        return self.info_sharing(model_input)[:, :, :PATCHES]


class Stranger(nn.Module):
    """A model that no record knows: one special token per frame, layers under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Embedding()
        self.marker = nn.Parameter(torch.randn(1, 1, DIM))
        self.layers = nn.ModuleList(nn.ModuleDict({"within": Block(), "across": Block()}) for _ in range(2))

    def forward(self, pictures: Tensor) -> Tensor:
        batch, frames = pictures.shape[:2]
        x = self.embed(pictures)
        x = torch.cat([self.marker.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer["within"](x)
            x = layer["across"](x.reshape(batch, -1, DIM)).reshape(batch * frames, -1, DIM)
        return x.unflatten(0, (batch, frames))[:, :, 1:]


@dataclass(frozen=True)
class Double:
    """One member of the family and what is true of it.

    Attributes:
        build: Makes it.
        record: Name of its record; None if no record knows it.
        modules: Names of its global attention modules.
        first, last, trailing: Special tokens at the start and end of each frame, and after all frames.
        options: Arguments that `patch` needs for it.
    """

    build: Callable[[], nn.Module]
    record: str | None
    modules: tuple[str, ...]
    first: int = 0
    last: int = 0
    trailing: int = 0
    options: dict[str, object] = field(default_factory=dict)

    def create(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.build().to(dtype).eval()

    @property
    def tokens_per_frame(self) -> int:
        return self.first + PATCHES + self.last

    def order(self, frames: int) -> list[int]:
        """The image at each place inside the model."""
        if self.record != "Depth Anything 3" or frames < 3:
            return list(range(frames))
        middle = frames // 2
        return [middle, *(i for i in range(frames) if i != middle)]


FAMILY = {
    "vggt": Double(VGGT, "VGGT", tuple(f"aggregator.global_blocks.{i}.attn" for i in (0, 1)), first=3),
    "world-mirror": Double(
        WorldMirror, "VGGT", tuple(f"visual_geometry_transformer.global_blocks.{i}.attn" for i in (0, 1)), first=5
    ),
    "vggt-omega": Double(
        VGGTOmega, "VGGT-Omega", tuple(f"aggregator.inter_frame_blocks.{i}.attn" for i in (0, 2)), first=4
    ),
    "pi3": Double(Pi3, "Pi3", ("decoder.1.attn", "decoder.3.attn"), first=2),
    "da3": Double(
        DepthAnything3, "Depth Anything 3", tuple(f"backbone.pretrained.blocks.{i}.attn" for i in (3, 5)), first=1
    ),
    "mapanything": Double(
        MapAnything,
        "MapAnything",
        tuple(f"info_sharing.self_attention_blocks.{i}.attn" for i in (0, 2)),
        last=2,
        trailing=1,
    ),
    "stranger": Double(
        Stranger,
        None,
        ("layers.0.across.attn", "layers.1.across.attn"),
        first=1,
        options={
            "modules": ["layers.0.across.attn", "layers.1.across.attn"],
            "tokens_per_frame": 1 + PATCHES,
            "num_special_tokens": 1,
        },
    ),
}


def images(frames: int = 5, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Returns random images `[B, S, 3, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, frames, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


class MaskedAttention(TorchFunctionMode):
    """Dense attention with a mask, in calls over all tokens: what a patched model must equal."""

    def __init__(self, double: Double, *graphs: CovisibilityGraph, dense_special: bool) -> None:
        super().__init__()
        self.mask = torch.stack([token_mask(double, graph, dense_special) for graph in graphs])[:, None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].shape[2] == self.mask.shape[-1]:
            kwargs["attn_mask"] = self.mask
        return func(*args, **kwargs)


def token_mask(double: Double, graph: CovisibilityGraph, dense_special: bool) -> Tensor:
    """Who sees whom, token by token, from the definition: bool `[N, N]`."""
    frames = graph.num_frames
    order = double.order(frames)
    per_frame = double.tokens_per_frame
    place = torch.arange(per_frame)
    special = (place < double.first) | (place >= per_frame - double.last)
    dense = torch.cat([special.repeat(frames) & dense_special, torch.ones(double.trailing, dtype=torch.bool)])
    mask = torch.ones(len(dense), len(dense), dtype=torch.bool)
    visible = graph.to_dense()[order][:, order]
    in_frames = frames * per_frame
    mask[:in_frames, :in_frames] = visible.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    return mask | dense | dense[:, None]


def sparse(model: nn.Module, double: Double, **options) -> Patch:
    return patch(model, **{"covisibility": "tokens", **double.options, **options})


# Graphs over five frames, directed: each frame alone; {0, 1} and {2, 3, 4} apart; connected.
ALONE = CovisibilityGraph.from_pairs(5, [])
ISLANDS = CovisibilityGraph.from_pairs(5, [(0, 1), (2, 3), (3, 2), (3, 4), (4, 2)])
BAND = CovisibilityGraph.from_pairs(5, [(0, 1), (1, 0), (1, 2), (2, 3), (3, 2), (4, 0)])
