"""The source of covisibility that the options of a command name."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from ..sources import SOURCES, Core, MegaLoc, Similarity, Source
from ..sources.core import CORE_SIZE
from ..sources.megaloc.weights import PUBLISHED
from .device import pick_device
from .errors import CommandError, refusals


def source(arguments: argparse.Namespace) -> Source:
    """Return the source that the options stand for, with MegaLoc's weights loaded if they are needed.

    Raises:
        CommandError: If both a core and neighbours are asked for.
    """
    options: dict[str, Any] = {
        name: value for name in ("neighbours", "window") if (value := getattr(arguments, name)) is not None
    }
    word = arguments.covisibility
    if arguments.core is not None and options:
        raise CommandError(f"--core and --{next(iter(options))} say both what each frame sees; give one of them")
    if word in ("core", "megaloc"):
        with refusals():
            megaloc = MegaLoc.from_pretrained(arguments.megaloc or PUBLISHED)
        device = pick_device(arguments.device)
        options["weights"] = megaloc.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if word == "core" or arguments.core is not None:
        by = SOURCES["megaloc" if word == "core" else word](**options)
        return Core(arguments.core or CORE_SIZE, by=by if isinstance(by, Similarity) else None)
    return SOURCES[word](**options)
