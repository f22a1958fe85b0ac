"""Whether a module may be run by other code than its own: at inference, and if nobody watches what is inside it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as hooks

from .settings import is_replaced, is_watched


def obstacle() -> str | None:
    """Return why every module must run as it is in this call, or None."""
    if torch.is_grad_enabled():
        return "gradients are on"
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "there is a hook on all modules"
    return None


def obstacle_inside(module: nn.Module) -> str | None:
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
