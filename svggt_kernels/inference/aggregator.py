"""VGGT's aggregator at inference, over the model's own parameters (Wang et al., arXiv 2503.11651, section 3).

The tokens of a frame are a camera token, registers and one token for each patch; the camera token and the registers of
frame 0 are its own. A layer is a block that attends within each frame, and one that attends across all frames. What is
computed is what the model's forward computes, up to rounding; `verification` compares the two. Memory is held for what
is read only: the images are embedded in parts, and outputs of layers are kept where a head reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks
from .layer_outputs import LayerOutputs
from .ops import layer_norm
from .settings import is_setting, stranger


class GlobalAttention(Protocol):
    """How the global layers of one forward attend; it knows the layer, so layers may differ."""

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [B, H, N, D]
        k: Tensor,  # [B, H, N, D]
        v: Tensor,  # [B, H, N, D]
        scale: float,
        *,
        tokens: Callable[[], Tensor],
    ) -> Tensor:
        """Return the output `[B, H, N, D]` of a global layer; `tokens` makes the `[B, N, C]` that enter, normalised."""


KNOWN_OF_AGGREGATOR = blocks.OF_COMPILE | (
    {"camera_token", "register_token", "patch_embed", "frame_blocks", "global_blocks", "rope"}
    | {"_resnet_mean", "_resnet_std", "position_getter"}
)
KNOWN_OF_DINOV2 = blocks.OF_COMPILE | (
    {"cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed", "blocks", "norm", "head"}
)
"""What is read, and what has no effect: names of what modules may hold, beside settings that a verification compares.

