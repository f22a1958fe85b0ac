"""Standing in for the forward of one module, and answering the attention call inside it.

Both act on one instance: its class, its parameters, its hooks and PyTorch's functions stay as they are.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Answering", "StandIn", "uncompiled"]


class StandIn:
    """Stands in for `module.forward`, or another method, on this instance alone, from `install` to `remove`.

    It is an object that holds the module and not a closure around its forward, so a deep copy of the module runs the
    copy's weights and a pickled module comes back with its stand-in.

    Args:
        module: The module whose forward is replaced.
        name: What messages call the module.
        around: Called with this object and the arguments of forward; a method that can be pickled.
        method: What is replaced, if not its forward.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any], method: str = "forward") -> None:
        self.module = module
        self.name = name
        self.around = around
        self.method = method
        # Other tools (offloading hooks) put forwards on instances too, and a patch several; they run inside this one.
        self.replaced: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the module's forward."""
        return self.around(self, *args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run what this object stands in for."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def install(self) -> None:
        """Put this object in the place of the module's method."""
        self.replaced = self.in_place
        self.module.__dict__[self.method] = self

    @property
    def in_place(self) -> Any:
        """What is in the place of the module's method now, or None."""
        return self.module.__dict__.get(self.method)

    def remove(self) -> None:
        """Give the module the method that it had."""
        if self.replaced is None:
            del self.module.__dict__[self.method]
        else:
            self.module.__dict__[self.method] = self.replaced


class Answering(TorchFunctionMode):
    """Inside this context `answer` runs in place of `torch.nn.functional.scaled_dot_product_attention`.

    The mode sees the function however the caller imported it, before autocast casts its arguments, and is off while
    `answer` runs: what `answer` itself calls is PyTorch's.

    Attributes:
        answered: Calls answered so far.
    """

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.answered = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer attention and let every other function pass."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.answered += 1
        return self.answer(*args, **(kwargs or {}))


def uncompiled(*, recursive: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate as torch.compiler.disable does, but import the machinery of torch.compile only where it is in use."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        disabled: list[Callable[..., Any]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, recursive=recursive))
            return disabled[0](*args, **kwargs)

        # Code of its own: torch.compile counts how often it compiles one, and gives up, with a warning, after eight.
        run.__code__ = run.__code__.replace(co_name=function.__name__)
        return functools.wraps(function)(run)

    return decorate
