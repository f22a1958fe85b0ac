"""Whether a module may be run by other code than its own: at inference, and if nobody watches what is inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def obstacle(module: nn.Module) -> str | None:
    """Return why a module must run as it is in this call, or None.

    Modules inside are passed over, see a part of what they would, or return what is changed in place. Hooks on the
    module itself run around it as ever.
    """
    if torch.is_grad_enabled():
        return "gradients are on"
    if module.training:
        return "it is in training mode"
    for name, inner in module.named_modules():
        if _is_replaced(inner):
            return f"another forward was put on {name or 'it'}"
        if inner is not module and _is_watched(inner):
            return f"there is a hook on {name}"
    return None


def _is_watched(module: nn.Module) -> bool:
    """Whether there are hooks on a module, other than those of a patch."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(hasattr(getattr(hook, "__self__", None), "replaced") for hook in hooks)


def _is_replaced(module: nn.Module) -> bool:
    """Whether another than a patch has put a forward on a module, as tools that offload weights do."""
    forward: Any = module.__dict__.get("forward")
    while hasattr(forward, "replaced"):
        forward = forward.replaced
    return forward is not None
