"""Which modules of a patched model may run by our own code: those of a known kind that were verified as they are.

What was verified of a module is known to later patches and scenes of it as long as it lives: beside the module, which
it refers to weakly, and not on it, so a copy knows nothing. It holds for its settings and for the values that its
parameters and buffers have then: written since, or replaced, it is verified again by the next patch, though not by
the one that is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..streams import is_capturing
from .settings import Snapshot, are_weak, attributes_of, has_values, is_replaced, is_watched, settings_of, values_of
from .verification import Verification, verify

Made = TypeVar("Made")

FRAMES = 3
"""Frames of a forward on which it is verified: the reference frame and others."""

CAPTURED = "it was not verified before this CUDA graph was captured; run the model once, then capture"


@dataclass(frozen=True)
class _Shared:
    """What all patches and scenes know of a module.

    Attributes:
        settings: Its settings, and whether its parameters have values.
        values: Tells the values of its parameters and buffers from later ones.
        verified: How it was verified for these, by what else a comparison depends on; proofs alone, as what failed may
            succeed another time.
    """

    settings: Hashable
    values: Hashable
    verified: dict[Hashable, Verification] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> _Shared:
        """Return what is known of a module as it is now."""
        settings, values = (settings_of(module), has_values(module)), values_of(module)
        known = _shared.get(module)
        if known is None or known.settings != settings or known.values != values:
            known = cls(settings, values)
            if values is not None and are_weak(settings):
                _shared[module] = known
        return known


_shared: weakref.WeakKeyDictionary[nn.Module, _Shared] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Seen:
    """A module as a patch has seen it last.

    Attributes:
        snapshot: Tells whether it is still so.
        obstacle: Why it must run as it is, or None.
        settings: A number for its settings; None where there is an obstacle.
        shared: How it was verified, by whichever patch.
        made: What was made of it, by what made it.
    """

    snapshot: Snapshot
    obstacle: str | None
    settings: int | None
    shared: dict[Hashable, Verification]
    made: dict[Hashable, Any] = field(default_factory=dict)


class Proofs:
    """What is known about the modules of one patched model; a copy of it knows nothing."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, _Seen] = {}
        self._settings: dict[Hashable, int] = {}
        self._verified: dict[Hashable, Verification] = {}

    def __reduce__(self) -> tuple[type[Proofs], tuple[()]]:
        # What classes hold can seldom be pickled, and a copy reads it again.
        return Proofs, ()

    def obstacle(self, module: nn.Module, obstacle: Callable[[Any], str | None]) -> str | None:
        """Return why a module must run as it is in this call, whatever it is given, or None.

        `obstacle` says so of its kind; it is asked again if the module has changed.
        """
        if torch.is_grad_enabled():
            return "gradients are on"
        if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
            return "there is a hook on all modules"
        known = self._seen.get(module)
        if known is None or not known.snapshot.holds():
            if is_capturing(next(module.parameters()).device):
                return CAPTURED
            known = self._seen[module] = self._look_at(module, obstacle(module) or _obstacle_inside(module))
        return known.obstacle

    def _look_at(self, module: nn.Module, obstacle: str | None) -> _Seen:
        if obstacle is not None:
            return _Seen(Snapshot(module), obstacle, None, {})
        shared = _Shared.of(module)
        number = self._settings.setdefault(shared.settings, len(self._settings))
        return _Seen(Snapshot(module), None, number, shared.verified)

    def settings(self, module: nn.Module) -> int | None:
        """Return a number for the settings of a module for which `obstacle` returned None; for other ones another."""
        return self._seen[module].settings

    def ready(self, module: nn.Module, make: Callable[[nn.Module], Made]) -> Made:
        """Return what `make` makes of a module for which `obstacle` returned None, once while it is as it is."""
        made = self._seen[module].made
        if make not in made:
            made[make] = make(module)
        return cast(Made, made[make])

    def verify(
        self,
        module: nn.Module,
        own: Callable[..., Any],
        read: Callable[[Any], Any],
        inputs: Callable[[], tuple[Any, ...]],
        images: Tensor,
        begin: Callable[[], Callable[[], object]] = lambda: lambda: None,
        *,
        depends: Hashable = (),
        is_part: bool = False,
    ) -> tuple[str | None, Verification | None]:
        """Verify a module for its settings, the size of images and dtypes, or remember how it was verified for these.

        Args:
            module: One for which `obstacle` returned None.
            own: As in `verify`.
            read: Likewise.
            inputs: Returns those of `verify`, which runs once.
            images: `[B, S, ...]`.
            begin: Called before a comparison; returns its `before_own`.
            depends: What else a comparison depends on; plain values.
            is_part: Whether the images are a part of what runs, as a chunk is of a scene: what holds for more frames
                holds for these, however few.

        Returns:
            Why the module must run as it is, or None, and the comparison, if there was one.
        """
        device, shared = images.device.type, self._seen[module].shared
        how = (
            *images.shape[2:],
            images.dtype,
            images.device,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            depends,
        )
        frames = min(FRAMES, images.shape[1])
        number = self.settings(module)
        for count in (frames, FRAMES) if is_part else (frames,):
            found = self._verified.get((number, count, how)) or shared.get((count, how))
            if found is not None:
                self._verified[number, count, how] = found
                return found.reason, found
        if is_capturing(images.device):
            return CAPTURED, None
        found = verify(module, own, read, inputs(), begin())
        if found.is_final:
            self._verified[number, frames, how] = found
            if found.reason is None:
                shared[frames, how] = found
        return found.reason, found


def _obstacle_inside(module: nn.Module) -> str | None:
    """Return why a module must run as it is with its settings, or None.

    Modules inside are passed over, see a part of what they would, or return what is changed in place; nobody sees what
    is changed in those that are not among the submodules. Hooks on the module itself run around it as ever.
    """
    for name, inner in module.named_modules():
        if inner.training:
            return f"{name or 'it'} is in training mode"
        if is_replaced(inner):
            return f"another forward was put on {name or 'it'}"
        if inner is not module and is_watched(inner):
            return f"there is a hook on {name}"
        for attribute, value in attributes_of(inner).items():
            if isinstance(value, nn.Module):
                return f"{name or 'it'} holds the module {attribute}, which is not among its submodules"
    return None
