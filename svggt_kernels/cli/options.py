"""The source of covisibility that the options of a command name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..sources import SOURCES, Core, GraphFile, MegaLoc, MegaLocSimilarity, Similarity, Source
from ..sources.core import CORE_SIZE, SIMILARITIES
from ..sources.megaloc.weights import PUBLISHED
from .device import pick_device
from .errors import CommandError, refusals


def source(arguments: argparse.Namespace, photos: Sequence[Path] | None) -> Source:
    """Return the source that the options stand for, with MegaLoc's weights or the graph of a file loaded if needed.

    Args:
        arguments: The options.
        photos: The files of the frames, by which a graph of a file tells them; None for a video.

    Raises:
        CommandError: If both a core and neighbours are asked for, or MegaLoc's weights or the graph cannot be had.
    """
    if arguments.graph is not None:
        with refusals():
            return GraphFile(arguments.graph, depth_range=arguments.depth_range).of(photos).opened()
    options: dict[str, Any] = {
        name: value for name in ("neighbours", "window") if (value := getattr(arguments, name)) is not None
    }
    word = arguments.covisibility
    if arguments.core is not None and options:
        raise CommandError(f"--core and --{next(iter(options))} say both what each frame sees; give one of them")
    if word == "core" or arguments.core is not None:
        by = None if word == "sequential" else similarity(arguments, options)
        return Core(arguments.core or CORE_SIZE, by=by)
    if word in ("sequential", "all"):
        return SOURCES[word](**options)
    return similarity(arguments, options)


def similarity(arguments: argparse.Namespace, options: Mapping[str, Any] = MappingProxyType({})) -> Similarity:
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
