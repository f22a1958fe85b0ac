"""How accurate a model is on scenes that training never draws, by the metrics of `svggt_kernels.measure.accuracy`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from svggt_kernels.demo.scenes import Draws, Scenes
from svggt_kernels.measure.accuracy import Interval, mean_interval

from ..layouts import Known, Layout
from ..measuring import SceneSet, metrics_of, predict

FIRST_SEED = 10_000_019
"""Far from the seeds of training."""

FRAMES_AT_ONCE = 192

DURING = (
    SceneSet("room", 1, 12),
    SceneSet("photos", 2, 12),
    SceneSet("walk", 4, 12),
    SceneSet("walk", 8, 24),
)
"""What is measured while training."""

AT_THE_END = (
    *DURING,
    SceneSet("revisit", 8, 24),
    SceneSet("forward", 8, 24),
    SceneSet("rotation", 2, 12),
    SceneSet("walk", 16, 24),
    SceneSet("walk", 32, 24),
)
"""What is measured of a finished model; the held-out family is not among it."""

Results = dict[str, dict[str, Interval]]
"""Metrics by set and name."""


def validate(
    model: nn.Module,
    sets: tuple[SceneSet, ...],
    scenes: int,
    device: torch.device,
    size: tuple[int, int],
    layout: Layout,
) -> Results:
    """Return the metrics of a model with a layout on sets of scenes, each a mean over scenes with its interval.

    Args:
        model: A model with VGGT's outputs, in eval mode, on `device`.
        sets: What to measure on.
        scenes: Scenes of each set.
        device: Where scenes are drawn; another kind of device draws other scenes.
        size: Height and width in pixels.
        layout: By what the model attends.
    """
    results: Results = {}
    for chosen in sets:
        rows = []
        for seed, part in enumerate(_parts(chosen, scenes, device, size)):
            for known in Known(part, seed).each:
                with layout.put_into(model, known):
                    rows += metrics_of(predict(model, known.scenes.images), known.scenes)
        results[chosen.name] = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    return results


def as_json(results: Results) -> dict[str, dict[str, list[float]]]:
    """Return results as mean, lower and upper end of the interval, rounded."""
    return {
        name: {metric: [round(value, 5) for value in interval[:3]] for metric, interval in metrics.items()}
        for name, metrics in results.items()
    }


def _parts(chosen: SceneSet, scenes: int, device: torch.device, size: tuple[int, int]) -> Iterator[Scenes]:
    """Yield the scenes of a set, some at a time; each set has its own seed."""
    seed = FIRST_SEED + sum(ord(letter) * 257**place for place, letter in enumerate(chosen.name)) % 2**31
    draws, at_once = Draws(seed, device), max(1, FRAMES_AT_ONCE // chosen.frames)
    for first in range(0, scenes, at_once):
        yield chosen.draw(min(at_once, scenes - first), draws, size)
