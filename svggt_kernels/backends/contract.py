"""What a backend is: a module with one kernel family, and what the rest of the package may ask it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..coarse import CoarseLayout
from ..layout import BlockLayout

_IN_PACKAGE = Path(__file__).parents[1] / "csrc"
_IN_CHECKOUT = Path(__file__).parents[2] / "csrc"
SOURCES = _IN_PACKAGE if _IN_PACKAGE.is_dir() else _IN_CHECKOUT
"""The sources of kernels that are compiled at run time: inside the installed package, or at the top of a checkout."""


@dataclass(frozen=True)
class Traits:
    """What backends may differ in; most need only the defaults.

    Attributes:
        saves_lse: Whether `backward` reads the LSE.
        beats_dense_from: The fewest tokens, of all samples together, from which the backend is faster than PyTorch's
            attention even where every token of a sample sees every other; None if it never is.
        unpreferred: `unpreferred(device, dtype, head_size)` returns why a backend that can run such q, k, v is passed
            over where nobody names it, or None.
        notes: `notes(dtype)` returns what the backend uses of this machine for such inputs, with None, and what better
            the machine has, with why it is not used. Asked only where the backend can run.
        trials: `trials(device)` returns what people without such a device want to know of the kernels there, as plain
            data; empty where it is known.
        choices: `choices(dtype)` returns which of several ways to compute the backend takes now, by what they concern.
        coarse_tables: `coarse_tables(layout, dtype, head_size)` returns tables of a CoarseLayout that `forward` walks
            in one pass, weights and all; None where a backend takes the parts of such a layout one by one. With
            gradients all do.
        variants: Contexts in which it takes another way than by default, by name.
    """

    saves_lse: bool = True
    beats_dense_from: int | None = None
    unpreferred: Callable[[torch.device, torch.dtype, int], str | None] = lambda device, dtype, head_size: None
    notes: Callable[[torch.dtype], Mapping[str, str | None]] = lambda dtype: {}
    trials: Callable[[torch.device], list[dict[str, object]]] = lambda device: []
    choices: Callable[[torch.dtype], Mapping[str, str]] = lambda dtype: {}
    coarse_tables: Callable[[CoarseLayout, torch.dtype, int], list[Tensor]] | None = None
    variants: Mapping[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)


def unfit(
    dtype: torch.dtype, dtypes: Sequence[torch.dtype], head_size: int = 0, head_sizes: Sequence[int] = (0,)
) -> str | None:
    """Return why a backend that takes these dtypes and head sizes, by default any, cannot take inputs, or None."""
    if dtype not in dtypes:
        names = [str(known).removeprefix("torch.") for known in dtypes]
        return f"it takes {', '.join(names[:-1])} and {names[-1]}, got {dtype}"
    if head_size not in head_sizes:
        return f"it takes head sizes {', '.join(map(str, head_sizes))}, got {head_size}"
    return None


def readable(x: Tensor) -> Tensor:
    """Return x, copied if TMA cannot read it: unit last stride, base and other strides 16-byte aligned."""
    unit = 16 // x.element_size()
    aligned = all(n == 1 or (s > 0 and s % unit == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    as_it_is = x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0
    return x if as_it_is else x.clone(memory_format=torch.contiguous_format)


class Backend(Protocol):
    """What a backend module offers."""

    NAME: str
    TRAITS: Traits

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
