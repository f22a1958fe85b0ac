"""The one rule by which a block or head is proven: its fused run is no farther from float64 than its own forward.

The module's own forward in float64, autocast off, is exact. The error of the fused run may be at most `FACTOR` times
that of the module's own forward in the same dtype. So no size of an error is assumed, and what TF32 or bfloat16 does to
both is allowed to both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

FACTOR = 2
"""How many times as large as that of the module's own forward the error of the fused run may be."""

NEGLIGIBLE = 2
"""Roundings of the result, in float32, that the fused run may differ by in any case."""

NEGLIGIBLE_OF_FLOAT64 = 2**16
"""The same in float64, where nothing better says how large the error of the module's own forward is."""

DOUBT = 0.02
"""What a forward adds must agree that well in float32 and in float64, or it is random, or another one in float64."""

DIFFERENT = "its forward computes something else than the fused {}"
UNFINISHED = "its output is not finite, which proves nothing"
RANDOM = "its forward in float64 is another than in float32, or it is random, so that nothing can be proven"
CAPTURED = "it was not proven before this CUDA graph was captured: run the model once, then capture"
NO_MEMORY = "there was no memory to prove it"

PASSING = frozenset({UNFINISHED, CAPTURED, NO_MEMORY})
"""Reasons of one call, which say nothing about the next."""


def disagreement(exact: Tensor, own: Tensor, fused: Tensor, size: Tensor, dtype: torch.dtype, what: str) -> str | None:
    """Return what speaks against a fused run, or None.

    Args:
        exact: The result of the module's own forward in float64.
        own: Its result as it runs.
        fused: The result of the fused run, of the same shape.
        size: Norm of what the module contributes to the result.
        dtype: In which products are computed.
        what: What was fused, for the message.
    """
    if own.dtype != fused.dtype or own.shape != fused.shape:
        return DIFFERENT.format(what)
    norms = [(own.double() - exact).norm(), (fused.double() - exact).norm(), exact.norm(), size]
    own_error, error, whole, contributed = torch.stack(norms).tolist()
    if not own_error < float("inf") or not whole < float("inf"):
        return UNFINISHED
    is_wide = dtype in (torch.float32, torch.float64)
    roundings = NEGLIGIBLE_OF_FLOAT64 if dtype == torch.float64 else NEGLIGIBLE
    negligible = roundings * torch.finfo(dtype if is_wide else torch.float32).eps * whole
    if is_wide and own_error > DOUBT * contributed + negligible:
        return RANDOM
    return None if error <= FACTOR * own_error + negligible else DIFFERENT.format(what)


class Proofs:
    """What was proven, and what was not and why."""

    def __init__(self) -> None:
        self._reasons: dict[Hashable, str | None] = {}

    def __reduce__(self) -> tuple[type[Proofs], tuple[()]]:
        # A copy proves its own modules.
        return Proofs, ()

    def reason(self, key: Hashable, prove: Callable[[], str | None]) -> str | None:
        """Return why modules must run as they are, or None; `prove` says so, once for each key.

        Args:
            key: Everything that the answer depends on.
            prove: Compares both ways to run the module. What it raises is a reason too.
        """
        if key not in self._reasons:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return CAPTURED
            try:
                reason = prove()
            except torch.OutOfMemoryError:
                reason = NO_MEMORY
            except Exception as error:  # a forward of others may raise anything on a copy
                reason = f"it failed: {error}"
            if reason in PASSING:
                return reason
            self._reasons[key] = reason
        return self._reasons[key]