A gate of 0 has an effect once weights are loaded into it, and an object can be changed from inside.
"""


def tokens_of_frame(aggregator: Any, images: Tensor) -> int:
    """Return about how many tokens a frame has: with patches of 14 pixels if the aggregator does not say."""
    return (
        aggregator.patch_start_idx + images.shape[-2] * images.shape[-1] // getattr(aggregator, "patch_size", 14) ** 2
    )


def obstacle(aggregator: Any) -> str | None:
    """Return why a module is not an aggregator that `aggregate` can run, or None if it is."""
    name = type(aggregator).__name__
    required = [
        parameter.name
        for parameter in list(inspect.signature(type(aggregator).forward).parameters.values())[1:]
        if parameter.default is parameter.empty
    ]
    if required != ["images"]:
        return f"the forward of {name} takes {', '.join(required)}"
    for token, count in (("camera_token", 1), ("register_token", None)):
        parameter = getattr(aggregator, token, None)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 4 or parameter.shape[:2] != (1, 2):
            return f"{name}.{token} is not a parameter [1, 2, R, C]"
        if count is not None and parameter.shape[2] != count:
            return f"{name}.{token} holds {parameter.shape[2]} tokens, not {count}"
    if getattr(aggregator, "aa_order", None) != ["frame", "global"] or getattr(aggregator, "aa_block_size", None) != 1:
        return f"{name} does not alternate one frame block with one global block (aa_order, aa_block_size)"
    if not all(
        isinstance(getattr(aggregator, statistic, None), Tensor) for statistic in ("_resnet_mean", "_resnet_std")
    ):
        return f"{name} has no _resnet_mean and _resnet_std"
    if not isinstance(getattr(aggregator, "patch_embed", None), nn.Module):
        return f"{name} has no patch_embed"
    if len(aggregator.frame_blocks) != len(aggregator.global_blocks):
        return (
            f"{name} has {len(aggregator.frame_blocks)} frame blocks and {len(aggregator.global_blocks)} global blocks"
        )
    if aggregator.patch_start_idx != 1 + aggregator.register_token.shape[2]:
        return f"patch_start_idx of {name} is not the number of its special tokens"
    if (unknown := stranger(aggregator, KNOWN_OF_AGGREGATOR, is_setting)) is not None:
        return f"{name} holds {unknown}, which the fused forward does not know"
    for block in (*aggregator.frame_blocks, *aggregator.global_blocks):
        if (reason := blocks.obstacle(block)) is not None:
            return f"{type(block).__name__}: {reason}"
    return None


class ReadyAggregator:
    """What `aggregate` reads of an aggregator for which `obstacle` is None, as long as nothing in it is replaced.

    Args:
        aggregator: The aggregator.

    Attributes:
        module: The aggregator.
        encoder_blocks: The blocks of its encoder, if this is a DINOv2 whose blocks can be fused.
        layers: The frame block and the global block of each layer.
    """

    def __init__(self, aggregator: Any) -> None:
        self.module, encoder = aggregator, aggregator.patch_embed
        self.encoder_blocks: list[blocks.ReadyBlock] | None = None
        if _is_dinov2(encoder):
            self.encoder_blocks = list(map(blocks.ReadyBlock, encoder.blocks))
        pairs = (aggregator.frame_blocks, aggregator.global_blocks)
        self.layers = list(zip(*(map(blocks.ReadyBlock, each) for each in pairs), strict=True))


def aggregate(
    ready: ReadyAggregator,
    images: Tensor,  # [B, S, 3, H, W]
    outputs: LayerOutputs,
    *,
    attend: GlobalAttention,
    attend_within_frames: blocks.AttendFunction,
    tokens_together: int,
    dtype: torch.dtype | None = None,
    reference: bool = True,
) -> None:
    """Run an aggregator and keep its layers' outputs.

    Args:
        ready: Whose parameters are used; nothing is written to them.
        images: RGB in [0, 1], H and W multiples of the patch size.
        outputs: Where the outputs of the layers go.
        attend: The attention of the global layers.
        attend_within_frames: The attention of all other blocks.
        tokens_together: Tokens that the MLP of a block takes at a time; the patch embedding takes images of about as
            many. The results are the same.
        dtype: Dtype of the residual stream; None for the model's own.
        reference: Whether frame 0 of each sample is the reference frame; if not, none of these frames is.
    """
    B, S, _, H, W = images.shape
    every, frames = S if reference else None, images.flatten(0, 1)
    tokens = _embed(ready, frames, every, attend_within_frames, tokens_together, dtype)  # [B S, P, C]
    P, C = tokens.shape[1:]
    positions = _positions(ready.module, H, W, tokens.device)  # [P, 2]
    # Whole, as every block would copy them otherwise.
    within = None if positions is None else positions.repeat(B * S, 1, 1)
    across = None if within is None else within.view(B, S * P, 2)
    for layer, (frame_block, global_block) in enumerate(ready.layers):
        tokens = blocks.run(
            frame_block, tokens.view(B * S, P, C), within, attend_within_frames, dtype, tokens_together
        ).view(B, S, P, C)
        outputs.keep(layer, tokens)
        tokens = blocks.run(
            global_block,
            tokens.view(B, S * P, C),
            across,
            # Made in place, so that nothing holds these tokens once this call has returned.
            partial(
                attend, layer, tokens=partial(layer_norm, tokens.view(B, S * P, C), global_block.norm1, torch.float32)
            ),
            dtype,
            tokens_together,
        ).view(B, S, P, C)
        outputs.keep(layer, tokens)
    outputs.settle()


def launches(aggregator: Any, x: Tensor, dtype: torch.dtype | None) -> Iterator[partial[Any]]:
    """Yield calls of the operations that `aggregate` makes, with tokens x `[1, N, C]`, so that kernels are compiled."""
    encoder = aggregator.patch_embed
    if _is_dinov2(encoder):
        embedded = x.to(encoder.norm.weight.dtype)
        yield from blocks.launches(encoder.blocks[0], embedded, None)
        yield partial(layer_norm, embedded, encoder.norm, torch.promote_types(embedded.dtype, torch.float32))
    for block in (aggregator.frame_blocks[0], aggregator.global_blocks[0]):
        yield from blocks.launches(block, x, dtype)


def _embed(
    ready: ReadyAggregator,
    images: Tensor,  # [B S, 3, H, W]
    every: int | None,
    attend: blocks.AttendFunction,
    tokens_together: int,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the tokens `[B S, P, C]` that enter the first block; frame 0 of `every` so many is a reference frame."""
    aggregator = ready.module
    mean, deviation = aggregator._resnet_mean[0], aggregator._resnet_std[0]
    special = torch.cat([aggregator.camera_token, aggregator.register_token], 2)[0]  # [2, R, C]
    count = special.shape[1]
    tokens: Tensor | None = None
    images_together = max(1, tokens_together // tokens_of_frame(aggregator, images))
    for start in range(0, len(images), images_together):
        some = (images[start : start + images_together] - mean) / deviation
        patches = _patch_tokens(ready, some, attend, tokens_together)
        if tokens is None:
            kind = torch.promote_types(special.dtype, patches.dtype) if dtype is None else dtype
            shape = (len(images), count + patches.shape[1], patches.shape[2])
            tokens = torch.empty(shape, dtype=kind, device=patches.device)
            tokens[:, :count] = special[1]
            if every is not None:
                tokens[::every, :count] = special[0]
        tokens[start : start + len(some), count:] = patches
    assert tokens is not None
    return tokens


def _patch_tokens(
    ready: ReadyAggregator, images: Tensor, attend: blocks.AttendFunction, tokens_together: int
) -> Tensor:
    """Return the patch tokens `[B S, P', C]` of normalised images, DINOv2's by fused blocks."""
    encoder = ready.module.patch_embed
    if ready.encoder_blocks is None:
        embedded = encoder(images)
        return embedded["x_norm_patchtokens"] if isinstance(embedded, dict) else embedded
    x = encoder.prepare_tokens_with_masks(images)
    for block in ready.encoder_blocks:
        x = blocks.run(block, x, None, attend, None, tokens_together)
    patches = x[:, 1 + encoder.num_register_tokens :]
    return layer_norm(patches, encoder.norm, torch.promote_types(x.dtype, torch.float32))


def _is_dinov2(encoder: Any) -> bool:
    """Whether an encoder is a DINOv2 (arXiv 2304.07193) whose blocks can be fused."""
    layers = getattr(encoder, "blocks", None)
    return (
        callable(getattr(encoder, "prepare_tokens_with_masks", None))
        and isinstance(getattr(encoder, "num_register_tokens", None), int)
        and type(getattr(encoder, "norm", None)) is nn.LayerNorm
        and stranger(encoder, KNOWN_OF_DINOV2, is_setting) is None
        and isinstance(layers, nn.ModuleList)
        and all(blocks.obstacle(block) is None for block in layers)
    )


def _positions(aggregator: Any, height: int, width: int, device: torch.device) -> Tensor | None:
    """Return the positions (row, column) of a frame's tokens `[P, 2]`, patches from (1, 1); None without rotation."""
    if getattr(aggregator, "rope", None) is None:
        return None
    rows, columns = height // aggregator.patch_size, width // aggregator.patch_size
    grid = torch.cartesian_prod(torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device))
    return F.pad(grid, (0, 0, aggregator.patch_start_idx, 0))
