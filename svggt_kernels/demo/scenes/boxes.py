"""What a flat is made of: boxes, axis-aligned or turned about z, as rows of one table.

A table is `[B, K, COLUMNS]` float32. A box that does not exist, because it would stand in somebody's way, has no size
and lies far below the floor.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import Draws, constant, indices
from .flats import SHELL, SURFACE, Flats

CENTRE = 0  # 3
HALF = 3  # half extents, 3
COS, SIN = 6, 7  # of the turn about z
ORIGIN = 8  # added to what is local to the box to get the coordinates of its pattern, 3
SEED = 11
COLOURS = 12  # three colours, 9
FREQUENCY, PATTERN, STRENGTH, PERIOD = 21, 22, 23, 24
LAMP = 25  # position of the room's lamp, 3
LAMP_POWER = 28
SUN = 29  # directional light, 3
COLUMNS = 32

NOWHERE = -1e4
FLAT = 0.05  # half the height of a slab, and more than that of a rug
CABINET, TURNED, HANGING, COLUMN, CEILING_LAMP = range(5)
FURNITURE = (CABINET,) * 4 + (TURNED,) * 2 + (HANGING, COLUMN, CEILING_LAMP)
WALLS, SLABS, PICTURES, RUGS = 12, 2, 4, 1
PER_ROOM = WALLS + SLABS + PICTURES + len(FURNITURE) + RUGS

Extent = tuple[Tensor, Tensor]
"""Where something begins and ends."""


def furnish(flats: Flats, poses: Tensor, draws: Draws) -> Tensor:
    """Build and furnish flats, clear of the cameras and doors; return their boxes `[B, K, COLUMNS]`, not yet painted.

    The boxes of a room lie together: walls, slabs, pictures, furniture, rug.

    Args:
        flats: A batch of flats.
        poses: The cameras that nothing may block, `[B, S, 4, 4]`.
        draws: Random numbers.
    """
    parts = [_walls(flats), _slabs(flats), _pictures(flats, draws), _furniture(flats, poses, draws), _rug(flats, draws)]
    centre, half, turn = (torch.cat(columns, 2) for columns in zip(*parts, strict=True))
    missing = (half <= 1e-4).any(-1, keepdim=True)
    boxes = torch.zeros(*turn.shape, COLUMNS, device=draws.device)
    boxes[..., CENTRE : CENTRE + 3] = centre.masked_fill(missing, NOWHERE)
    boxes[..., HALF : HALF + 3] = half.masked_fill(missing, 0.0)
    boxes[..., COS], boxes[..., SIN] = turn.cos(), turn.sin()
    return boxes


def outlines(boxes: Tensor, height: float) -> tuple[Tensor, Tensor]:
    """Return what a floor plan shows: corners of the walls that a cut at a height meets, and of things lower than that.

    Args:
        boxes: The boxes of one flat, `[K, COLUMNS]`.
        height: Of the cut above the floor, metres.

    Returns:
        Corners from above, metres, of walls `[n, 4, 2]` and of things `[m, 4, 2]`, those that lie flat left out.
    """
    centre, half = boxes[:, CENTRE : CENTRE + 3], boxes[:, HALF : HALF + 3]
    low, high = centre[:, 2] - half[:, 2], centre[:, 2] + half[:, 2]
    cos, sin = boxes[:, COS, None], boxes[:, SIN, None]
    x, y = (half[:, None, :2] * half.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]])).unbind(-1)
    corners = centre[:, None, :2] + torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
    place = torch.arange(len(boxes), device=boxes.device) % PER_ROOM
    stands = (half[:, 2] > FLAT) & (low < height)
    return corners[(place < WALLS) & stands & (high > height)], corners[(place >= WALLS + SLABS) & stands]


def _against_wall(flats: Flats, side: Tensor, deep: Extent, along: Extent, up: Extent) -> tuple[Tensor, Tensor]:
    """Return centres and half extents `[B, R, n, 3]` of boxes at the walls.

    Args:
        flats: A batch of flats.
        side: The side of the room that each box is at, `[B, R, n]`.
        deep: Reach of the boxes from the wall's surface into the room, `[B, R, n]` each.
        along: Extent along the wall, in x or y of the world.
        up: Extent in z.
    """
    device = side.device
    surface = flats.inner[..., indices(SURFACE, device)].gather(2, side)
    inward = constant((1.0, -1.0, 1.0, -1.0), device)[side]
    across = surface + inward * (deep[0] + deep[1]) / 2
    wall_in_y = side < 2
    middle, half_deep, half_along = (along[0] + along[1]) / 2, (deep[1] - deep[0]) / 2, (along[1] - along[0]) / 2
    centre = [torch.where(wall_in_y, across, middle), torch.where(wall_in_y, middle, across), (up[0] + up[1]) / 2]
    half = [
        torch.where(wall_in_y, half_deep, half_along),
        torch.where(wall_in_y, half_along, half_deep),
        (up[1] - up[0]) / 2,
    ]
    return torch.stack(centre, -1), torch.stack(half, -1)


def _walls(flats: Flats) -> tuple[Tensor, Tensor, Tensor]:
    """Each side in three pieces: before the door, after it, and above it."""
    start, end, _ = flats.sides()
    left, right, lintel = flats.openings()
    shape = (flats.batch, flats.rooms, 4)
    side = torch.arange(4, device=start.device).expand(shape)
    floor = torch.zeros(shape, device=start.device)
    top = flats.ceiling[:, None, None].expand(shape)
    deep = (floor - SHELL, floor)
    pieces = [
        _against_wall(flats, side, deep, (start - SHELL, left), (floor, top)),
        _against_wall(flats, side, deep, (right, end + SHELL), (floor, top)),
        _against_wall(flats, side, deep, (left, right), (lintel, top)),
    ]
    centre, half = (torch.stack(column, 3).flatten(2, 3) for column in zip(*pieces, strict=True))
    return centre, half, torch.zeros_like(centre[..., 0])


def _slabs(flats: Flats) -> tuple[Tensor, Tensor, Tensor]:
    """Floor and ceiling."""
    thin = torch.full_like(flats.middle[..., :1], 0.05)
    top = flats.ceiling[:, None, None].expand_as(thin)
    half_size = (flats.cells[..., 2:] - flats.cells[..., :2]) / 2
    centre = torch.stack([torch.cat([flats.middle, -thin], -1), torch.cat([flats.middle, top + thin], -1)], 2)
    half = torch.cat([half_size, thin], -1)[:, :, None].expand_as(centre)
    return centre, half, torch.zeros_like(centre[..., 0])


def _pictures(flats: Flats, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """One for each side, unless the door is in its way."""
    start, end, _ = flats.sides()
    left, right, _ = flats.openings()
    shape = start.shape
    long, tall, low = draws.uniform(0.5, 1.4, *shape), draws.uniform(0.4, 0.9, *shape), draws.uniform(0.9, 1.4, *shape)
    begin = start + 0.1 + draws.uniform(0, 1, *shape) * (end - start - 0.2 - long)
    flush = torch.zeros(shape, device=start.device)
    side = torch.arange(4, device=start.device).expand(shape)
    centre, half = _against_wall(flats, side, (flush, flush + 0.03), (begin, begin + long), (low, low + tall))
    blocked = flats.has_door() & (begin < right + 0.1) & (begin + long > left - 0.1)
    return centre, half.masked_fill(blocked[..., None], 0.0), flush


def _rug(flats: Flats, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    shape = (flats.batch, flats.rooms, 1)
    middle = flats.middle + 0.15 * flats.size * draws.uniform(-1, 1, *shape[:2], 2)
    half = 0.195 * flats.size * draws.uniform(0.4, 1.0, *shape[:2], 2)
    thin = torch.full_like(middle[..., :1], 0.01)
    turn = draws.uniform(-0.5, 0.5, *shape)
    return torch.cat([middle, thin], -1)[:, :, None], torch.cat([half, thin], -1)[:, :, None], turn


def _furniture(flats: Flats, poses: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """At the walls cabinets and a hanging cupboard; in the room turned blocks, a column and a lamp at the ceiling."""
    shape = (flats.batch, flats.rooms, len(FURNITURE))
    kind = indices(FURNITURE, draws.device)
    at_wall = (kind == CABINET) | (kind == HANGING)
    wall_centre, wall_half = _cabinets(flats, kind, draws)
    free_centre, free_half = _free_standing(flats, kind, draws)
    centre = torch.where(at_wall[:, None], wall_centre, free_centre)
    half = torch.where(at_wall[:, None], wall_half, free_half)
    turn = draws.uniform(0, math.pi, *shape).masked_fill(at_wall, 0.0)
    blocked = _in_the_way(flats, poses, centre, half, turn)
    return centre, half.masked_fill(blocked[..., None], 0.0), turn


def _cabinets(flats: Flats, kind: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    shape = (flats.batch, flats.rooms, len(FURNITURE))
    start, end, _ = flats.sides()
    side = draws.integers(0, 4, *shape)
    long = draws.uniform(0.5, 1.5, *shape)
    start, end = start.gather(2, side), end.gather(2, side)
    begin = start + draws.uniform(0, 1, *shape) * (end - start - long)
    low = draws.uniform(1.1, 1.6, *shape).masked_fill(kind != HANGING, 0.0)
    high = torch.where(kind == HANGING, low + draws.uniform(0.3, 0.7, *shape), draws.uniform(0.4, 2.1, *shape))
    deep = (torch.zeros_like(long), draws.uniform(0.3, 0.7, *shape))
    return _against_wall(flats, side, deep, (begin, begin + long), (low, high))


def _free_standing(flats: Flats, kind: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    shape = (flats.batch, flats.rooms, len(FURNITURE))
    top = flats.ceiling[:, None, None]
    share = draws.uniform(0, 1, *shape, 2)
    place = flats.inner[:, :, None, :2] + 0.3 + share * (flats.size[:, :, None] - 0.6)
    half = draws.uniform(0.15, 0.5, *shape, 2) * torch.where(kind == TURNED, 1.0, 0.4)[:, None]
    low = torch.where(kind == CEILING_LAMP, top - draws.uniform(0.15, 0.4, *shape), 0.0)
    high = torch.where(kind == TURNED, draws.uniform(0.3, 1.3, *shape), draws.uniform(1.0, 2.3, *shape))
    high = torch.where(kind == CEILING_LAMP, top, high)
    centre = torch.cat([place, (low + high)[..., None] / 2], -1)
    return centre, torch.cat([half, (high - low)[..., None] / 2], -1)


def _in_the_way(flats: Flats, poses: Tensor, centre: Tensor, half: Tensor, turn: Tensor) -> Tensor:
    """Return which boxes `[B, R, n]` are too close to a camera, to what lies before it, or to a door."""
    eye, forward = poses[..., :2, 3], F.normalize(poses[..., :2, 2], dim=-1)
    normal = F.one_hot(flats.doors.axis, 2).to(eye.dtype)
    clear = [
        (eye, 0.42),
        (eye + 0.5 * forward, 0.25),
        (eye + forward, 0.1),
        (flats.doors.position + 0.4 * normal, 0.3),
        (flats.doors.position - 0.4 * normal, 0.3),
    ]
    points = torch.cat([point for point, _ in clear], 1)  # [B, Q, 2]
    distance = torch.cat([torch.full_like(point[0, :, 0], radius) for point, radius in clear])
    offset = points[:, None] - centre[..., :2].flatten(1, 2)[:, :, None]  # [B, R n, Q, 2]
    cos, sin = turn.cos().flatten(1)[..., None], turn.sin().flatten(1)[..., None]
    x, y = offset.unbind(-1)
    local = torch.stack([cos * x + sin * y, cos * y - sin * x], -1)
    gap = (local.abs() - half[..., :2].flatten(1, 2)[:, :, None]).clamp(min=0).norm(dim=-1)
    return (gap < distance).any(-1).view(turn.shape)
