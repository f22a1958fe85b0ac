"""Random numbers and constants on one device, without a wait for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Draws:
    """Random numbers of one generator.

    Args:
        seed: Of the generator.
        device: Where the numbers are drawn; another device draws other numbers.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return numbers from `low` to `high`, float32."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Return numbers of mean 0 and deviation 1, float32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from `low` to `high`, which is excluded, int64."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Return booleans that are true with a probability."""
        return self.uniform(0, 1, *shape) < probability

    def choice(self, weights: tuple[float, ...], *shape: int) -> Tensor:
        """Return indices into `weights`, each drawn as often as its weight says, int64."""
        limits = constant(weights, self.device).cumsum(0)
        return torch.bucketize(self.uniform(0, 1, *shape) * limits[-1], limits[:-1], right=True)


def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of constants, copied to the device once: each copy would wait for the device."""
    return _constant(repr(values), values, device, dtype)  # as keys, (0, 1) and (0.0, True) would be the same


def indices(values: tuple, device: torch.device) -> Tensor:
    """Return a tensor of int64 constants, copied to the device once."""
    return constant(values, device, torch.int64)


@functools.cache
def _constant(text: str, values: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype)
