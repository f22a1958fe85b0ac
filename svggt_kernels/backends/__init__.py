"""The table of backends in order of preference, and the choice among them.

A backend is a module with one kernel family: `NAME`, `unsupported`, `tables`, `forward` and `backward`, as `Backend`
states them; adding one is one line in `BACKENDS`. They never import one another, and what they need beyond torch they
import when they first run.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from ..layout import BlockLayout
from . import (
    cpu,
    hopper,
    metal,
    triton,
)
from . import (
    reference as sdpa,
)


class Backend(Protocol):
    """What a backend module offers."""

    NAME: str
    SAVES_LSE: bool  # whether `backward` reads the LSE

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Return why this backend cannot run such q, k, v, as the end of "... cannot run this: "; None if it can."""

    def tables(self, layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
        """Return the tables of the layout that `forward` walks."""

    def backward_tables(self, layout: BlockLayout, dtype: torch.dtype, head_size: int) -> list[Tensor]:
        """Return the tables of the layout that `backward` walks."""

    def forward(
        self,
        q: Tensor,  # [B, H, N, D]
        k: Tensor,  # [B, H, N', D]
        v: Tensor,  # [B, H, N', D]
        tables: list[Tensor],
        scale: float,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return out `[B, H, N, D]`, laid out as `[B, N, H, D]`, and LSE, float32 `[B, H, N]` (`[0]` if unneeded)."""

    def backward(
        self,
        grad_out: Tensor,  # [B, H, N, D]
        grad_lse: Tensor | None,  # [B, H, N]
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tables: list[Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, `[B, H, N, D]`, laid out as `[B, N, H, D]`."""


BACKENDS: dict[str, Backend] = {module.NAME: cast(Backend, module) for module in (hopper, triton, metal, cpu, sdpa)}


def load(name: str) -> Backend:
    """Return the backend module called `name`.

    Raises:
        ValueError: If there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    return BACKENDS[name]


def reasons(
    device: torch.device, dtype: torch.dtype, head_size: int, *, unnamed: bool = False
) -> dict[str, str | None]:
    """Return for every backend, best first, why it cannot run such q, k, v; None where it can.

    With `unnamed` also why one that can run is passed over where no backend is named.
    """
    why = {name: backend.unsupported(device, dtype, head_size) for name, backend in BACKENDS.items()}
    if unnamed and why[metal.NAME] is None:
        why[metal.NAME] = metal.slower(device, dtype, head_size)
    return why
