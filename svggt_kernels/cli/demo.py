"""`demo`: the whole way on a rendered walk through a flat, without photos, weights or network."""

from __future__ import annotations

import argparse

import torch

from ..demo.scenes import Draws, make_scenes
from ..graph import CovisibilityGraph
from ..graph.recall import chance_recall, edge_recall
from ..layout import BlockLayout
from ..measure.compare import compare
from ..measure.pictures import require_matplotlib
from ..measure.wording import count, percent, times
from .device import pick_device
from .errors import refusals
from .models import load_model
from .results import as_text, write_results
from .text import stage

SEED, ROOMS, SIZE = 10_000_019, 8, (112, 154)
SHARED = 0.05


def run(arguments: argparse.Namespace) -> int:
    """Render, compare, tell the story, and write report and pictures; return the exit code."""
    with refusals():
        require_matplotlib()
    device = pick_device(arguments.device)
    with stage(f"rendering {count(arguments.frames, 'frame')}"):
        scene = make_scenes(1, arguments.frames, Draws(SEED), rooms=ROOMS, size=SIZE)
    model = load_model("toy", None, device)
    comparison, outputs = compare(
        model,
        scene.images[0].to(device),
        "tokens",
        described="10 neighbours by similar tokens of the model",
        stage=stage,
    )
    overlap = scene.overlap()[0]
    pairs = (torch.maximum(overlap, overlap.T) > SHARED).fill_diagonal_(False).nonzero()
    exact = CovisibilityGraph.from_pairs(arguments.frames, pairs)
    print(
        f"Rendered: a walk of {count(arguments.frames, 'frame')} through {count(ROOMS, 'room')}. Exact "
        f"depth and poses say who really\nsees whom: {percent(exact.density)} of all pairs share at least "
        f"{percent(SHARED)} of their pixels.\n"
    )
    print(as_text(comparison), end="\n\n")
    if len(pairs):
        allowed = BlockLayout.from_graph(exact, comparison.tokens_per_frame, special_tokens=comparison.special_tokens)
        print(
            f"The graph has {percent(edge_recall(outputs.graph, pairs))} of the pairs that really share a view; chance "
            f"would give {percent(chance_recall(outputs.graph))}.\nThe "
            f"exact graph would allow {times(1 / allowed.density)} in global attention."
        )
    print(
        write_results(
            arguments.output,
            comparison,
            outputs,
            scene.images[0],
            [f"frame {i}" for i in range(arguments.frames)],
            command=arguments.command_line,
            pairs=pairs if len(pairs) else None,
        )
    )
    return 0
