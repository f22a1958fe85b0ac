"""The source of covisibility that the options of a command name."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..sources import SOURCES, MegaLoc, Source
from ..sources.megaloc.weights import PUBLISHED
from .device import pick_device
from .errors import refusals


def source(arguments: argparse.Namespace) -> Source:
    """Return the source that the options stand for, with MegaLoc's weights loaded if they are needed."""
    options: dict[str, Any] = {
        name: value for name in ("neighbours", "window") if (value := getattr(arguments, name)) is not None
    }
    if arguments.covisibility == "megaloc":
        with refusals():
            megaloc = MegaLoc.from_pretrained(arguments.megaloc or PUBLISHED)
        device = pick_device(arguments.device)
        options["weights"] = megaloc.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return SOURCES[arguments.covisibility](**options)
