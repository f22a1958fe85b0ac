"""The source of covisibility that the options of a command name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..sources import SOURCES, Core, MegaLoc, MegaLocSimilarity, PatchSimilarity, Similarity, Source
from ..sources.core import CORE_SIZE, SIMILARITIES
from ..sources.megaloc.weights import PUBLISHED
from .device import pick_device
from .errors import CommandError, refusals


def source(arguments: argparse.Namespace) -> Source:
    """Return the source that the options stand for, with MegaLoc's weights loaded if they are needed.

    Raises:
        CommandError: If both a core and neighbours are asked for, or MegaLoc's weights cannot be had.
    """
    options: dict[str, Any] = {
        name: value for name in ("neighbours", "window") if (value := getattr(arguments, name)) is not None
    }
    word = arguments.covisibility
    if arguments.core is not None and options:
        raise CommandError(f"--core and --{next(iter(options))} say both what each frame sees; give one of them")
    if word in ("core", "patches") or arguments.core is not None:
        by = None if word == "sequential" else similarity(arguments, options)
        return Core(arguments.core or CORE_SIZE, by=by)
    if word in ("sequential", "all"):
        return SOURCES[word](**options)
    neighbours = similarity(arguments, options)
    assert isinstance(neighbours, Similarity)  # "patches" is a core
    return neighbours


def similarity(
    arguments: argparse.Namespace, options: Mapping[str, Any] = MappingProxyType({})
) -> Similarity | PatchSimilarity:
    """Return the similarity of these options that `--covisibility` names, with MegaLoc's weights loaded if needed.

    Raises:
        CommandError: If MegaLoc's weights cannot be had.
    """
    word = arguments.covisibility
    if word not in ("core", "megaloc"):
        return SIMILARITIES[word](**options)
    with refusals():
        megaloc = MegaLoc.from_pretrained(arguments.megaloc or PUBLISHED)
    device = pick_device(arguments.device)
    weights = megaloc.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return MegaLocSimilarity(weights=weights, **options)
