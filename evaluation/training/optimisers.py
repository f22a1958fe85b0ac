"""Muon for the matrices of the blocks, AdamW for everything else, and a running mean of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MATRICES = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """Momentum whose matrices are orthogonalised before they are applied (Jordan et al., "Muon", 2024).

    Matrices of one shape are stepped together. Queries, keys and values are three matrices.

    Args:
        parameters: Matrices.
        momentum: Of the running mean of gradients, which is looked ahead (Nesterov).
        decay: Weight decay per learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.means = [torch.stack([p.detach() for p in group]).zero_() for group in self.groups.values()]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients with a learning rate."""
        for (rows, columns), group, mean in zip(self.groups, self.groups.values(), self.means, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            mean.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp(mean, self.momentum)
            if rows == 3 * columns:
                update = orthogonalised(update.unflatten(1, (3, columns))).flatten(1, 2)
            else:
                update = orthogonalised(update) * math.sqrt(max(1, rows / columns))
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate)

    def state(self) -> list[Tensor]:
        """Return what a checkpoint must hold."""
        return self.means

    def load(self, state: list[Tensor]) -> None:
        """Continue from what `state` returned."""
        for mine, loaded in zip(self.means, state, strict=True):
            mine.copy_(loaded)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return about the nearest matrices `[..., M, N]` whose singular values are all 1, by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Optimiser:
    """Steps a network; a step whose gradients are not finite counts as one without gradients.

    Args:
        network: What to train.
        matrix_rate: Learning rate of Muon, for the matrices of the blocks.
        rate: Learning rate of AdamW, for all else.
        largest: Norm to which gradients are clipped.
    """

    def __init__(self, network: nn.Module, matrix_rate: float, rate: float, largest: float = 1.0) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in network.named_parameters():
            (matrices if name.endswith(MATRICES) else others).append(parameter)
        self.matrix_rate, self.rate, self.largest = matrix_rate, rate, largest
        self.parameters = [*matrices, *others]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    @torch.no_grad()
    def step(self, factor: float) -> Tensor:
        """Apply the gradients with `factor` times the learning rates, clear them, and return their norm."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.nan_to_num_(0.0, 0.0, 0.0)
        scale = torch.where(norm.isfinite(), (self.largest / (norm + 1e-6)).clamp(max=1.0), 0.0)
        torch._foreach_mul_(gradients, scale)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * factor
        self.adam.step()
        self.muon.step(self.matrix_rate * factor)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.adam.load_state_dict(state["adam"])
        self.muon.load(state["muon"])


@torch.no_grad()
def average(mean: nn.Module, model: nn.Module, step: int, longest: float = 0.9985) -> None:
    """Move the running mean of a model's weights towards the weights; the mean is short at first."""
    share = 1 - min(longest, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), share)
