"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..covisibility import CovisibilityGraph, MegaLoc
from ..covisibility.weights import PUBLISHED
from ..patching import SEQUENTIAL_WINDOW, MegaLocSimilarity, TokenSimilarity
from .environment import pick_device
from .errors import refusals

COVISIBILITY = ("megaloc", "tokens", "thumbnails", "sequential", "all")
THUMBNAIL_SIDE = 16


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """Read an integer of at least 0."""
    return _at_least(text, 0)


def add_photos(parser: argparse.ArgumentParser) -> None:
    """Add the folder of photos and how to read it."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a folder of photos, taken in the order of their names"
    )
    parser.add_argument("--max-frames", type=positive, metavar="N", help="use the first N photos only")


def add_graph(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add how to find out which frames see which."""
    parser.add_argument(
        "--covisibility",
        choices=COVISIBILITY,
        default=default,
        help="how to tell which frames see each other. megaloc: similar images by MegaLoc; "
        "tokens: similar tokens of the model; thumbnails: similar at "
        f"{THUMBNAIL_SIDE} x {THUMBNAIL_SIDE} pixels, crude but without any weights; sequential: neighbours in the "
        f"order of the names, for video; all: every frame sees every other (default: {default})",
    )
    parser.add_argument(
        "--megaloc",
        type=Path,
        metavar="FILE",
        help="MegaLoc's weights (default: gberton/MegaLoc, from the cache of the Hugging Face hub or downloaded)",
    )
    parser.add_argument(
        "--neighbours",
        type=natural,
        default=10,
        metavar="K",
        help="most similar frames that each frame sees (default: 10)",
    )
    parser.add_argument(
        "--window",
        type=natural,
        metavar="W",
        help=f"frames before and after that each frame sees, for ordered photos (default: 0; {SEQUENTIAL_WINDOW} with "
        "sequential)",
    )


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the folder that results go to."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help=f"folder for report and pictures (default: {default})",
    )


def make_folder(folder: Path) -> Path:
    """Return the folder, made if it is not there; refuse if it cannot be."""
    with refusals():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(arguments: argparse.Namespace) -> str:
    """Say in words how the graph is made."""
    window = _window(arguments)
    beside = f", the {window} frames before and after" if window else ""
    reference = ", and the model's reference frame"
    return {
        "megaloc": f"{arguments.neighbours} neighbours by MegaLoc{beside}{reference}",
        "tokens": f"{arguments.neighbours} neighbours by similar tokens of the model{beside}{reference}",
        "thumbnails": f"{arguments.neighbours} neighbours by similar thumbnails{beside}{reference}",
        "sequential": f"the {window} frames before and after{reference}",
        "all": "every frame sees every other",
    }[arguments.covisibility]


def covisibility(arguments: argparse.Namespace) -> Any:
    """Return what `patch` takes as covisibility."""
    name, window = arguments.covisibility, _window(arguments)
    if name == "all":
        return "all"
    if name == "sequential":
        return TokenSimilarity(neighbours=0, window=window, anchors=0, bridge=False)
    if name == "thumbnails":
        return from_images(arguments)
    if name == "megaloc":
        return MegaLocSimilarity(neighbours=arguments.neighbours, window=window, weights=_megaloc(arguments))
    return TokenSimilarity(neighbours=arguments.neighbours, window=window)


def from_images(arguments: argparse.Namespace) -> Callable[[Tensor], list[CovisibilityGraph]]:
    """Return a function from images `[B, S, 3, H, W]` to one graph per sample, for graphs that need no model."""
    name, window = arguments.covisibility, _window(arguments)
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
        return CovisibilityGraph.from_descriptors(descriptors, neighbours=arguments.neighbours, window=window)

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


def _window(arguments: argparse.Namespace) -> int:
    if arguments.window is not None:
        return arguments.window
    return SEQUENTIAL_WINDOW if arguments.covisibility == "sequential" else 0


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
