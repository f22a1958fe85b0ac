"""Layer outputs that no head reads are never made.

VGGT's aggregator keeps the tokens of all its layers, two of them side by side, and its heads read four. Here the others
become holes in the list, so that the heads' indices still hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STAGES = ("_process_frame_attention", "_process_global_attention")
"""Methods of an aggregator that each return tokens, the index of the next block, and the outputs to keep."""

DPT_ARGUMENTS = ("self", "aggregated_tokens_list", "images", "patch_start_idx", "frames_chunk_size")
CAMERA_ARGUMENTS = ("self", "aggregated_tokens_list", "num_iterations")
"""What the forwards of VGGT's heads take."""

STAGE_ARGUMENTS = ("self", "tokens", "B", "S", "P", "C")
"""What both take first; then comes the index of the block, then positions."""


def are_upstreams(aggregator: type) -> bool:
    """Whether a class runs its blocks by upstream's two stages, so that what they return can be changed."""
    arguments = [
        tuple(inspect.signature(stage).parameters) if callable(stage := getattr(aggregator, name, None)) else ()
        for name in STAGES
    ]
    return all(len(names) == 8 and names[:6] == STAGE_ARGUMENTS and names[7] == "pos" for names in arguments)


class Hole:
    """Stands in a list of layer outputs where one was not kept; whoever reads it is told so."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Hole:
        """Joined with another hole it stays one: what the aggregator does to make a layer's output."""
        given = [part for each in (*args, *(kwargs or {}).values()) for part in (each if _is_list(each) else [each])]
        hole = next(part for part in given if isinstance(part, cls))
        if func is not torch.cat or any(isinstance(part, Tensor) for part in given):
            hole._refuse()
        return hole

    def __getitem__(self, index: object) -> Any:
        """Refuse."""
        self._refuse()

    def __getattr__(self, name: str) -> Any:
        """Refuse."""
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> Any:
        raise RuntimeError(
            f"the output of layer {self.layer} was not kept, as no head of the patched model reads it; "
            'patch(model, outputs="all") keeps every layer'
        )


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def layers_read(model: nn.Module, depth: int) -> frozenset[int] | None:
    """Return which of `depth` layers the heads of a model read; None if it has no head that says so.

    Heads say so by `intermediate_layer_idx`, as DPT heads do; camera heads read the last.
    """
    stated = [indices for module in model.modules() if (indices := getattr(module, "intermediate_layer_idx", None))]
    if not stated:
        return None
    return frozenset(index % depth for indices in stated for index in indices) | {depth - 1}


def reads(head: nn.Module) -> bool:
    """Whether a head reads layer outputs as VGGT's DPT and camera heads do."""
    return tuple(inspect.signature(type(head).forward).parameters) in (DPT_ARGUMENTS, CAMERA_ARGUMENTS)


def widened(original: Callable[..., Any], head: Any, layers: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Run a head on layer outputs that are not float32: some frames at a time in float32, or the camera tokens alone.

    Args:
        original: The head's forward.
        head: A head for which `reads` is true.
        layers: Outputs `[B, S, P, C]` of the layers, or holes.
        args: For a DPT head images `[B, S, 3, H, W]`, first patch token and frames at a time, as it takes them.
        kwargs: The same by name; for a camera head its number of iterations.
    """
    if not hasattr(head, "intermediate_layer_idx"):
        return original([*layers[:-1], layers[-1][:, :, :1].float()], *args, **kwargs)
    bound = inspect.signature(type(head).forward).bind(head, layers, *args, **kwargs)
    bound.apply_defaults()
    _, _, images, first_patch, at_once = bound.arguments.values()
    parts = []
    for start in range(0, images.shape[1], at_once or images.shape[1]):
        frames = slice(start, start + (at_once or images.shape[1]))
        some = [
            layer[:, frames].float() if i in head.intermediate_layer_idx else layer for i, layer in enumerate(layers)
        ]
        parts.append(original(some, images[:, frames].contiguous(), first_patch, None))
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def kept(outputs: list[Tensor], after: int, layers: frozenset[int]) -> list[Tensor | Hole]:
    """Return a stage's outputs, with holes for layers that are not in `layers`; `after` is the next block's index."""
    first = after - len(outputs)
    return [output if first + i in layers else Hole(first + i) for i, output in enumerate(outputs)]
