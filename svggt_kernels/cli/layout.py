"""`layout DIR`: photos to a covisibility graph, and what it promises, before any large model runs."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import BlockLayout, CovisibilityGraph
from ..patch import patch
from ..photos import find_photos, load_photos
from .environment import pick_device
from .errors import CommandError, refusals
from .models import KINDS, load_model
from .options import add_graph, add_output, add_photos, covisibility, describe, from_images, make_folder, positive
from .pictures import draw_graph, require_matplotlib
from .report import against_truth, as_json
from .text import percent, stage, times
from .truth import read_pairs


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command to the command line."""
    parser = commands.add_parser(
        "layout",
        help="show who sees whom in a folder of photos, and the speed-up to hope for",
        description="Makes the covisibility graph of a folder of photos, says how dense it is and what speed-up of "
        "global attention it allows at best, and draws it.",
    )
    add_photos(parser)
    add_graph(parser, default="thumbnails")
    parser.add_argument(
        "--model", choices=KINDS, default="toy", help="whose tokens --covisibility tokens takes (default: toy)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of that model; without them they are random"
    )
    parser.add_argument(
        "--device", default="auto", help="where that model runs: cpu, cuda, cuda:1, mps (default: auto)"
    )
    parser.add_argument(
        "--long-side", type=positive, metavar="PIXELS", help="longer side of a frame (default: the model's; 518)"
    )
    parser.add_argument(
        "--patch-size", type=positive, default=14, metavar="PIXELS", help="pixels of a token (default: 14)"
    )
    parser.add_argument(
        "--special-tokens",
        type=positive,
        default=5,
        metavar="R",
        help="camera and register tokens per frame (default: 5)",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="CSV",
        help="pairs known to share a view, a line each: photo, photo, score; shows the recall",
    )
    parser.add_argument(
        "--truth-above", type=float, default=0.0, metavar="X", help="score a pair must exceed (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_output(parser, "layout-output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Makes the graph, prints what it is like and draws it; returns the exit code."""
    require_matplotlib()
    with refusals():
        photos = find_photos(arguments.folder)
        truth = read_pairs(arguments.truth, photos, above=arguments.truth_above) if arguments.truth else None
    photos = photos[: arguments.max_frames]
    with_model = arguments.covisibility == "tokens"
    kind = KINDS[arguments.model]
    patch_size = kind.patch_size if with_model else arguments.patch_size
    long_side = arguments.long_side or (kind.long_side if with_model else 518)
    with refusals(), stage(f"reading {len(photos)} photos"):
        frames = load_photos(photos, long_side=long_side, patch_size=patch_size)
    output = make_folder(arguments.output)
    layout, note = _from_model(arguments, frames) if with_model else (_from_photos(arguments, frames), None)

    graph, (height, width) = layout.graph, frames.shape[-2:]
    summary = graph.summary()
    report: dict[str, Any] = {
        "folder": str(arguments.folder),
        "photos": [photo.name for photo in photos],
        "frame_size": [width, height],
        "tokens_per_frame": layout.queries.lengths[0],
        "covisibility": describe(arguments),
        "note": note,
        "graph": asdict(summary),
        "token_density": layout.density,
        "ideal_speedup": 1 / layout.density,
    }
    if truth is not None:
        report["truth"] = _against_truth(graph, truth, len(photos))
    picture = output / "graph.png"
    title = f"{len(photos)} photos, {describe(arguments)}: density {percent(graph.density)}"
    draw_graph(picture, graph, title, None if truth is None else _truth_graph(truth, len(photos)))
    text = as_json(arguments.command_line, report)
    (output / "report.json").write_text(text)
    if arguments.json:
        print(text, end="")
        return 0

    print(f"{len(photos)} photos as {width} x {height} px, {layout.queries.lengths[0]} tokens per frame")
    print(f"Who sees whom: {describe(arguments)}")
    if note:
        print(note)
    print(summary)
    print(
        f"Over tokens: density {percent(layout.density)}. Global attention can be {times(1 / layout.density)} faster "
        f"at best;"
    )
    print("the rest of the model stays as it is.")
    if truth is not None:
        against = report["truth"]
        print(
            f"Recall: {percent(against['recall'])} of the {against['pairs']} pairs of {arguments.truth} are in the "
            f"graph; chance would give {percent(against['chance'])}."
        )
    print(f"Picture: {picture}\nReport: {output / 'report.json'}")
    return 0


def _from_photos(arguments: argparse.Namespace, frames: Tensor) -> BlockLayout:
    graph = from_images(arguments)(frames[None])[0]
    patches = (frames.shape[-2] // arguments.patch_size) * (frames.shape[-1] // arguments.patch_size)
    special = arguments.special_tokens
    return BlockLayout.from_graph(graph, patches + special, special_tokens=special)


def _from_model(arguments: argparse.Namespace, frames: Tensor) -> tuple[BlockLayout, str | None]:
    """Runs the patched model once, because its tokens decide; the graph is over the photos in their order."""
    model = load_model(arguments.model, arguments.weights, pick_device(arguments.device))
    with patch(model.module, covisibility=covisibility(arguments)) as handle:
        with stage(f"running {model.name}"):
            model(frames.to(pick_device(arguments.device)))
        inside, graph = handle.layout, handle.graph
    note = None
    if model.warning:
        note = f"The weights of {model.name} are random, so its tokens are a poor guide to who sees whom."
    return BlockLayout(graph, inside.queries, inside.keys).to("cpu"), note


def _truth_graph(truth: Tensor, num_frames: int) -> CovisibilityGraph:
    return CovisibilityGraph.from_pairs(num_frames, truth[(truth < num_frames).all(dim=1)])


def _against_truth(graph: CovisibilityGraph, truth: Tensor, num_frames: int) -> dict[str, float]:
    pairs = truth[(truth < num_frames).all(dim=1)]
    if not len(pairs):
        raise CommandError(f"--truth names no pair among the first {num_frames} photos; raise --max-frames")
    return against_truth(graph, pairs)
