"""A flat of eight rooms around a closed core, joined by doors into one loop: its boxes, and the path through it.

World axes: x east, y north, z up, metres; the floor is z = 0.
"""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np

CEILING = 2.7
DOOR_WIDTH = 1.1
DOOR_HEIGHT = 2.1
SHELL = 0.1  # thickness of a room's own wall; the wall between two rooms is two shells
# The rooms in the order of the walk: the cells of a 3 x 3 grid around its core.
LOOP = ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1))
WHITE = (0.93, 0.92, 0.88)


class Material(NamedTuple):
    """Two colours and the pattern that mixes them."""

    pattern: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    scale: float  # metres


class Box(NamedTuple):
    """An axis-aligned box; `room` is the number of the room whose light falls on it."""

    corners: np.ndarray  # [2, 3] lowest and highest
    material: Material
    room: int


class Flat(NamedTuple):
    """What the renderer needs to know about the flat."""

    rooms: np.ndarray  # [8, 4] x_min, y_min, x_max, y_max
    boxes: list[Box]
    path: np.ndarray  # [M, 2] closed polyline along which the eye moves


class Side(NamedTuple):
    """One of the four walls of a rectangle: the plane where the coordinate `axis` equals `line`."""

    axis: int  # of the normal: 0 for x, 1 for y
    line: float
    inward: float  # +1 or -1, towards the room
    start: float  # extent along the wall
    end: float

    def box(self, deep: tuple[float, float], along: tuple[float, float], up: tuple[float, float]) -> np.ndarray:
        """Return the corners `[2, 3]` of a box given by its reach into the room, along the wall, and upwards."""
        corners = np.empty((2, 3))
        corners[:, self.axis] = self.line + self.inward * np.array(deep)
        corners[:, 1 - self.axis], corners[:, 2] = along, up
        return np.sort(corners, axis=0)


class Door(NamedTuple):
    """An opening between two rooms."""

    rooms: tuple[int, int]
    axis: int  # of the normal of its wall: 0 for x, 1 for y
    line: float  # position of the wall along `axis`
    centre: float  # position of the opening along the wall

    @property
    def left(self) -> float:
        """The lower end of the opening along the wall."""
        return self.centre - DOOR_WIDTH / 2

    @property
    def right(self) -> float:
        """The upper end of the opening along the wall."""
        return self.centre + DOOR_WIDTH / 2

    def is_in(self, room: int, side: Side) -> bool:
        """Say whether the door opens the given side of the given room."""
        return room in self.rooms and self.axis == side.axis and abs(self.line - side.line) < 2 * SHELL


def build_flat(random: np.random.Generator) -> Flat:
    """Draw the measures, the materials and the furniture of a flat."""
    lines = np.cumsum(np.concatenate([np.zeros((2, 1)), random.uniform(3.6, 5.4, (2, 3))], axis=1), axis=1)
    cells = np.array([[lines[0, x], lines[1, y], lines[0, x + 1], lines[1, y + 1]] for x, y in LOOP])
    rooms = cells + SHELL * np.array([1, 1, -1, -1])
    doors = [_door_between(cells, room, (room + 1) % len(LOOP), random) for room in range(len(LOOP))]
    path = _path_through(rooms, doors)

    boxes: list[Box] = []
    hues = random.permutation(len(LOOP)) / len(LOOP) + random.uniform()
    for room, (cell, hue) in enumerate(zip(cells, hues, strict=True)):
        boxes += _shell(room, cell, doors, _room_materials(room, hue, random))
        boxes += _furniture(room, rooms[room], hue, path, random)
        boxes += _pictures(room, rooms[room], doors, random)
    for door in doors:
        boxes += _door_frame(door)
    return Flat(rooms, boxes, path)


def _door_between(cells: np.ndarray, room: int, neighbour: int, random: np.random.Generator) -> Door:
    low = np.maximum(cells[room, :2], cells[neighbour, :2])
    high = np.minimum(cells[room, 2:], cells[neighbour, 2:])
    axis = int(np.argmin(high - low))  # the cells share a wall: no width along its normal
    margin = DOOR_WIDTH / 2 + 0.6
    centre = random.uniform(low[1 - axis] + margin, high[1 - axis] - margin)
    return Door((room, neighbour), axis, float(low[axis]), float(centre))


def _path_through(rooms: np.ndarray, doors: list[Door]) -> np.ndarray:
    """Return a smooth closed path: room centre, straight through the door, next room centre."""
    corners: list[np.ndarray] = []
    for room, door in enumerate(doors):
        centre = (rooms[room, :2] + rooms[room, 2:]) / 2
        away = np.sign(door.line - centre[door.axis])
        corners.append(centre)
        for step in (-0.6, 0.6):
            corner = np.empty(2)
            corner[door.axis], corner[1 - door.axis] = door.line + step * away, door.centre
            corners.append(corner)
    path = np.array(corners)
    for _ in range(4):  # Chaikin corner cutting stays inside the convex rooms
        following = np.roll(path, -1, axis=0)
        path = np.stack([0.75 * path + 0.25 * following, 0.25 * path + 0.75 * following], axis=1).reshape(-1, 2)
    return path


def _room_materials(room: int, hue: float, random: np.random.Generator) -> list[Material]:
    """Return the materials of the walls, the floor and the ceiling."""
    pattern, scale = (("stripes", 0.25), ("bricks", 0.24), ("plaster", 0.5), ("checker", 0.45))[room % 4]
    wood = 0.07 + random.uniform(-0.02, 0.02)
    floors = (
        Material("planks", _colour(wood, 0.55, 0.42), _colour(wood, 0.5, 0.66), 0.16),
        Material("checker", _colour(hue + 0.5, 0.25, 0.35), _colour(hue, 0.06, 0.85), 0.4),
        Material("planks", _colour(wood, 0.45, 0.55), _colour(wood, 0.4, 0.8), 0.22),
        Material("marble", _colour(hue, 0.2, 0.55), _colour(hue, 0.08, 0.88), 0.7),
    )
    return [
        Material(pattern, _colour(hue, 0.42, 0.72), _colour(hue + 0.04, 0.26, 0.88), scale),
        floors[(room + random.integers(2)) % 4],
        Material("plaster", WHITE, _colour(hue, 0.05, 0.97), 0.8),
    ]


