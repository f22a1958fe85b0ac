"""Which modules of a patched model may run by our own code: those of a known kind that were verified as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..streams import is_capturing
from .settings import Snapshot, has_values, is_replaced, is_watched, settings_of
from .verification import Verification, verify

FRAMES = 3
"""Frames of a forward on which it is verified: the reference frame and others."""

CAPTURED = "it was not verified before this CUDA graph was captured; run the model once, then capture"


class Proofs:
    """What is known about the modules of one patched model; a copy of it knows nothing."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, tuple[Snapshot, int | None, str | None]] = {}
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
        if known is None or not known[0].holds():
            if is_capturing(next(module.parameters()).device):
                return CAPTURED
            reason = obstacle(module) or _obstacle_inside(module)
            settings = None
            if reason is None:
                settings = self._settings.setdefault((settings_of(module), has_values(module)), len(self._settings))
            known = self._seen[module] = Snapshot(module), settings, reason
        return known[2]

    def settings(self, module: nn.Module) -> int | None:
        """Return a number for the settings of a module for which `obstacle` returned None; for other ones another."""
        return self._seen[module][1]

    def verify(
        self,
        module: nn.Module,
        own: Callable[..., Any],
        read: Callable[[Any], Any],
        inputs: Callable[[], tuple[Any, ...]],
        images: Tensor,
        begin: Callable[[], Callable[[], object]] = lambda: lambda: None,
    ) -> tuple[str | None, Verification | None]:
        """Verify a module for its settings, the size of images and dtypes, or remember how it was verified for these.

        Args:
            module: One for which `obstacle` returned None.
            own: As in `verify`.
            read: Likewise.
            inputs: Returns those of `verify`, which runs once.
            images: `[B, S, ...]`.
            begin: Called before a comparison; returns its `before_own`.

        Returns:
            Why the module must run as it is, or None, and the comparison, if there was one.
        """
        device = images.device.type
        key = (
            self.settings(module),
            (min(FRAMES, images.shape[1]), *images.shape[2:], images.dtype, images.device),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        )
        found = self._verified.get(key)
        if found is None:
            if is_capturing(images.device):
                return CAPTURED, None
            found = verify(module, own, read, inputs(), begin())
            if found.is_final:
                self._verified[key] = found
        return found.reason, found


def _obstacle_inside(module: nn.Module) -> str | None:
    """Return why a module must run as it is with its settings, or None.

    Modules inside are passed over, see a part of what they would, or return what is changed in place. Hooks on the
    module itself run around it as ever.
    """
    for name, inner in module.named_modules():
        if inner.training:
            return f"{name or 'it'} is in training mode"
        if is_replaced(inner):
            return f"another forward was put on {name or 'it'}"
        if inner is not module and is_watched(inner):
            return f"there is a hook on {name}"
    return None
