"""The device that `--device` names."""

from __future__ import annotations

import torch

from ..measure.machine import devices
from .errors import CommandError


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, or for None and "auto" the fastest kind there is.

    Raises:
        CommandError: There is no such device here.
    """
    known = devices()
    if name in (None, "auto"):
        return torch.device(next(iter(known)))
    if name == "cuda" and "cuda:0" in known:
        name = "cuda:0"
    if name not in known:
        raise CommandError(f"--device must be auto or one of {', '.join(known)} on this machine, got {name}")
    return torch.device(name)
