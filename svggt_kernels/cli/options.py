"""The source of covisibility that the options of a command name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..sources import GraphFile, MegaLoc, PatchSimilarity, Similarity, Source
from ..sources.megaloc.weights import PUBLISHED
from ..sources.named import named_similarity, named_source
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
    given = {name: getattr(arguments, name) for name in ("core", "neighbours", "window")}
    both = [name for name in ("neighbours", "window") if given[name] is not None]
    if given["core"] is not None and both:
        raise CommandError(f"--core and --{both[0]} say both what each frame sees; give one of them")
    return named_source(arguments.covisibility, **given, megaloc=partial(_megaloc, arguments))


def similarity(arguments: argparse.Namespace) -> Similarity | PatchSimilarity:
    """Return the similarity that `--covisibility` names, with MegaLoc's weights loaded if needed.

    Raises:
        CommandError: If MegaLoc's weights cannot be had.
    """
    return named_similarity(arguments.covisibility, megaloc=partial(_megaloc, arguments))


def _megaloc(arguments: argparse.Namespace) -> MegaLoc:
    with refusals():
        megaloc = MegaLoc.from_pretrained(arguments.megaloc or PUBLISHED)
    device = pick_device(arguments.device)
    return megaloc.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
