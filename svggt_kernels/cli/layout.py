"""`layout DIR`: photos to a covisibility graph, and what it promises, before any large model runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..covisibility import CovisibilityGraph, CovisibilityReport, GraphSummary
from ..layout import BlockLayout
from ..patching import patch
from ..photos import find_photos, is_photo, load_photos
from ..video import load_video
from .environment import pick_device
from .errors import CommandError, enough_memory, refusals
from .models import KINDS, load_model
from .options import (
    add_graph,
    add_output,
    add_photos,
    covisibility,
    describe,
    from_images,
    make_folder,
    natural,
    positive,
)
from .pictures import draw_graph, draw_neighbours, require_matplotlib
from .report import against_truth, as_json
from .text import percent, stage, times
from .truth import read_pairs

LONG_SIDE, PATCH_SIZE, SPECIAL_TOKENS = 518, 14, 5


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "layout",
        help="show who sees whom in a folder of photos or a video, and the speed-up to hope for",
        description="Makes the covisibility graph of a folder of photos, or of a video's frames, says how dense it is "
        "and what speed-up of global attention it allows at best, and draws it, with each frame's neighbours.",
    )
    add_photos(parser)
    add_graph(parser, default="megaloc")
    parser.add_argument("--model", choices=KINDS, help="whose tokens --covisibility tokens takes (default: toy)")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of that model; without them they are random"
    )
    parser.add_argument(
        "--device", default="auto", help="where that model or MegaLoc runs: cpu, cuda, cuda:1, mps (default: auto)"
    )
    parser.add_argument(
        "--long-side",
        type=positive,
        metavar="PIXELS",
        help=f"longer side of a frame (default: {LONG_SIDE}; with tokens the model's)",
    )
    parser.add_argument(
        "--patch-size", type=positive, metavar="PIXELS", help="pixels of a token (default: 14; the model's with tokens)"
    )
    parser.add_argument(
        "--special-tokens",
        type=natural,
        metavar="R",
        help="camera and register tokens per frame (default: 5; the model's with tokens)",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="CSV",
        help="pairs known to share a view, a line each: photo, photo, score; shows recall and precision",
    )
    parser.add_argument(
        "--truth-above", type=float, default=0.0, metavar="X", help="score a pair must exceed (default: 0)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_output(parser, "layout-output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the graph, print what it is like, and draw it; return the exit code."""
    _refuse_what_would_be_ignored(arguments)
    require_matplotlib()
    kind = KINDS[arguments.model or "toy"] if arguments.covisibility == "tokens" else None
    with refusals():
        is_video = arguments.folder.is_file() and not is_photo(
            arguments.folder
        )  # what FFmpeg opens, not what is named so
        photos = [] if is_video else find_photos(arguments.folder)
    device = pick_device(arguments.device)
    graph_of = None if kind else from_images(arguments)
    size = {
        "long_side": arguments.long_side or (kind.long_side if kind else LONG_SIDE),
        "patch_size": kind.patch_size if kind else arguments.patch_size or PATCH_SIZE,
    }
    with refusals(), stage(f"reading {arguments.folder}"):
        if photos:
            frames = load_photos(photos[: arguments.max_frames], **size)
        else:
            frames, seconds = load_video(arguments.folder, max_frames=arguments.max_frames, **size)
            photos = [Path(f"{second:.2f} s") for second in seconds]
        pairs = read_pairs(arguments.truth, photos, above=arguments.truth_above) if arguments.truth else None
    photos = photos[: len(frames)]
    if pairs is not None:
        pairs = pairs[(pairs < len(photos)).all(dim=1)]
        if not len(pairs):
            raise CommandError(f"--truth names no pair among the first {len(photos)} photos; raise --max-frames")
    output = make_folder(arguments.output)
    if graph_of is None:
        layout, note = _from_model(arguments, frames, device)
    else:
        layout, note = _from_photos(arguments, frames, graph_of), None

    judged = CovisibilityReport.of(layout.graph, pairs)
    report: dict[str, Any] = {
        "folder": str(arguments.folder),
        "photos": [photo.name for photo in photos],
        "height": frames.shape[-2],
        "width": frames.shape[-1],
        "tokens_per_frame": layout.queries.lengths[0],
        "covisibility": describe(arguments),
        "note": note,
        "graph": asdict(judged.summary),
        "token_density": layout.density,
        "ideal_speedup": 1 / layout.density,
        "truth": None if pairs is None else against_truth(judged),
    }
    text = as_json(arguments.command_line, report)
    (output / "report.json").write_text(text)
    draw_graph(
        output / "graph.png",
        layout.graph,
        f"{len(photos)} photos, {describe(arguments)}: density {percent(layout.graph.density)}",
        None if pairs is None else CovisibilityGraph.from_pairs(len(photos), pairs),
    )
    draw_neighbours(output / "neighbours.png", layout.graph, frames, [photo.name for photo in photos], pairs)
    if arguments.json:
        print(text, end="")
    else:
        print(_as_text(report, judged.summary))
        print(f"Pictures: {output / 'graph.png'}, {output / 'neighbours.png'}\nReport: {output / 'report.json'}")
    return 0


