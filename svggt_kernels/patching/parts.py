"""What a part of a patch is, which stands in for the forwards of some modules; and two that look on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..compiling import uncompiled
from .forwards import Forwards
from .interception import StandIn

Around = Callable[..., Any]
"""Runs in place of a module's forward: takes the `StandIn`, then the arguments of that forward."""


class Part(Protocol):
    """What a patch knows of each of its parts."""

    def sites(self) -> Iterable[tuple[nn.Module, str, Around]]:
        """Return the modules whose forward is stood in for, their names, and what runs around it; picklable methods."""


class UnknownAttention:
    """Refuses attention modules that a record does not know where they would make several frames attend, dense.

    Args:
        modules: The modules and their names.
        forwards: The forwards of the model.
        model: What messages call the model.
    """

    def __init__(self, modules: Mapping[nn.Module, str], forwards: Forwards, model: str) -> None:
        self.modules, self.forwards, self.model = dict(modules), forwards, model

    def sites(self) -> Iterable[tuple[nn.Module, str, Around]]:
        """Return the attention modules that are not known."""
        return [(module, name, self._watch) for module, name in self.modules.items()]

    @uncompiled(recursive=False)
    def _watch(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        forward = self.forwards.running
        tokens = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3]
        if forward is not None and tokens:
            across = [forward.spans_frames(*shape[:2]) for shape in tokens]
            if across[0]:
                raise ValueError(
                    f"{stand_in.name} attends from {tokens[0][1]} tokens of several frames at once, and the record of "
                    f"{self.model} does not know it, so it would stay dense. Call the model without what needs "
                    "this module, or leave it dense and name those that shall be sparse: patch(model, modules=[...], "
                    "tokens_per_frame=P, num_special_tokens=R)"
                )
            if any(across):
                forward.dense.add(stand_in.name)
        return stand_in.original(*args, **kwargs)


class FrameOrder:
    """Keeps some values of the frames' tokens before and after the model reorders its frames.

    Args:
        before: The block after which it does, and its name.
        after: The next block, and its name.
        forwards: The forwards of the model.
    """

    def __init__(self, before: tuple[nn.Module, str], after: tuple[nn.Module, str], forwards: Forwards) -> None:
        self.before, self.after, self.forwards = before, after, forwards

    def sites(self) -> Iterable[tuple[nn.Module, str, Around]]:
        """Return both blocks."""
        return [(*self.before, self._leaving), (*self.after, self._entering)]

    @uncompiled(recursive=False)
    def _leaving(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        output = stand_in.original(*args, **kwargs)
        if (forward := self.forwards.running) is not None:
            forward.before = _sample_frames(output)
        return output

    @uncompiled(recursive=False)
    def _entering(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> Any:
        if (forward := self.forwards.running) is not None:
            forward.after = _sample_frames(next(iter((*args, *kwargs.values()))))
        return stand_in.original(*args, **kwargs)


def _sample_frames(tokens: Tensor) -> Tensor:
    """Return some values of each frame's tokens `[B * S, P, C]`, as `[B * S, K]`."""
    return tokens.detach()[:, :4, :64].flatten(1).clone()
