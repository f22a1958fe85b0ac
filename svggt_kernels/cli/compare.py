"""`compare DIR`: a model on a folder of photos, dense against sparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import backends
from ..graph import CovisibilityGraph, CovisibilityReport
from ..io.photos import find_photos, load_photos
from .comparison import Comparison, Outputs, compare
from .environment import pick_device
from .errors import CommandError, refusals
from .files import write_files
from .models import HEAD_SIZE, load_model, running_dtype
from .options import source
from .pictures import draw_comparison, draw_graph, require_matplotlib
from .report import (
    against_truth,
    as_json,
    as_text,
    content,
    headline,
)
from .text import count, stage

ROWS = 4


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the result and write report and pictures; return the exit code."""
    require_matplotlib()
    device = pick_device(arguments.device)
    if arguments.backend is not None:
        reason = backends.reasons(device, running_dtype(device), HEAD_SIZE)[arguments.backend]
        if reason is not None:
            raise CommandError(f"--backend {arguments.backend} cannot run here: {reason}; leave --backend out")
    with refusals():
        photos = find_photos(arguments.folder)[: arguments.max_frames]
    covisibility = source(arguments)
    model = load_model(arguments.model, arguments.weights, device)
    with refusals(), stage(f"reading {count(len(photos), 'photo')}"):
        frames = load_photos(
            photos, long_side=arguments.long_side or model.kind.long_side, patch_size=model.kind.patch_size
        )
    comparison, outputs = compare(
        model,
        frames.to(device),
        covisibility,
        described=covisibility.label,
        backend=arguments.backend,
        repeats=arguments.repeats,
    )
    print(as_text(comparison))
    names = [photo.name for photo in photos]
    command, cell = arguments.command_line, model.kind.cell
    print(write_results(arguments.output, comparison, outputs, frames, names, command=command, cell=cell))
    return 0


def write_results(
    folder: Path,
    comparison: Comparison,
    outputs: Outputs,
    frames: Tensor,  # [S, 3, H, W]
    names: Sequence[str],
    *,
    command: str,
    cell: int,
    pairs: Tensor | None = None,  # [E, 2]
) -> str:
    """Write report.json, comparison.png and graph.png, and return words that say where they are.

    Args:
        folder: Where to.
        comparison: The facts.
        outputs: The depth of both runs, and the graph.
        frames: What the model saw, RGB in [0, 1].
        names: What to call each frame.
        command: The command that makes it again.
        cell: As `draw_comparison` takes it.
        pairs: Pairs of frames that are known to share a view, if they are.

    Raises:
        CommandError: They cannot be written.
    """
    shown = torch.linspace(0, len(frames) - 1, min(ROWS, len(frames))).round().int().tolist()
    compared = draw_comparison(
        frames[shown],
        outputs.dense["depth"][shown],
        outputs.sparse["depth"][shown],
        frames=[names[i] for i in shown],
        title=headline(comparison),
        warning=comparison.warning,
        cell=cell,
    )
    graph = draw_graph(
        outputs.graph,
        f"{count(comparison.frames, 'frame')}, {comparison.covisibility}",
        None if pairs is None else CovisibilityGraph.from_pairs(comparison.frames, pairs),
    )
    report = {**content(comparison), "frame_names": list(names)}
    if pairs is not None:
        report["truth"] = against_truth(CovisibilityReport.of(outputs.graph, pairs))
    write_files(
        folder, {"comparison.png": compared, "graph.png": graph, "report.json": as_json(command, report).encode()}
    )
    return f"Pictures: {folder / 'comparison.png'}, {folder / 'graph.png'}\nReport: {folder / 'report.json'}"
