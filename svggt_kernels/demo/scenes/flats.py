"""Floor plans: rooms on a grid, doors between them, and a closed walk through all of them.

World axes: x east, y north, z up, metres; the floor is z = 0. A room has four sides: 0 at its low x, 1 at its high x, 2
at its low y, 3 at its high y. Between two rooms are two shells, one of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .draws import Draws, constant, indices

SHELL = 0.1
"""Thickness of a room's own walls."""

ALONG_START, ALONG_END, SURFACE = (1, 1, 0, 0), (3, 3, 2, 2), (0, 2, 1, 3)
"""For each side, which of a room's (x0, y0, x1, y1) are its ends and where its surface lies."""

SMOOTHINGS = 3


@dataclass(frozen=True)
class Plan:
    """Which cells of a grid are rooms, and how one walks through them.

    Attributes:
        cells: (column, row) of each room.
        tour: Rooms in the order of a closed walk; consecutive rooms, the last and the first too, have a door between
            them, or are the same.
    """

    cells: tuple[tuple[int, int], ...]
    tour: tuple[int, ...]

    @property
    def legs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of consecutive rooms of the tour."""
        return tuple(pairwise((*self.tour, self.tour[0])))

    @property
    def doors(self) -> tuple[tuple[int, int], ...]:
        """The pairs (a, b) of rooms that share a door; a is the one of lower coordinates."""
        pairs = {(a, b) if self.cells[a] < self.cells[b] else (b, a) for a, b in self.legs if a != b}
        return tuple(sorted(pairs))

    def door_axis(self, door: tuple[int, int]) -> int:
        """Return the axis along which one passes a door: 0 for x, 1 for y."""
        return int(self.cells[door[0]][0] == self.cells[door[1]][0])


def snake(columns: int, rows: int) -> Plan:
    """Return a plan of `columns` x `rows` rooms, rows even, whose tour meets each of them once.

    It winds through all columns but the first, row by row, and comes back through the first.
    """
    cells = [(0, 0)]
    for row in range(rows):
        way = range(1, columns) if row % 2 == 0 else range(columns - 1, 0, -1)
        cells += [(column, row) for column in way]
    cells += [(0, row) for row in range(rows - 1, 0, -1)]
    return Plan(tuple(cells), tuple(range(len(cells))))


def row_of_rooms(number: int) -> Plan:
    """Return a plan of rooms in a row, through which one walks there and back."""
    return Plan(tuple((column, 0) for column in range(number)), (*range(number), *range(number - 2, 0, -1)))


PLANS = {
    1: Plan(((0, 0),), (0, 0, 0, 0, 0)),
    2: Plan(((0, 0), (1, 0)), (0, 0, 1, 1)),
    3: Plan(((0, 0), (1, 0), (1, 1)), (0, 1, 2, 2, 1)),
    4: snake(2, 2),
    5: row_of_rooms(5),
    6: snake(3, 2),
    7: row_of_rooms(7),
    8: Plan(((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1)), tuple(range(8))),
    16: snake(4, 4),
    32: snake(8, 4),
}
"""Plans by their number of rooms; those of 5 and 7 belong to the held-out family."""


@dataclass(frozen=True)
class Doors:
    """The D doors of a batch of flats.

    Attributes:
        axis: Axis along which one passes each door `[D]`.
        position: Their middles `[B, D, 2]`.
        half_width: `[B, D]` metres.
        height: `[B, D]` metres.
    """

    axis: Tensor
    position: Tensor
    half_width: Tensor
    height: Tensor


@dataclass(frozen=True)
class Flats:
    """A batch of flats of one plan and different measures.

    Attributes:
        plan: The plan.
        cells: Rectangles of the rooms with their shells, (x0, y0, x1, y1), `[B, R, 4]`.
        ceiling: Height of the rooms `[B]`.
        doors: The doors.
        path: Corners of a smooth closed walk `[B, M, 2]`.
    """

    plan: Plan
    cells: Tensor
    ceiling: Tensor
    doors: Doors
    path: Tensor

    @property
    def batch(self) -> int:
        """Number of flats."""
        return len(self.cells)

    @property
    def rooms(self) -> int:
        """Rooms of each flat."""
        return self.cells.shape[1]

    @property
    def inner(self) -> Tensor:
        """Rectangles between the walls `[B, R, 4]`."""
        return self.cells + SHELL * constant((1.0, 1.0, -1.0, -1.0), self.cells.device)

    @property
    def middle(self) -> Tensor:
        """Middles of the rooms `[B, R, 2]`."""
        return (self.cells[..., :2] + self.cells[..., 2:]) / 2

    @property
    def size(self) -> Tensor:
        """Width and depth between the walls `[B, R, 2]`."""
        return self.inner[..., 2:] - self.inner[..., :2]

    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return where each side begins and ends along the wall, and where its surface lies, `[B, R, 4]` each."""
        device = self.cells.device
        start, end, surface = (self.inner[..., indices(which, device)] for which in (ALONG_START, ALONG_END, SURFACE))
        return start, end, surface

    def has_door(self) -> Tensor:
        """Return which sides have a door `[R, 4]`."""
        table = [[False] * 4 for _ in self.plan.cells]
        for room, side, _ in _door_sides(self.plan):
            table[room][side] = True
        return constant(tuple(map(tuple, table)), self.cells.device, torch.bool)

    def openings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the door of each side begins and ends along the wall, and its height, `[B, R, 4]` each.

        The opening of a side without a door has no width and lies at the end of the wall.
        """
        device = self.cells.device
        _, end, _ = self.sides()
        left, right, height = end + SHELL, end + SHELL, torch.zeros_like(end)
        if self.plan.doors:
            room, side, door = (indices(column, device) for column in zip(*_door_sides(self.plan), strict=True))
            along = torch.where(self.doors.axis == 0, self.doors.position[..., 1], self.doors.position[..., 0])
            left[:, room, side] = (along - self.doors.half_width)[:, door]
            right[:, room, side] = (along + self.doors.half_width)[:, door]
            height[:, room, side] = self.doors.height[:, door]
        return left, right, height

    def path_length(self) -> Tensor:
        """Return the length of the walk `[B, 1]`."""
        return self._steps().sum(1, keepdim=True)

    def along(self, distance: Tensor) -> Tensor:
        """Return the points `[B, S, 2]` of the walk at distances `[B, S]` from its start; it is closed."""
        steps = self._steps()
        reached = steps.cumsum(1)
        distance = distance % reached[:, -1:]
        step = torch.searchsorted(reached, distance.contiguous(), right=True).clamp(max=steps.shape[1] - 1)
        share = 1 - (reached.gather(1, step) - distance) / steps.gather(1, step)
        which = step[..., None].expand(-1, -1, 2)
        corner, following = self.path.gather(1, which), self.path.roll(-1, 1).gather(1, which)
        return corner + share[..., None] * (following - corner)

    def _steps(self) -> Tensor:
        return (self.path.roll(-1, 1) - self.path).norm(dim=-1).clamp(min=1e-6)


def draw_flats(batch: int, rooms: int, draws: Draws) -> Flats:
    """Draw flats of the plan of so many rooms.

    Raises:
        ValueError: If there is no such plan.
    """
    if rooms not in PLANS:
        raise ValueError(f"rooms must be one of {', '.join(map(str, PLANS))}, got {rooms}")
    plan, device = PLANS[rooms], draws.device
    lines = []
    for axis in (0, 1):
        widths = draws.uniform(2.8, 5.2, batch, 1 + max(cell[axis] for cell in plan.cells))
        lines.append(torch.cat([widths.new_zeros(batch, 1), widths.cumsum(1)], dim=1))
    column, row = (indices(tuple(cell[axis] for cell in plan.cells), device) for axis in (0, 1))
    cells = torch.stack([lines[0][:, column], lines[1][:, row], lines[0][:, column + 1], lines[1][:, row + 1]], -1)
    ceiling = draws.uniform(2.35, 3.1, batch)
    doors = _draw_doors(plan, cells, draws)
    return Flats(plan, cells, ceiling, doors, _draw_path(plan, cells, doors, draws))


def _door_sides(plan: Plan) -> tuple[tuple[int, int, int], ...]:
    """Return (room, side, door) for both sides of every door."""
    both = []
    for door, (low, high) in enumerate(plan.doors):
        axis = plan.door_axis((low, high))
        both += [(low, 2 * axis + 1, door), (high, 2 * axis, door)]
    return tuple(both)


def _draw_doors(plan: Plan, cells: Tensor, draws: Draws) -> Doors:
    shape, device = (len(cells), len(plan.doors)), draws.device
    axis = indices(tuple(plan.door_axis(door) for door in plan.doors), device)
    low = cells[:, indices(tuple(room for room, _ in plan.doors), device)]  # [B, D, 4]
    along_x = axis == 0
    wall = torch.where(along_x, low[..., 2], low[..., 3])
    start, end = torch.where(along_x, low[..., 1], low[..., 0]), torch.where(along_x, low[..., 3], low[..., 2])
    half_width = draws.uniform(0.42, 0.8, *shape)
    along = start + half_width + 0.3 + draws.uniform(0, 1, *shape) * (end - start - 2 * half_width - 0.6)
    position = torch.where(along_x[:, None], torch.stack([wall, along], -1), torch.stack([along, wall], -1))
    return Doors(axis, position, half_width, draws.uniform(1.95, 2.25, *shape))


def _draw_path(plan: Plan, cells: Tensor, doors: Doors, draws: Draws) -> Tensor:
    """Return a closed path through a point of each room and straight through each door."""
    middle, size = (cells[..., :2] + cells[..., 2:]) / 2, cells[..., 2:] - cells[..., :2] - 2 * SHELL
    points = []
    for room, following in plan.legs:
        points.append(middle[:, room] + size[:, room] * draws.uniform(-0.26, 0.26, len(cells), 2))
        if room != following:
            upwards = (room, following) in plan.doors
            door = (room, following) if upwards else (following, room)
            normal = constant((1.0, 0.0) if plan.door_axis(door) == 0 else (0.0, 1.0), draws.device)
            step = normal * (0.55 if upwards else -0.55)
            position = doors.position[:, plan.doors.index(door)]
            points += [position - step, position + step]
    path = torch.stack(points, 1)
    for _ in range(SMOOTHINGS):  # cutting corners (Chaikin 1974) stays inside the convex rooms
        following_points = path.roll(-1, 1)
        path = torch.stack([0.75 * path + 0.25 * following_points, 0.25 * path + 0.75 * following_points], 2)
        path = path.flatten(1, 2)
    return path
