"""`compare DIR`: a model on a folder of photos, dense against sparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import backends
from ..covisibility import CovisibilityGraph, CovisibilityReport
from ..photos import find_photos, load_photos
from .comparison import Comparison, Outputs, compare
from .environment import pick_device
from .errors import CommandError, refusals
from .models import KINDS, load_model
from .options import add_graph, add_output, add_photos, covisibility, describe, make_folder, positive
from .pictures import draw_comparison, draw_graph, require_matplotlib
from .report import against_truth, as_json, as_text, content, headline
from .text import percent, stage

ROWS = 4


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "compare",
        help="run a model on a folder of photos, dense and sparse, and compare time, memory and outputs",
        description="Runs a model on a folder of photos, as it is and patched, and compares time, memory and every "
        "output. Writes a report and pictures. Without --weights the model's weights are random; only MegaLoc's are "
        "downloaded, where its graph is asked for.",
    )
    add_photos(parser)
    parser.add_argument("--model", choices=KINDS, required=True, help="the model to run")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="its weights, .safetensors or .pt; without them they are random"
    )
    add_graph(parser, default="megaloc")
    parser.add_argument(
        "--long-side", type=positive, metavar="PIXELS", help="longer side of a frame (default: the model's)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--backend", choices=backends.BACKENDS, help="the backend that must run (default: the best that can)"
    )
    parser.add_argument(
        "--repeats",
        type=positive,
        default=3,
        metavar="N",
        help="timed runs of each kind, fewer if they take long (default: 3)",
    )
    add_output(parser, "compare-output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the result and write report and pictures; return the exit code."""
    require_matplotlib()
    device = pick_device(arguments.device)
    if arguments.backend is not None:
        reason = backends.reasons(device, torch.float32, 64)[arguments.backend]
        if reason is not None:
            raise CommandError(f"--backend {arguments.backend} cannot run here: {reason}; leave --backend out")
    with refusals():
        photos = find_photos(arguments.folder)[: arguments.max_frames]
    sees = covisibility(arguments)
    model = load_model(arguments.model, arguments.weights, device)
    output = make_folder(arguments.output)
    with refusals(), stage(f"reading {len(photos)} photos"):
        frames = load_photos(
            photos, long_side=arguments.long_side or model.kind.long_side, patch_size=model.kind.patch_size
        )
    comparison, outputs = compare(
        model,
        frames.to(device),
        sees,
        described=describe(arguments),
        backend=arguments.backend,
        repeats=arguments.repeats,
    )
    print(as_text(comparison))
    names = [photo.name for photo in photos]
    command, cell = arguments.command_line, model.kind.cell
    print(write_results(output, comparison, outputs, frames, names, command=command, cell=cell))
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
    """Write report.json, comparison.png and graph.png, and say where they are.

    Args:
        folder: Where to.
        comparison: The facts.
        outputs: The depth of both runs, and the graph.
        frames: What the model saw, RGB in [0, 1].
        names: What to call each frame.
        command: The command that makes it again.
        cell: As `draw_comparison` takes it.
        pairs: Pairs of frames that are known to share a view, if they are.
    """
    shown = torch.linspace(0, len(frames) - 1, min(ROWS, len(frames))).round().int().tolist()
    draw_comparison(
        folder / "comparison.png",
        frames[shown],
        outputs.dense["depth"][shown],
        outputs.sparse["depth"][shown],
        frames=[names[i] for i in shown],
        title=headline(comparison),
        warning=comparison.warning,
        cell=cell,
    )
    draw_graph(
        folder / "graph.png",
        outputs.graph,
        f"{comparison.frames} frames, {comparison.covisibility}: density {percent(comparison.density)}",
        None if pairs is None else CovisibilityGraph.from_pairs(comparison.frames, pairs),
    )
    report = {**content(comparison), "frame_names": list(names)}
    if pairs is not None:
        report["truth"] = against_truth(CovisibilityReport.of(outputs.graph, pairs))
    (folder / "report.json").write_text(as_json(command, report))
    return f"Pictures: {folder / 'comparison.png'}, {folder / 'graph.png'}\nReport: {folder / 'report.json'}"
