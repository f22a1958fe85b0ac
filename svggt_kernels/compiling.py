"""What torch.compile leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["uncompiled"]


def uncompiled(*, recursive: bool, reason: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate as torch.compiler.disable does, but import the machinery of torch.compile only where it is in use.

    Args:
        recursive: Whether torch.compile leaves alone what the function calls, too.
        reason: What torch.compile says where it must not leave anything alone (`fullgraph=True`).
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        disabled: list[Callable[..., Any]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, recursive=recursive, reason=reason))
            return disabled[0](*args, **kwargs)

        # Code of its own: torch.compile counts how often it compiles one, and gives up, with a warning, after eight.
        run.__code__ = run.__code__.replace(co_name=function.__name__)
        return functools.wraps(function)(run)

    return decorate
