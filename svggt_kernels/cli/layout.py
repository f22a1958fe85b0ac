"""`layout DIR`: photos to a covisibility graph, and what it promises, before any large model runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..graph import CovisibilityGraph, CovisibilityReport, GraphSummary
from ..io.photos import find_photos
from ..layout import BlockLayout
from ..measure.pictures import draw_graph, draw_neighbours, require_matplotlib
from ..measure.truth import read_pairs
from ..measure.wording import count, percent, times
from ..models import RUNNABLE
from ..patching import patch
from ..sources import Scene, Source, graph_bytes, hloc_pairs
from .arguments import LONG_SIDE, PATCH_SIZE, SPECIAL_TOKENS
from .device import pick_device
from .errors import CommandError, refusals
from .files import write_files
from .footage import Footage
from .models import load_model
from .options import source
from .parser import READ_BY_IN_LAYOUT
from .results import against_truth, as_json
from .text import stage


def run(arguments: argparse.Namespace) -> int:
    """Make the graph, print what it is like, and draw it; return the exit code."""
    kind = RUNNABLE[arguments.model or "toy"] if arguments.covisibility in READ_BY_IN_LAYOUT["--model"] else None
    if not arguments.json:
        with refusals():
            require_matplotlib()
    footage = Footage.of(arguments)
    device = pick_device(arguments.device)
    covisibility = source(arguments, footage.files)
    long_side = arguments.long_side or (kind.long_side if kind else LONG_SIDE)
    frames, names = footage.frames(long_side, kind.patch_size if kind else arguments.patch_size or PATCH_SIZE)
    pairs = None
    if arguments.truth is not None:
        # The truth may name photos past the first ones.
        with refusals():
            pairs = read_pairs(arguments.truth, _all_of(footage, names), above=arguments.truth_above or 0.0)
        pairs = pairs[(pairs < len(frames)).all(dim=1)]
        if not len(pairs):
            raise CommandError(
                f"--truth names no pair among the first {count(len(frames), footage.noun)}; raise --max-frames"
            )
    if kind:
        layout, note = _from_model(arguments, frames, device, covisibility)
    else:
        layout, note = _from_photos(arguments, frames, covisibility), None

    judged = CovisibilityReport.of(layout.graph, pairs)
    report: dict[str, Any] = {
        "folder": str(arguments.folder),
        "photos": names,
        "height": frames.shape[-2],
        "width": frames.shape[-1],
        "tokens_per_frame": layout.queries.lengths[0],
        "covisibility": covisibility.label,
        "note": note,
        "graph": asdict(judged.summary),
        "token_density": layout.density,
        "ideal_speedup": 1 / layout.density,
        "truth": None if pairs is None else against_truth(judged),
    }
    text = as_json(arguments.command_line, report)
    of_photos = None if footage.files is None else names
    files = {"report.json": text.encode(), **_graph_files(layout.graph, of_photos)}
    if arguments.json:
        print(text, end="")
    else:
        print(_as_text(report, judged.summary, footage.noun))
        files = _pictures(covisibility.label, layout.graph, frames, names, pairs) | files
    write_files(arguments.output, files)
    if not arguments.json:
        print(f"Written: {', '.join(str(arguments.output / name) for name in files)}")
    return 0


def _all_of(footage: Footage, names: Sequence[str]) -> list[Path]:
    """Return every photo of the folder, those past `--max-frames` too; frames of a video by their names."""
    return [Path(name) for name in names] if footage.files is None else find_photos(footage.path)


def _graph_files(graph: CovisibilityGraph, names: Sequence[str] | None) -> dict[str, bytes]:
    """Return the graph as `--graph` reads it, and, of photos whose names allow it, as hloc does."""
    files = {"graph.npz": graph_bytes(graph, names)}
    with suppress(ValueError):  # a name holds white space
        return (
            files if names is None else files | {"pairs.txt": hloc_pairs(graph, names).encode(errors="surrogateescape")}
        )
    return files


def _pictures(
    label: str, graph: CovisibilityGraph, frames: Tensor, names: Sequence[str], pairs: Tensor | None
) -> dict[str, bytes]:
    title = f"{count(len(names), 'frame')}, {label}"
    truth = None if pairs is None else CovisibilityGraph.from_pairs(len(names), pairs)
    return {
        "graph.png": draw_graph(graph, title, truth),
        "neighbours.png": draw_neighbours(graph, frames, names, pairs),
    }


def _as_text(report: dict[str, Any], summary: GraphSummary, noun: str) -> str:
    fastest = times(report["ideal_speedup"])
    hope = "Global attention gains nothing" if fastest == "1x" else f"Global attention can be {fastest} as fast at best"
    lines = [
        f"{count(len(report['photos']), noun)} as {report['width']} x {report['height']} px, "
        f"{report['tokens_per_frame']} tokens per frame",
        f"Who sees whom: {report['covisibility']}",
        *([report["note"]] if report["note"] else []),
        str(summary),
        f"Over tokens: density {percent(report['token_density'])}. {hope}; the rest of the model stays.",
    ]
    if report["truth"]:
        pairs, recall, precision, chance = report["truth"].values()
        lines.append(
            f"Of {count(pairs, 'pair')} known to share a view, counted both ways, {percent(recall)} are in; by chance "
            f"{percent(chance)}."
        )
        if precision is not None:
            lines.append(f"Of the pairs that are in, {percent(precision)} are known to share a view.")
    return "\n".join(lines)


def _from_photos(arguments: argparse.Namespace, frames: Tensor, covisibility: Source) -> BlockLayout:
    scene = Scene(len(frames), images=frames, reference_frame=0, progress=sys.stderr.isatty())
    with refusals(), stage(covisibility.label):
        graph = covisibility.graph(scene).to("cpu")
    assert isinstance(graph, CovisibilityGraph)  # no word on the command line makes another
    patch_size = arguments.patch_size or PATCH_SIZE
    patches = (frames.shape[-2] // patch_size) * (frames.shape[-1] // patch_size)
    special = SPECIAL_TOKENS if arguments.special_tokens is None else arguments.special_tokens
    with refusals():
        return BlockLayout.from_graph(graph, patches + special, special_tokens=special)


def _from_model(
    arguments: argparse.Namespace, frames: Tensor, device: torch.device, covisibility: Source
) -> tuple[BlockLayout, str | None]:
    """Run the patched model once, because its tokens decide; the graph is over the photos in their order."""
    model = load_model(arguments.model or "toy", arguments.weights, device)
    with refusals(), patch(model.module, covisibility=covisibility) as handle:
        with stage(f"running {model.name}"):
            model(frames.to(device))
        inside, graph = handle.layout, handle.graph
    note = None
    if model.warning:
        note = f"The model {model.name} has not learned from photos, so its tokens are a poor guide to who sees whom."
    assert isinstance(graph, CovisibilityGraph) and isinstance(inside, BlockLayout)  # as above
    return BlockLayout(graph, inside.queries, inside.keys).to("cpu"), note
