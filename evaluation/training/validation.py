"""How accurate a model is on scenes that training never draws, by the metrics of `svggt_kernels.measure.accuracy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svggt_kernels.demo.model.poses import decode_poses
from svggt_kernels.demo.scenes import Draws, Scenes, make_scenes
from svggt_kernels.measure.accuracy import (
    Interval,
    depth_errors,
    mean_interval,
    pair_errors,
    pose_auc,
    trajectory_error,
)

FIRST_SEED = 10_000_019
"""Far from the seeds of training."""

DIFFICULTY = 0.7
FRAMES_AT_ONCE = 192


@dataclass(frozen=True)
class ValidationSet:
    """Scenes of one kind.

    Attributes:
        family: Their camera paths.
        rooms: Rooms of their flats.
        frames: Frames of each.
    """

    family: str
    rooms: int
    frames: int

    @property
    def name(self) -> str:
        """What results call it."""
        return f"{self.family}-{self.rooms}r-{self.frames}f"


DURING = (
    ValidationSet("room", 1, 12),
    ValidationSet("photos", 2, 12),
    ValidationSet("walk", 4, 12),
    ValidationSet("walk", 8, 24),
)
"""What is measured while training."""

AT_THE_END = (
    *DURING,
    ValidationSet("revisit", 8, 24),
    ValidationSet("forward", 8, 24),
    ValidationSet("rotation", 2, 12),
    ValidationSet("walk", 16, 24),
    ValidationSet("walk", 32, 24),
)
"""What is measured of a finished model; the held-out family is not among it."""

Results = dict[str, dict[str, Interval]]
"""Metrics by set and name."""


def validate(
    model: nn.Module,
    sets: tuple[ValidationSet, ...],
    scenes: int,
    device: torch.device,
    size: tuple[int, int],
) -> Results:
    """Return the metrics of a model on sets of scenes, each a mean over scenes with its interval.

    Args:
        model: A model with VGGT's outputs, in eval mode, on `device`.
        sets: What to measure on.
        scenes: Scenes of each set.
        device: Where scenes are drawn; another kind of device draws other scenes.
        size: Height and width in pixels.
    """
    results: Results = {}
    for chosen in sets:
        rows = [
            scene_metrics(poses, depth, part.poses[scene], part.depth[scene])
            for part in _parts(chosen, scenes, device, size)
            for scene, (poses, depth) in enumerate(_predictions(model, part, size))
        ]
        results[chosen.name] = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    return results


def scene_metrics(poses: Tensor, depth: Tensor, true_poses: Tensor, true_depth: Tensor) -> dict[str, float]:
    """Return the metrics of one scene by name; where no camera moves, those of rotation and depth only.

    Args:
        poses: Camera to world, `[S, 4, 4]`.
        depth: `[S, H, W]`.
        true_poses: Likewise, in metres.
        true_depth: Likewise, in metres.
    """
    errors = pair_errors(poses, true_poses)
    shifted = depth_errors(depth, true_depth)
    metrics = {
        "rotation_auc30": pose_auc(errors.rotation, 30),
        "rotation_median": float(errors.rotation.median()),
        "absrel": shifted.absrel,
        "delta125": shifted.delta,
    }
    if (true_poses[:, :3, 3] == true_poses[0, :3, 3]).all():
        return metrics
    auc = {f"auc{threshold}": pose_auc(errors.pose, threshold) for threshold in (3, 5, 15, 30)}
    moved = {"translation_median": float(errors.translation.median()), "ate": trajectory_error(poses, true_poses)}
    return auc | metrics | moved


def as_json(results: Results) -> dict[str, dict[str, list[float]]]:
    """Return results as mean, lower and upper end of the interval, rounded."""
    return {
        name: {metric: [round(value, 5) for value in interval[:3]] for metric, interval in metrics.items()}
        for name, metrics in results.items()
    }


def _parts(chosen: ValidationSet, scenes: int, device: torch.device, size: tuple[int, int]) -> Iterator[Scenes]:
    """Yield the scenes of a set, some at a time; each set has its own seed."""
    seed = FIRST_SEED + sum(ord(letter) * 257**place for place, letter in enumerate(chosen.name)) % 2**31
    draws, at_once = Draws(seed, device), max(1, FRAMES_AT_ONCE // chosen.frames)
    for first in range(0, scenes, at_once):
        yield make_scenes(
            min(at_once, scenes - first),
            chosen.frames,
            draws,
            families=chosen.family,
            rooms=chosen.rooms,
            difficulty=DIFFICULTY,
            size=size,
        )


@torch.no_grad()
def _predictions(model: nn.Module, part: Scenes, size: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield poses `[S, 4, 4]` and depth `[S, H, W]` of each scene."""
    device = part.images.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = model(part.images)
    poses, _ = decode_poses(out["pose_enc"], *size)
    yield from zip(poses, out["depth"][..., 0], strict=True)
