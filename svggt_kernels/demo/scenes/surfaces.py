"""Colours, patterns and light of boxes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import boxes as table
from .draws import Draws, constant, indices
from .flats import Flats

STRIPES, CHECKER, BRICKS = 1, 2, 3
"""Patterns; others up to 5 are none."""

# The pieces of one wall, and of a room's walls, floor and ceiling, are one surface each.
SHELL_SURFACES = 6
OTHER_SURFACES = table.PER_ROOM - table.WALLS - table.SLABS
SURFACE_OF_BOX = (*(piece // 3 for piece in range(table.WALLS)), *range(4, SHELL_SURFACES + OTHER_SURFACES))


def paint(boxes: Tensor, flats: Flats, draws: Draws) -> None:
    """Give each surface its pattern and each room its lamp, in place.

    Args:
        boxes: What `furnish` made, `[B, R, PER_ROOM, COLUMNS]`.
        flats: The flats.
        draws: Random numbers.
    """
    device = boxes.device
    shape = (*boxes.shape[:2], SHELL_SURFACES + OTHER_SURFACES)
    of_shell = torch.arange(shape[2], device=device) < SHELL_SURFACES
    # Walls, floor and ceiling of a room are close in hue and coarser in pattern than what stands in it.
    hue = torch.where(
        of_shell, draws.uniform(0, 1, *shape[:2], 1) + 0.08 * draws.normal(*shape), draws.uniform(0, 1, *shape)
    )
    fineness = torch.where(of_shell, 1.0, 2.0)
    colours = [
        hsv_to_rgb(hue, draws.uniform(0.1, 0.7, *shape), draws.uniform(0.55, 1.0, *shape)),
        hsv_to_rgb(
            hue + draws.uniform(-0.25, 0.25, *shape), draws.uniform(0.2, 0.9, *shape), draws.uniform(0.2, 0.8, *shape)
        ),
        hsv_to_rgb(draws.uniform(0, 1, *shape), draws.uniform(0.2, 1.0, *shape), draws.uniform(0.15, 1.0, *shape)),
    ]
    columns = [
        draws.integers(0, 1 << 20, *shape)[..., None].float(),  # SEED
        *colours,
        (fineness * draws.uniform(math.log(0.9), math.log(2.8), *shape).exp())[..., None],  # FREQUENCY
        draws.integers(0, 6, *shape)[..., None].float(),  # PATTERN
        draws.uniform(0.1, 0.5, *shape)[..., None],  # STRENGTH
        (fineness * draws.uniform(1.5, 5.0, *shape))[..., None],  # PERIOD, in periods a metre
    ]
    of_box = indices(SURFACE_OF_BOX, device)
    boxes[..., table.SEED : table.PERIOD + 1] = torch.cat(columns, -1)[:, :, of_box]
    # The pattern of a shell goes on through all its pieces; that of a thing moves with it.
    origin = torch.where((of_box < SHELL_SURFACES)[:, None], boxes[..., table.CENTRE : table.CENTRE + 3], 0.0)
    boxes[..., table.ORIGIN : table.ORIGIN + 3] = origin

    lamp = flats.middle + draws.uniform(-0.8, 0.8, *shape[:2], 2)
    below_ceiling = (flats.ceiling[:, None, None] - 0.4).expand(-1, shape[1], 1)
    power = draws.uniform(0.3, 1.0, *shape[:2], 1)
    boxes[..., table.LAMP : table.LAMP_POWER + 1] = torch.cat([lamp, below_ceiling, power], -1)[:, :, None]
    sun = 0.22 * F.normalize(draws.normal(shape[0], 3), dim=-1)
    boxes[..., table.SUN : table.SUN + 3] = sun[:, None, None]


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return colours `[..., 3]` in [0, 1]; a hue is periodic with 1."""
    sector = (hue[..., None] * 6 + constant((5.0, 3.0, 1.0), hue.device)) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(sector, 4 - sector).clamp(0, 1))
