"""What a scene must give: the joint forward of all frames, all attention across frames closed over a core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ClosedCore(TorchFunctionMode):
    """Masks every attention call of one sequence: frames of the core see the core, others the core and themselves.

    All also see some frames at a stride, but for what they see in full.

    Args:
        frames: Frames of the sequence.
        core: The core.
        trailing: Tokens after all frames, which belong to it.
        causal: Whether frames see earlier ones alone.
        coarse: The frames that are seen at a stride.
        weights: For how many tokens each token of such a frame counts, 0 where it is not seen. In attention over fewer
            tokens of a frame, special ones, each counts for itself.
    """

    def __init__(
        self,
        frames: int,
        core: Sequence[int],
        trailing: int = 0,
        causal: bool = False,
        coarse: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.frames, self.core, self.trailing, self.weights = frames, core, trailing, torch.tensor(weights)
        self.full = torch.eye(frames, dtype=torch.bool)
        self.full[:, list(core)] = True
        if causal:
            self.full &= torch.ones(frames, frames).tril().bool()
        self.coarse = torch.zeros(frames, frames, dtype=torch.bool)
        self.coarse[:, list(coarse)] = True
        self.coarse &= ~self.full

    def mask(self, tokens: int) -> Tensor:
        """What is added to scores `[N, N]`: the logarithm of how many tokens a key counts for."""
        per_frame, trailing = divmod(tokens, self.frames)
        assert trailing in (0, self.trailing)
        frame = torch.arange(self.frames).repeat_interleave(per_frame)
        weights = self.weights if per_frame == len(self.weights) else torch.ones(per_frame)
        seen = self.full[frame][:, frame] + self.coarse[frame][:, frame] * weights.double().repeat(self.frames)
        if trailing:  # one frame more of the core
            seen = F.pad(seen, (0, trailing, 0, trailing), value=1)
            seen[-trailing:] = seen[self.core[0] * per_frame]
        return seen.log()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].shape[0] == 1:
            kwargs["attn_mask"] = self.mask(args[0].shape[2]).to(args[0].dtype)
        return func(*args, **kwargs)


def joint(
    model: nn.Module,
    images: Tensor,
    core: Sequence[int],
    *,
    trailing: int = 0,
    causal: bool = False,
    coarse: Sequence[int] = (),
    weights: Sequence[float] = (),
    **options,
):
    """Run a model on all frames `[S, 3, H, W]`, the first frame of the core first, and give outputs in their order."""
    order = [core[0], *(frame for frame in range(len(images)) if frame != core[0])]
    places, at_a_stride = ([order.index(frame) for frame in some] for some in (core, coarse))
    with torch.no_grad(), ClosedCore(len(images), places, trailing, causal, at_a_stride, weights):
        result = model(images[order][None], **options)
    named = {"output": result} if isinstance(result, Tensor) else result
    back = [order.index(frame) for frame in range(len(images))]
    return {name: tensor[0][back] for name, tensor in named.items() if isinstance(tensor, Tensor) and name != "images"}
