"""VGGT's heads at inference: they read what `LayerOutputs` kept, DPT heads some frames at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import dpt
from .layer_outputs import LayerOutputs

LAYERS = "aggregated_tokens_list"
DPT_ARGUMENTS = [LAYERS, "images", "patch_start_idx", "frames_chunk_size"]


def is_dpt_head(head: nn.Module) -> bool:
    """Whether a module reads layer outputs as VGGT's DPT heads do, each frame by itself."""
    return hasattr(head, "intermediate_layer_idx") and _arguments(head) == DPT_ARGUMENTS


def is_camera_head(head: nn.Module) -> bool:
    """Whether a module reads layer outputs as VGGT's camera head does: the camera tokens of the last layer."""
    return _arguments(head) == [LAYERS, "num_iterations"]


def _arguments(head: nn.Module) -> list[str]:
    return list(inspect.signature(type(head).forward).parameters)[1:]


def layers_read(model: nn.Module, depth: int) -> tuple[int, ...] | None:
    """Return which of `depth` layers the heads of a model read, in order; None if it has no head that says so.

    Heads say so by `intermediate_layer_idx`, as DPT heads do; camera heads read the last.
    """
    stated = [indices for module in model.modules() if (indices := getattr(module, "intermediate_layer_idx", None))]
    if not stated:
        return None
    return tuple(sorted({index % depth for indices in stated for index in indices} | {depth - 1}))


def run_dpt_head(
    run: Callable[[dict[int, Tensor], Tensor, int], Any],
    layers: Sequence[int],
    outputs: LayerOutputs,
    images: Tensor,
    first_patch: int,
    frames: int,
) -> Any:
    """Run a DPT head some frames at a time.

    Args:
        run: A `ReadyHead`, or `run_original` for a head and a depth.
        layers: The layers that it reads.
        outputs: The layer outputs.
        images: `[B, S, 3, H, W]`.
        first_patch: The first token of a frame that is a patch.
        frames: Frames that run together.
    """
    count = images.shape[1]
    parts = [slice(start, min(start + frames, count)) for start in range(0, count, frames)]
    whole: tuple[Tensor, ...] = ()
    for part, tokens in zip(parts, outputs.frames(layers, parts), strict=True):
        result = run(tokens, images[:, part].contiguous(), first_patch)
        tokens.clear()
        results = tensors(result)
        whole = whole or tuple(each.new_empty(each.shape[0], count, *each.shape[2:]) for each in results)
        for target, each in zip(whole, results, strict=True):
            target[:, part] = each
    return whole[0] if isinstance(result, Tensor) else whole


def run_original(
    original: Callable[..., Any], depth: int, tokens: dict[int, Tensor], images: Tensor, first_patch: int
) -> Any:
    """Run the forward of a DPT head, `original`, on the outputs of those of `depth` layers that it reads."""
    return original(as_list(tokens, depth), images, first_patch, images.shape[1])


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors that a head returns."""
    return [result] if isinstance(result, Tensor) else list(result)


def as_list(tokens: dict[int, Tensor], depth: int) -> list[Tensor | None]:
    """Return the outputs of layers as the list that a head's own forward indexes."""
    by_layer = {index % depth: each for index, each in tokens.items()}
    return [by_layer.get(layer) for layer in range(depth)]


def run_fused(head: Any, layers: Sequence[Tensor], images: Tensor, first_patch: int) -> Any:
    """Run a head, for which `dpt.obstacle` is None, fused, in the dtype of the tokens that it is given."""
    dtype = next(layer.dtype for layer in layers if layer is not None)
    tables = dpt.position_tables(head, images.shape[-2:], head.norm.weight.to(dtype))
    return dpt.ReadyHead(head, tables, dtype)(layers, images, first_patch)


def compared(result: Any) -> list[Tensor]:
    """Return what a DPT head returns, compressed by the logarithm: its values may differ by orders of magnitude."""
    return [each.sign() * each.abs().log1p() for each in tensors(result)]


def mismatch(head: Any, outputs: LayerOutputs, images: Tensor, first_patch: int) -> str | None:
    """Return what keeps a head, for which `dpt.obstacle` is None, from running fused on what it is given, or None."""
    weight = head.norm.weight
    if images.device != weight.device:
        return f"the images are on {images.device}, its weights on {weight.device}"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    dtypes = {parameter.dtype for parameter in head.parameters()}
    if dtypes not in ({torch.float32}, {torch.float64}):
        return f"its weights are {', '.join(sorted(map(str, dtypes)))}, not torch.float32 or torch.float64"
    rows, columns = (side // head.patch_size for side in images.shape[-2:])
    shape = (*images.shape[:2], first_patch + rows * columns, len(weight))
    if any(outputs.shape(layer) != shape for layer in head.intermediate_layer_idx):
        return "the layer outputs are not one token for each patch of the images"
    if outputs.read_dtype != weight.dtype:
        return f"the layer outputs are {outputs.read_dtype}, its weights {weight.dtype}"
    return None
