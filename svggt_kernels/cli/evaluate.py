"""`evaluate DIR`: a model on photos whose cameras are known, dense and sparse, each against the truth."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..measure.ground_truth import Truth, find_truth, photos_of, read_truth, with_depth_maps
from ..measure.layouts import DENSE, Layout, Outcome, Reference, run_layouts
from ..measure.machine import device_name
from ..measure.wording import count, mebibytes, milliseconds, percent
from ..models.loading import LoadedModel
from .compare import load, pick_backend
from .device import pick_device
from .errors import refusals
from .files import write_files
from .footage import Footage
from .options import source
from .results import as_json
from .text import stage, table

ROWS = (
    ("pose AUC@3", "auc3", "{:.4f}"),
    ("pose AUC@5", "auc5", "{:.4f}"),
    ("pose AUC@15", "auc15", "{:.4f}"),
    ("pose AUC@30", "auc30", "{:.4f}"),
    ("rotation AUC@30", "rotation_auc30", "{:.4f}"),
    ("rotation of pairs, median", "rotation_median", "{:.3g} degrees"),
    ("translation direction of pairs, median", "translation_median", "{:.3g} degrees"),
    ("ATE after the best similarity", "ate", "{:.4g}"),
    ("RPE, translation", "rpe_translation", "{:.4g}"),
    ("RPE, rotation", "rpe_rotation", "{:.3g} degrees"),
    ("depth AbsRel after the median scale", "absrel", "{:.4f}"),
    ("depth within a factor of 1.25", "delta125", "{:.4f}"),
    ("scale of depth / scale of cameras", "scale_ratio", "{:.4f}"),
)


def run(arguments: argparse.Namespace) -> int:
    """Run the model both ways, print and write the accuracy of each; return the exit code."""
    device = pick_device(arguments.device)
    pick_backend(arguments, device)
    with refusals():
        truth = truth_of(arguments)
    footage = Footage.of_photos(arguments.folder, truth.photos)
    covisibility = source(arguments, footage.files)
    model, frames, _ = load(arguments, footage, device)
    reference = reference_of(truth, frames)
    print(said(truth))
    layouts = (DENSE, Layout("sparse", covisibility.label, covisibility))
    with refusals():
        outcomes = run_layouts(
            model,
            frames.to(device),
            layouts,
            reference,
            backend=arguments.backend,
            rounds=arguments.repeats,
            stage=stage,
        )
    print(_as_text(heading(model, frames, device), truth, outcomes, model.warning))
    report = facts(model, frames, device, outcomes) | {"truth": facts_of_truth(truth, reference)}
    write_files(arguments.output, {"report.json": as_json(arguments.command_line, report).encode()})
    print(f"Report: {arguments.output / 'report.json'}")
    return 0


def heading(model: LoadedModel, frames: Tensor, device: torch.device) -> str:
    """Say what ran on frames `[S, 3, H, W]`, and where."""
    return (
        f"{model.name}, weights: {model.weights}; {count(len(frames), 'photo')} of {frames.shape[-1]} x "
        f"{frames.shape[-2]} px on {device_name(device)}"
    )


def facts(model: LoadedModel, frames: Tensor, device: torch.device, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what a report says of the runs on frames `[S, 3, H, W]`."""
    return {
        "model": model.name,
        "weights": model.weights,
        "warning": model.warning,
        "device": device_name(device),
        "frames": len(frames),
        "height": frames.shape[-2],
        "width": frames.shape[-1],
        "layouts": [outcome.facts() for outcome in outcomes],
    }


def truth_of(arguments: argparse.Namespace) -> Truth:
    """Return what is known of the photos in the folder, by `--truth` and `--depth` or the layout of a data set."""
    photos = photos_of(arguments.folder)
    truth = read_truth(arguments.truth or find_truth(arguments.folder), photos)
    if arguments.depth is not None:
        truth = with_depth_maps(truth, arguments.depth, arguments.depth_scale)
    return truth.first(arguments.max_frames)


def reference_of(truth: Truth, frames: Tensor) -> Reference:
    """Return the truth of frames `[S, 3, H, W]`; reads its depth maps."""
    depth = None
    if any(truth.depth):
        with refusals(), stage("reading true depth"):
            depth = truth.depth_of_frames((frames.shape[-2], frames.shape[-1]))
    return Reference(truth.poses, depth, truth.known)


def facts_of_truth(truth: Truth, reference: Reference) -> dict[str, Any]:
    """Return what a report says of the truth."""
    return {
        "label": truth.label,
        "scored_photos": [truth.photos[place].name for place in truth.known],
        "unscored_photos": [photo.name for photo in _unscored(truth)],
        "unused_poses": truth.unused,
        "scored_pairs": _pairs(truth),
        "depth_maps": sum(read is not None for read in truth.depth),
        "depth_pixels": 0 if reference.depth is None else int((reference.depth > 0).sum()),
    }


def said(truth: Truth) -> str:
    """Return in words what is known of the photos, and what is not."""
    depth = sum(read is not None for read in truth.depth)
    poses = f"poses of {len(truth.known)} of {count(len(truth.photos), 'photo')}"
    lines = [f"Truth: {truth.label}; {poses}, depth maps of {depth}"]
    if unscored := _unscored(truth):
        lines.append(f"Run but not scored, because their poses are not known: {_first(unscored)}")
    if truth.unused:
        lines.append(f"Not used, because they are of no photo here: {count(truth.unused, 'pose')}")
    return "\n".join(lines)


def _unscored(truth: Truth) -> list[Path]:
    known = set(truth.known)
    return [photo for place, photo in enumerate(truth.photos) if place not in known]


def _first(photos: list[Path], most: int = 3) -> str:
    names = ", ".join(photo.name for photo in photos[:most])
    return names + (f" and {len(photos) - most} more" if len(photos) > most else "")


def _pairs(truth: Truth) -> int:
    return math.comb(len(truth.known), 2)


def _as_text(head: str, truth: Truth, outcomes: Sequence[Outcome], warning: str | None) -> str:
    dense, sparse = outcomes
    rated = [row for row in ROWS if row[1] in dense.scores and row[1] in sparse.scores]
    rows = [
        ("", "dense", "sparse"),
        *((label, *(words.format(outcome.scores[key]) for outcome in outcomes)) for label, key, words in rated),
        ("time", *(milliseconds(outcome.cost.min_ms) for outcome in outcomes)),
        ("peak memory that a run adds", *(mebibytes(outcome.cost.peak_mib) for outcome in outcomes)),
        ("frame pairs in global attention", *(str(outcome.frame_pairs) for outcome in outcomes)),
    ]
    assert sparse.graph is not None
    lines = [
        "",
        head,
        f"Sparse: {sparse.layout.sees}; {percent(sparse.pairs)} of the pairs of tokens; backend {sparse.backend}",
        *(f"Note: {note}" for note in sparse.graph.summary().warnings),
        "",
        table(rows),
        f"  Over {count(_pairs(truth), 'pair')} of photos. ATE and RPE are in the unit of the truth.",
        *(["", warning] if warning else []),
    ]
    return "\n".join(lines)
