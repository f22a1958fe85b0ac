"""The table of backends in order of preference, and the choice among them.

A backend is a module as `contract.Backend` states it; adding one is one line in `BACKENDS`. No name of a backend stands
above this folder. Backends never import one another, and what they need beyond torch they import when they first run.
"""

from __future__ import annotations

from typing import cast

import torch

from ..user_warnings import warn
from . import cpu, hopper, metal, reference, triton
from .contract import Backend

BACKENDS: dict[str, Backend] = {
    module.NAME: cast(Backend, module) for module in (hopper, triton, metal, cpu, reference)
}

RENAMED = {"sdpa": reference.NAME}
"""Names that backends had, with those that they have."""


def load(name: str) -> Backend:
    """Return the backend module called `name`; warn if it has another name now.

    Raises:
        ValueError: If there is no such backend.
    """
    if name in RENAMED:
        if not torch.compiler.is_compiling():
            warn(f'backend="{name}" is called "{RENAMED[name]}" now; use that name', DeprecationWarning)
        name = RENAMED[name]
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
    if unnamed:
        for name, backend in BACKENDS.items():
            why[name] = why[name] or backend.TRAITS.unpreferred(device, dtype, head_size)
    return why


def preferred(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return the best backend that runs such q, k, v where none is named, without asking worse ones; or None."""
    for name, backend in BACKENDS.items():
        if (
            backend.unsupported(device, dtype, head_size) is None
            and backend.TRAITS.unpreferred(device, dtype, head_size) is None
        ):
            return name
    return None


def passed_over(device: torch.device, dtype: torch.dtype, head_size: int, chosen: str, named: bool) -> dict[str, str]:
    """Return what would be better than what runs such q, k, v, and why it does not: backends, then the chosen's notes.

    Args:
        device: Of q, k, v.
        dtype: Likewise.
        head_size: D.
        chosen: The backend that runs them.
        named: Whether it was named.
    """
    why = reasons(device, dtype, head_size, unnamed=not named)
    better = list(why)[: list(why).index(chosen)]
    notes = BACKENDS[chosen].TRAITS.notes(dtype)
    return {name: why[name] or f"backend={chosen!r} was asked for" for name in better} | {
        name: reason for name, reason in notes.items() if reason is not None
    }


def faster_than_dense(
    device: torch.device, dtype: torch.dtype, head_size: int, tokens: int, named: str | None = None
) -> str | None:
    """Return the backend that beats PyTorch's attention where every token of a sample sees every other; None if none.

    Args:
        device: Of q, k, v.
        dtype: Likewise.
        head_size: D.
        tokens: Of all samples together.
        named: The one backend that may be returned; by default any.
    """
    for name, backend in BACKENDS.items():
        fewest = backend.TRAITS.beats_dense_from
        wanted = named in (None, name) and fewest is not None and tokens >= fewest
        if wanted and backend.unsupported(device, dtype, head_size) is None:
            return name
    return None
