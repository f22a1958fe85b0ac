"""What a scene must give: the joint forward of all frames, all attention across frames closed over a core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ClosedCore(TorchFunctionMode):
    """Masks every attention call of one sequence: frames of the core see the core, others the core and themselves."""

    def __init__(self, frames: int, core: Sequence[int], trailing: int = 0, causal: bool = False) -> None:
        super().__init__()
        self.frames, self.trailing = frames, trailing
        self.visible = torch.eye(frames, dtype=torch.bool)
        self.visible[:, list(core)] = True
        if causal:
            self.visible &= torch.ones(frames, frames).tril().bool()
        self.in_core = torch.zeros(frames, dtype=torch.bool)
        self.in_core[list(core)] = True

    def mask(self, tokens: int) -> Tensor:
        trailing = tokens % self.frames
        assert trailing in (0, self.trailing)
        frame = torch.arange(self.frames).repeat_interleave(tokens // self.frames)
        mask = self.visible[frame][:, frame]
        if trailing:  # one frame more of the core
            mask = F.pad(mask, (0, trailing, 0, trailing), value=True)
            mask[-trailing:, :-trailing] = self.in_core[frame]
        return mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].shape[0] == 1:
            kwargs["attn_mask"] = self.mask(args[0].shape[2])
        return func(*args, **kwargs)


def joint(model: nn.Module, images: Tensor, core: Sequence[int], *, trailing: int = 0, causal: bool = False, **options):
    """Run a model on all frames `[S, 3, H, W]`, the first frame of the core first, and give outputs in their order."""
    order = [core[0], *(frame for frame in range(len(images)) if frame != core[0])]
    places = [order.index(frame) for frame in core]
    with torch.no_grad(), ClosedCore(len(images), places, trailing, causal):
        result = model(images[order][None], **options)
    named = {"output": result} if isinstance(result, Tensor) else result
    back = [order.index(frame) for frame in range(len(images))]
    return {name: tensor[0][back] for name, tensor in named.items() if isinstance(tensor, Tensor) and name != "images"}