def _colour(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(hue % 1, saturation, value)


def _sides(rectangle: np.ndarray) -> list[Side]:
    x_min, y_min, x_max, y_max = rectangle.tolist()
    return [
        Side(0, x_min, 1.0, y_min, y_max),
        Side(0, x_max, -1.0, y_min, y_max),
        Side(1, y_min, 1.0, x_min, x_max),
        Side(1, y_max, -1.0, x_min, x_max),
    ]


def _shell(room: int, cell: np.ndarray, doors: list[Door], materials: list[Material]) -> list[Box]:
    """Return the four walls of a room, cut open at its doors, its floor and its ceiling."""
    wall, floor, ceiling = materials
    slab = np.stack([[*cell[:2], -0.1], [*cell[2:], 0.0]])
    boxes = [Box(slab, floor, room), Box(slab + [0, 0, CEILING + 0.1], ceiling, room)]
    for side in _sides(cell):
        deep, start = (0, SHELL), side.start
        for door in doors:
            if door.is_in(room, side):
                boxes.append(Box(side.box(deep, (start, door.left), (0, CEILING)), wall, room))
                boxes.append(Box(side.box(deep, (door.left, door.right), (DOOR_HEIGHT, CEILING)), wall, room))
                start = door.right
        boxes.append(Box(side.box(deep, (start, side.end), (0, CEILING)), wall, room))
    return boxes


def _door_frame(door: Door) -> list[Box]:
    wall = Side(door.axis, door.line, 1.0, door.left, door.right)
    deep, trim = (-SHELL - 0.03, SHELL + 0.03), 0.09
    material = Material("plain", WHITE, WHITE, 1.0)
    parts = [
        wall.box(deep, (door.left - trim, door.left), (0, DOOR_HEIGHT + trim)),
        wall.box(deep, (door.right, door.right + trim), (0, DOOR_HEIGHT + trim)),
        wall.box(deep, (door.left, door.right), (DOOR_HEIGHT, DOOR_HEIGHT + trim)),
    ]
    return [Box(part, material, door.rooms[0]) for part in parts]


def _furniture(
    room: int, rectangle: np.ndarray, hue: float, path: np.ndarray, random: np.random.Generator
) -> list[Box]:
    """Return up to four cabinets and tables along the walls, clear of the path and of one another."""
    boxes: list[Box] = []
    taken: list[np.ndarray] = []
    for _ in range(12):
        side = _sides(rectangle)[random.integers(4)]
        length, deep, tall = random.uniform(0.5, 1.5), random.uniform(0.35, 0.7), random.uniform(0.45, 2.0)
        begin = random.uniform(side.start, side.end - length)
        corners = side.box((0, deep), (begin, begin + length), (0, tall))
        low, high = corners[:, :2]
        nearest = np.linalg.norm(path - np.clip(path, low, high), axis=1).min()
        blocked = any((low < other[1] + 0.1).all() and (other[0] - 0.1 < high).all() for other in taken)
        if nearest < 0.55 or blocked or len(taken) == 4:
            continue
        taken.append(corners[:, :2])
        tint, pattern = hue + random.uniform(0.3, 0.7), ("plain", "planks", "checker", "marble")[random.integers(4)]
        material = Material(pattern, _colour(tint, 0.5, 0.42), _colour(tint, 0.38, 0.68), random.uniform(0.12, 0.3))
        parts = _table(corners) if tall < 0.9 else [corners]
        boxes += [Box(part, material, room) for part in parts]
    return boxes


def _table(corners: np.ndarray) -> list[np.ndarray]:
    """Return a table top and four legs that fill the given box."""
    (x_min, y_min, _), (x_max, y_max, tall) = corners
    top = np.array([[x_min, y_min, tall - 0.06], [x_max, y_max, tall]])
    legs = [
        np.array([[x, y, 0], [x + 0.07, y + 0.07, tall - 0.06]])
        for x in (x_min, x_max - 0.07)
        for y in (y_min, y_max - 0.07)
    ]
    return [top, *legs]


def _pictures(room: int, rectangle: np.ndarray, doors: list[Door], random: np.random.Generator) -> list[Box]:
    """Return one framed picture for each wall, unless it would meet a door."""
    boxes: list[Box] = []
    dark = Material("plain", (0.16, 0.12, 0.1), (0.16, 0.12, 0.1), 1.0)
    for side in _sides(rectangle):
        length, tall = random.uniform(0.6, 1.3), random.uniform(0.5, 0.9)
        begin, bottom = random.uniform(side.start + 0.2, side.end - length - 0.2), random.uniform(1.15, 1.4)
        hue, scale = random.uniform(), random.uniform(0.1, 0.3)
        canvas = Material("marble", _colour(hue, 0.85, 0.5), _colour(hue + 0.35, 0.8, 0.95), scale)
        if any(
            door.is_in(room, side) and begin - 0.3 < door.right and door.left < begin + length + 0.3 for door in doors
        ):
            continue
        for material, border, deep in ((dark, 0.06, 0.03), (canvas, 0.0, 0.04)):
            along, up = (begin - border, begin + length + border), (bottom - border, bottom + tall + border)
            boxes.append(Box(side.box((0, deep), along, up), material, room))
    return boxes
