"""What the options that say who sees whom stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import CovisibilityGraph
from ..measure.wording import count
from ..sources import MegaLoc, MegaLocSimilarity, TokenSimilarity
from ..sources.megaloc.weights import PUBLISHED
from .device import pick_device
from .errors import refusals
from .parser import NEIGHBOURS, SEQUENTIAL_WINDOW

THUMBNAIL_SIDE = 16


def describe(arguments: argparse.Namespace) -> str:
    """Say in words how the graph is made."""
    neighbours, window = count(_neighbours(arguments), "neighbour"), count(_window(arguments), "frame")
    beside = f", the {window} before and after" if _window(arguments) else ""
    reference = ", and the model's reference frame"
    return {
        "megaloc": f"{neighbours} by MegaLoc{beside}{reference}",
        "tokens": f"{neighbours} by similar tokens of the model{beside}{reference}",
        "thumbnails": f"{neighbours} by similar thumbnails{beside}{reference}",
        "sequential": f"the {window} before and after{reference}",
        "all": "every frame sees every other",
    }[arguments.covisibility]


def covisibility(arguments: argparse.Namespace) -> Any:
    """Return what `patch` takes as covisibility."""
    name, neighbours, window = arguments.covisibility, _neighbours(arguments), _window(arguments)
    if name == "all":
        return "all"
    if name == "sequential":
        return TokenSimilarity(neighbours=0, window=window, anchors=0, bridge=False)
    if name == "thumbnails":
        return from_images(arguments)
    if name == "megaloc":
        return MegaLocSimilarity(neighbours=neighbours, window=window, weights=_megaloc(arguments))
    return TokenSimilarity(neighbours=neighbours, window=window)


def from_images(arguments: argparse.Namespace) -> Callable[[Tensor], list[CovisibilityGraph]]:
    """Return a function from images `[B, S, 3, H, W]` to one graph per sample, for graphs that need no model."""
    name, neighbours, window = arguments.covisibility, _neighbours(arguments), _window(arguments)
    megaloc = _megaloc(arguments) if name == "megaloc" else None

    def graph(frames: Tensor) -> CovisibilityGraph:
        if name == "all":
            return CovisibilityGraph.all_visible(len(frames))
        if name == "sequential":
            same = torch.ones(len(frames), 1)
            return CovisibilityGraph.from_descriptors(same, neighbours=0, window=window, anchors=0, bridge=False)
        if megaloc is not None:
            descriptors = megaloc.describe(frames, progress=sys.stderr.isatty()).cpu()
        else:
            descriptors = thumbnails(frames)
        return CovisibilityGraph.from_descriptors(descriptors, neighbours=neighbours, window=window)

    return lambda images: [graph(frames) for frames in images]


def thumbnails(
    frames: Tensor,  # [S, 3, H, W]
) -> Tensor:
    """Return one descriptor per frame, `[S, 3 * 16 * 16]` float32: its thumbnail less the thumbnail's mean colour."""
    small = F.interpolate(frames.float(), size=(THUMBNAIL_SIDE, THUMBNAIL_SIDE), mode="area")
    descriptors = (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)
    # A frame of one colour has no direction; all such frames are alike.
    flat = descriptors.abs().amax(dim=1, keepdim=True) < 1e-6
    return torch.where(flat, torch.ones_like(descriptors), descriptors)


def _megaloc(arguments: argparse.Namespace) -> MegaLoc:
    with refusals():
        megaloc = MegaLoc.from_pretrained(arguments.megaloc or PUBLISHED)
    device = pick_device(arguments.device)
    return megaloc.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def _neighbours(arguments: argparse.Namespace) -> int:
    return NEIGHBOURS if arguments.neighbours is None else arguments.neighbours


def _window(arguments: argparse.Namespace) -> int:
    if arguments.window is not None:
        return arguments.window
    return SEQUENTIAL_WINDOW if arguments.covisibility == "sequential" else 0
