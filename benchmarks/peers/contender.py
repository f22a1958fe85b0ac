"""What every contender offers, and what several of them ask before they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..cases import Case


@dataclass(frozen=True)
class Contender:
    """One implementation of attention on a case.

    Attributes:
        name: What the command line calls it.
        about: One line on what it does.
        unsupported: `unsupported(case, q)` returns why it cannot run the case for such a q (dtype, device, gradient
            required), or None if it can.
        prepare: `prepare(case, q, k, v)` returns a call without arguments that gives the output `[B, H, N, D]`,
            differentiable in q, k and v if they require it.
        storage: How q, k, v `[B, H, N, D]` should lie in memory, "bhnd" or "bnhd": each contender gets what it likes.
        lse: `lse(case, q, k, v)` returns the log-sum-exp `[B, H, N]` in nats, where the contender offers one.
        variant_of: What the results call it, where that is not its name.
        choices: `choices(dtype)` returns which "softmax" and "gradients" it computes, where its backend has several;
            called inside `chosen()`.
        strides: Whether it can let frames be seen at a stride of their patch grid.
        context: `context()` makes its choice among what its backend has; whoever runs it, forward or backward, does so
            inside `chosen()`, which enters it.
    """

    name: str
    about: str
    unsupported: Callable[[Case, Tensor], str | None]
    prepare: Callable[[Case, Tensor, Tensor, Tensor], Callable[[], Tensor]]
    storage: str = "bhnd"
    lse: Callable[[Case, Tensor, Tensor, Tensor], Tensor] | None = None
    variant_of: str | None = None
    choices: Callable[[torch.dtype], Mapping[str, str]] = lambda dtype: {}
    strides: bool = False
    context: Callable[[], AbstractContextManager[None]] | None = None

    def obstacle(self, case: Case, q: Tensor) -> str | None:
        """Return why it cannot run a case, or None if it can."""
        if case.stride and not self.strides:
            return "it has no frames that are seen at a stride"
        return self.unsupported(case, q)

    def labels(self, dtype: torch.dtype, direction: str) -> dict[str, str | None]:
        """Return what the results say about it: `backend`, and `softmax` and `gradients` where its backend has several.

        There are no gradients in direction "fwd".
        """
        with self.chosen():
            choices = self.choices(dtype)
        return {
            "backend": self.variant_of or self.name,
            "softmax": choices.get("softmax"),
            "gradients": None if direction == "fwd" else choices.get("gradients"),
        }

    def chosen(self) -> AbstractContextManager[None]:
        """Return the context in which it runs as itself, which does nothing where there is no choice."""
        return self.context() if self.context else nullcontext()


@lru_cache
def package(name: str, install: str) -> Any:
    """Return the module called `name`, or the reason why it cannot be imported, which says to install `install`."""
    try:
        return import_module(name)
    except Exception as error:  # a third party's import may fail in any way; the reason is shown, not hidden
        return f"{name} cannot be imported ({type(error).__name__}: {error}); install {install}"


def half_on_cuda(q: Tensor) -> str | None:
    """Return that bfloat16 or float16 on CUDA is needed, where q is something else."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"it needs bfloat16 or float16 on CUDA, got {q.dtype} on {q.device}"


def dense_only(case: Case) -> str | None:
    """Return that the contender has no sparsity, where the case is sparse."""
    return None if case.is_dense else "it has no sparsity; name a dense case"


def frames_only(case: Case) -> str | None:
    """Return that the contender knows whole frames only, where the case has special tokens."""
    return "it has no special tokens, only whole frames" if case.special else None


def one_sequence(case: Case) -> str | None:
    """Return that the contender has no batch axis left, where the case has a batch."""
    return f"it has no batch axis left, so the batch must be 1, got {case.batch}" if case.batch > 1 else None
