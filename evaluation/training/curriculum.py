"""Which scenes are drawn when: first few frames with much overlap in one room, later many in whole flats."""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from svggt_kernels.demo.scenes import Draws, Scenes, make_scenes

FAMILIES = {"walk": 0.35, "room": 0.3, "photos": 0.2, "revisit": 0.06, "forward": 0.06, "rotation": 0.03}
SHUFFLED = 0.5
FULL_DIFFICULTY = 0.45
"""Share of the training after which scenes are as hard as they get."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        until: Its end, as a share of the training.
        lengths: Frames of a scene, with weights.
        rooms: Rooms of a flat, with weights.
    """

    until: float
    lengths: dict[int, float]
    rooms: dict[int, float]


STAGES = (
    Stage(0.12, {2: 1, 3: 1, 4: 2, 6: 2, 8: 2}, {1: 3, 2: 1}),
    Stage(0.45, {2: 1, 4: 2, 6: 2, 8: 3, 12: 3, 16: 1, 24: 1}, {1: 2, 2: 1, 3: 1, 4: 3, 6: 1, 8: 2}),
    Stage(1.0, {2: 0.5, 4: 1, 8: 2, 12: 4, 16: 2, 24: 3, 48: 1, 96: 1}, {1: 2, 2: 1, 3: 1, 4: 3, 6: 1, 8: 2}),
)


def draw_batch(
    progress: float,
    frames: int,
    between: tuple[int, int],
    size: tuple[int, int],
    host: random.Random,
    draws: Draws,
) -> Scenes:
    """Draw the scenes of a training step, all of one length.

    Args:
        progress: Share of the training that is done.
        frames: Frames of all scenes together; lengths that do not divide it are left out.
        between: Frames of a scene at least and at most.
        size: Height and width in pixels.
        host: Random numbers for what decides shapes.
        draws: Random numbers for the scenes.

    Raises:
        ValueError: If no length of the stage fits.
    """
    stage = next(stage for stage in STAGES if progress <= stage.until or stage is STAGES[-1])
    shortest, longest = between
    lengths = {
        length: weight
        for length, weight in stage.lengths.items()
        if shortest <= length <= longest and frames % length == 0
    }
    if not lengths:
        raise ValueError(
            f"a scene has {', '.join(map(str, stage.lengths))} frames in this part of a training, and none of these is "
            f"from {shortest} to {longest} and divides the {frames} frames of a step; change --shortest, --longest or "
            "--frames"
        )
    (length,) = host.choices(list(lengths), list(lengths.values()))
    (rooms,) = host.choices(list(stage.rooms), list(stage.rooms.values()))
    return make_scenes(
        frames // length,
        length,
        draws,
        families=FAMILIES,
        rooms=rooms,
        difficulty=min(1.0, progress / FULL_DIFFICULTY),
        shuffled=SHUFFLED,
        size=size,
    )


def vary_exposure(images: Tensor, draws: Draws) -> Tensor:
    """Return images `[B, S, 3, H, W]` with another exposure and white balance for each frame, and noise."""
    shape = images.shape[:2]
    exposure = 0.12 * draws.normal(*shape, 1, 1, 1) + 0.04 * draws.normal(*shape, 3, 1, 1)
    return (images * exposure.exp() + 0.012 * draws.normal(*images.shape)).clamp(0, 1)
