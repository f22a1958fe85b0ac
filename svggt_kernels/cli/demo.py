"""`demo`: a small trained model on a rendered walk, dense and sparse against the truth; no photos and no network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..demo.model import RoomsModel
from ..demo.scenes import SIZE, Draws, Scenes, make_scenes
from ..demo.scenes.boxes import outlines
from ..measure.layouts import Outcome, Reference, layouts_named, run_layouts
from ..measure.machine import device_name
from ..measure.pictures import Cameras, draw_depths, draw_floor_plan, require_matplotlib
from ..measure.wording import count, mebibytes, milliseconds, percent, times
from ..models.loading import LoadedModel
from ..sources import PatchSimilarity
from .device import pick_device
from .errors import refusals
from .files import write_files
from .models import load_model
from .results import as_json
from .text import stage, table

SEED = 20_261_129
"""Of five walks the one nearest to their mean. Step n of a training with seed s draws from 2^32 s + n: n is smaller."""

ROOMS, DIFFICULTY = 8, 0.7
CUT = 1.2  # height of the floor plan, metres
ROWS = 4
UNITS = (
    "Metres: cameras after the similarity that brings their centres closest to the true ones, depth after one scale, "
    "the median of true / predicted."
)


def run(arguments: argparse.Namespace) -> int:
    """Render, run each layout, print how they compare, and write report and pictures; return the exit code."""
    with refusals():
        require_matplotlib()
    device = pick_device(arguments.device)
    model = load_model("toy", None, device)
    with refusals():
        learned = RoomsModel.provenance()
    frames = arguments.frames
    with stage(f"rendering {count(frames, 'frame')}"):
        scene = make_scenes(1, frames, Draws(SEED), rooms=ROOMS, difficulty=DIFFICULTY, size=SIZE)
    layouts = layouts_named(("dense", f"core-{min(arguments.core, frames)}-covering", "nearest-10"), PatchSimilarity)
    truth = Reference(scene.poses[0].cpu(), scene.depth[0].cpu())
    with refusals():
        outcomes = run_layouts(model, scene.images[0].to(device), layouts, truth, stage=stage)
    print(f"{_about(model, learned, frames)}\n\n{_table(outcomes)}\n\n{_speed(*outcomes[:2])}\n")
    report = {
        "device": device_name(device),
        "frames": frames,
        "rooms": ROOMS,
        "seed": SEED,
        "layouts": [outcome.facts() for outcome in outcomes],
        "core": outcomes[1].core,
        "training": learned,
    }
    files = {
        "floor-plan.png": _floor_plan(scene, outcomes),
        "depth.png": _depths(scene, outcomes),
        "report.json": as_json(arguments.command_line, report).encode(),
    }
    write_files(arguments.output, files)
    print(f"Written: {', '.join(str(arguments.output / name) for name in files)}")
    return 0


def _about(model: LoadedModel, learned: Mapping[str, Any], frames: int) -> str:
    size = sum(parameter.numel() for parameter in model.module.parameters()) / 1e6
    return (
        f"A rendered walk of {count(frames, 'frame')} through {count(ROOMS, 'room')}, whose depth and cameras are "
        f"known exactly; training never drew it.\nThe model is small, {size:.1f} M parameters, and was trained on "
        f"rendered rooms for {learned['seconds'] / 60:.0f} minutes on {learned['device']}:\nits numbers are its own "
        "and say nothing about VGGT's."
    )


def _table(outcomes: Sequence[Outcome]) -> str:
    runs = outcomes[0].cost.runs
    which = f"the shortest of {runs} runs" if runs > 1 else "one run"
    rows = {
        "": [outcome.layout.name for outcome in outcomes],
        f"time, {which}": [milliseconds(outcome.cost.min_ms) for outcome in outcomes],
        "peak memory that a run adds": [mebibytes(outcome.cost.peak_mib) for outcome in outcomes],
        "pairs of tokens that attend": [percent(outcome.pairs) for outcome in outcomes],
        "pose AUC@5, 1 is best": [f"{outcome.scores['auc5']:.3f}" for outcome in outcomes],
        "pose AUC@30, 1 is best": [f"{outcome.auc30:.3f}" for outcome in outcomes],
        "trajectory error ATE, 0 is best": [f"{outcome.scores['ate']:.2f} m" for outcome in outcomes],
        "depth AbsRel, 0 is best": [f"{outcome.scores['absrel']:.3f}" for outcome in outcomes],
    }
    seen = [f"  {outcome.layout.name}: {outcome.layout.sees}" for outcome in outcomes]
    return "\n".join([table([(name, *row) for name, row in rows.items()]), "", *seen])


def _speed(dense: Outcome, core: Outcome) -> str:
    if core.pairs == 1:
        return f"Layout {core.layout.name}: the core holds every frame, so it is dense too; --core takes a smaller one."
    factor = dense.cost.min_ms / core.cost.min_ms
    if factor > 1:
        return f"Layout {core.layout.name} is {times(factor)} as fast as dense, by backend {core.backend}."
    return (
        f"Layout {core.layout.name} is no faster than dense here, {times(factor)} as fast, by backend {core.backend}, "
        f"though {percent(core.pairs)} of the pairs attend:\nthe rest of a small model takes time too, as does other "
        "work on the machine."
    )


def _depths(scene: Scenes, outcomes: Sequence[Outcome]) -> bytes:
    frames = scene.depth.shape[1]
    shown = torch.linspace(0, frames - 1, min(ROWS, frames) + 1).round().int()[1:].unique().tolist()
    return draw_depths(
        scene.images[0, shown],
        scene.depth[0, shown],
        {outcome.layout.name: outcome.depth[shown] for outcome in outcomes},
        frames=[f"frame {frame}" for frame in shown],
        title=f"Depth of {len(shown)} of {count(frames, 'frame')}, by a small trained model",
        note=UNITS,
    )


def _floor_plan(scene: Scenes, outcomes: Sequence[Outcome]) -> bytes:
    walls, things = outlines(scene.boxes[0], CUT)
    plans = [
        Cameras(
            f"{outcome.layout.name}: {percent(outcome.pairs)} of the pairs\nAUC@30 {outcome.auc30:.2f}, ATE "
            f"{outcome.scores['ate']:.2f} m",
            outcome.poses,
            outcome.core,
        )
        for outcome in outcomes
    ]
    frames = count(scene.depth.shape[1], "frame")
    title = f"{frames} of a rendered walk through {count(ROOMS, 'room')}, and where a small trained model places them"
    return draw_floor_plan(walls, things, scene.poses[0], plans, title=title, note=UNITS)