def _refuse_what_would_be_ignored(arguments: argparse.Namespace) -> None:
    source = arguments.covisibility
    of_the_model = {"--patch-size": arguments.patch_size, "--special-tokens": arguments.special_tokens}
    of_tokens = {"--model": arguments.model, "--weights": arguments.weights}
    refused = [
        *((name, given, "the model has its own") for name, given in of_the_model.items() if source == "tokens"),
        *((name, given, "it is for --covisibility tokens") for name, given in of_tokens.items() if source != "tokens"),
        *([("--megaloc", arguments.megaloc, "it is for --covisibility megaloc")] if source != "megaloc" else []),
    ]
    for name, given, why in refused:
        if given is not None:
            raise CommandError(f"{name} does not go with --covisibility {source}; {why}")


def _as_text(report: dict[str, Any], summary: GraphSummary) -> str:
    lines = [
        f"{len(report['photos'])} photos as {report['width']} x {report['height']} px, {report['tokens_per_frame']} "
        "tokens per frame",
        f"Who sees whom: {report['covisibility']}",
        *([report["note"]] if report["note"] else []),
        str(summary),
        f"Over tokens: density {percent(report['token_density'])}. Global attention can be "
        f"{times(report['ideal_speedup'])} faster at best; the rest of the model stays.",
    ]
    if report["truth"]:
        pairs, recall, precision, chance = report["truth"].values()
        lines.append(f"Of {pairs} pairs known to share a view, {percent(recall)} are in; by chance {percent(chance)}.")
        if precision is not None:
            lines.append(f"Of the pairs that are in, {percent(precision)} are known to share a view.")
    return "\n".join(lines)


def _from_photos(
    arguments: argparse.Namespace, frames: Tensor, graph_of: Callable[[Tensor], list[CovisibilityGraph]]
) -> BlockLayout:
    with refusals(), enough_memory(), stage(describe(arguments)):
        [graph] = graph_of(frames[None])
    patch_size = arguments.patch_size or PATCH_SIZE
    patches = (frames.shape[-2] // patch_size) * (frames.shape[-1] // patch_size)
    special = SPECIAL_TOKENS if arguments.special_tokens is None else arguments.special_tokens
    return BlockLayout.from_graph(graph, patches + special, special_tokens=special)


def _from_model(arguments: argparse.Namespace, frames: Tensor, device: torch.device) -> tuple[BlockLayout, str | None]:
    """Run the patched model once, because its tokens decide; the graph is over the photos in their order."""
    model = load_model(arguments.model or "toy", arguments.weights, device)
    with patch(model.module, covisibility=covisibility(arguments)) as handle:
        with enough_memory(), stage(f"running {model.name}"):
            model(frames.to(device))
        inside, graph = handle.layout, handle.graph
    note = None
    if model.warning:
        note = f"The weights of {model.name} are random, so its tokens are a poor guide to who sees whom."
    return BlockLayout(graph, inside.queries, inside.keys).to("cpu"), note
