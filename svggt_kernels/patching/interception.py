"""Standing in for the forward of one module, and answering the attention call inside it.

Both act on one instance: its class, its parameters and PyTorch's functions stay as they are.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..compiling import uncompiled

ATTENTION = torch._C._nn.scaled_dot_product_attention
"""PyTorch's own, whatever another tool has put in its place in torch.nn.functional."""


class StandIn:
    """Stands in for `module.forward` on this instance alone, from `install` to `remove`.

    It is an object that holds the module and not a closure around its forward, so a deep copy of the module runs the
    copy's weights and a pickled module comes back with its stand-in. A copy of the module's `__dict__` holds the same
    stand-in, which would run the weights of the module; a hook on the forward refuses that.

    Args:
        module: The module whose forward is replaced.
        name: What messages call the module.
        around: Called with this object and the arguments of forward; a method that can be pickled.

    Attributes:
        passes: The thread whose calls go to what it stands in for, so that others may stand in around it; or None.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module = module
        self.name = name
        self.around = around
        # Other tools (offloading hooks) put forwards on instances too, and a patch several; they run inside this one.
        self.replaced: Callable[..., Any] | None = None
        self.passes: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the module's forward.

        Raises:
            RuntimeError: If torch.jit.trace or torch.export records it.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                f"{self.name} belongs to a patched model, which torch.jit.trace and torch.export cannot record: what "
                "is computed follows the graph of each forward; call undo() on the patch first"
            )
        if self.passes_here:
            return self.original(*args, **kwargs)
        return self.around(self, *args, **kwargs)

    @property
    def passes_here(self) -> bool:
        """Whether it passes on the calls of this thread."""
        return self.passes is not None and self.passes == _this_thread()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run what this object stands in for."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def install(self) -> None:
        """Put this object in the place of the module's forward."""
        self.replaced = self.in_place
        self.module.__dict__["forward"] = self
        self.module.register_forward_pre_hook(self.refuse_copies, prepend=True)

    @property
    def in_place(self) -> Any:
        """What is in the place of the module's forward now, or None."""
        return self.module.__dict__.get("forward")

    def remove(self) -> None:
        """Give the module the forward that it had."""
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.replaced
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook == self.refuse_copies]:
            del hooks[key]

    def refuse_copies(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Run before the forward of whichever module holds this object.

        Raises:
            RuntimeError: If that is another than the module it was made for.
        """
        if not torch.compiler.is_compiling() and module is not self.module:
            raise RuntimeError(
                f"{self.name} was called through a copy that shares the attributes of a patched module "
                "(nn.DataParallel and copy.copy make such), and would run the weights of the original; "
                "copy before patch(), or use copy.deepcopy(model), which is patched by itself"
            )


class StandIns:
    """All that stands in for modules of one model, in the order of installation: of several for a module the last runs.

    Args:
        sites: Modules, their names and what runs around their forwards.
    """

    def __init__(self, sites: Iterable[tuple[nn.Module, str, Callable[..., Any]]]) -> None:
        self._all = [StandIn(module, name, around) for module, name, around in sites]

    def require_in_place(self, then: str) -> None:
        """Raise if something else has replaced the forward of a module since the installation.

        Args:
            then: What can be done when that is taken out.

        Raises:
            RuntimeError: If it has.
        """
        covered = [stand_in.name for stand_in in self._all if stand_in.in_place not in self._all]
        if covered:
            raise RuntimeError(
                f"the forward of {', '.join(covered)} was replaced after patch(model); take that out first, then {then}"
            )

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside this context they pass on the calls of this thread, and others may stand in around them."""
        self.require_in_place("call the model")
        for stand_in in self._all:
            stand_in.passes = _this_thread()
        try:
            yield
        finally:
            for stand_in in self._all:
                stand_in.passes = None

    def install(self) -> None:
        """Put all in their places.

        Raises:
            ValueError: If another patch is there, or a scene that runs.
        """
        for stand_in in self._all:
            if isinstance(stand_in.in_place, StandIn) and not stand_in.in_place.passes_here:
                raise ValueError(
                    f"{stand_in.name} is patched already; call undo() on that patch first (Patch.of(model) returns it)"
                    ", or where a scene of this model is running, give each thread its own copy.deepcopy(model)"
                )
        for stand_in in self._all:
            stand_in.install()

    def remove(self) -> None:
        """Give the modules the forwards that they had."""
        for stand_in in reversed(self._all):
            stand_in.remove()


@uncompiled(recursive=True)
def _this_thread() -> int:
    return threading.get_ident()


class Answering(TorchFunctionMode):
    """Inside this context `answer` runs in place of PyTorch's `scaled_dot_product_attention`.

    The mode sees the function however the caller imported or wrapped it, before autocast casts its arguments, and is
    off while `answer` runs: what `answer` itself calls is PyTorch's.

    Args:
        name: What messages call the module inside which this context is entered.
        answer: What runs.

    Attributes:
        answered: Calls answered so far.
    """

    def __init__(self, name: str, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.name = name
        self.answer = answer
        self.answered = 0
        self._gradients = torch.is_grad_enabled()
        self._caller = sys._getframe(1).f_code

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer attention and let every other function pass."""
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        if self._gradients and (not torch.is_grad_enabled() or self._is_checkpointed()):
            raise RuntimeError(
                f"{self.name} runs its attention inside an activation checkpoint of its own, or without gradients; "
                "backward would run it again as dense attention. Checkpoint the whole module, or the block around it"
            )
        self.answered += 1
        return self.answer(*args, **(kwargs or {}))

    def _is_checkpointed(self) -> bool:
        """Whether torch.utils.checkpoint is among the callers since this object was made."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._caller:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                return True
            frame = frame.f_back
        return False

    def check(self) -> None:
        """Raise if no call was answered.

        Raises:
            RuntimeError: If there was none.
        """
        if self.answered:
            return
        current = F.scaled_dot_product_attention
        if current is not ATTENTION:
            what = f"{getattr(current, '__module__', None)}.{getattr(current, '__qualname__', type(current).__name__)}"
            raise RuntimeError(
                f"nothing was made sparse in {self.name}: torch.nn.functional.scaled_dot_product_attention was "
                f"replaced by {what}, which does not call PyTorch's; put PyTorch's back while the model is patched"
            )
        raise RuntimeError(
            f"{self.name} did not call torch.nn.functional.scaled_dot_product_attention, so nothing was made "
            "sparse. Where the module has a switch for fused attention, turn it on (module.fused_attn = True); "
            "attention by hand, by nn.MultiheadAttention, xformers or flash_attn must be replaced by that function"
        )
