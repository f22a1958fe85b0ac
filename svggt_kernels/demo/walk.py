"""A rendered walk through a flat: images with exact depth, poses and covisibility, made without any download.

The flat is eight rooms around a closed core, joined by doors into one loop. Everything in it is an axis-aligned box
(walls, lintels, door frames, floors, furniture, pictures), so a pixel's depth is the exact nearest intersection of its
ray with a box. Patterns are computed from the hit point; there are no texture files.

World axes: x east, y north, z up, metres; the floor is z = 0. Camera axes follow OpenCV: x right, y down, z forward.
Pixel centres are at integer coordinates: the top left pixel is (0, 0).
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["RenderedWalk", "walk"]

CEILING = 2.7
EYE = 1.5
DOOR_WIDTH = 1.1
DOOR_HEIGHT = 2.1
SHELL = 0.1  # thickness of a room's own wall; the wall between two rooms is two shells
# The rooms in the order of the walk: the cells of a 3 x 3 grid around its core.
LOOP = ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1))

PATTERNS = ("plain", "stripes", "checker", "bricks", "planks", "marble", "plaster")
WHITE = (0.93, 0.92, 0.88)
LIGHT = (0.78, 0.92, 0.72, 0.86, 0.95, 1.0)  # brightness of faces that look to -x, +x, -y, +y, -z, +z


@dataclass(frozen=True, eq=False)
class RenderedWalk:
    """The frames of one walk and the exact geometry behind them.

    Attributes:
        images: RGB in [0, 1], `[S, 3, H, W]` float32.
        depth: Distance along the optical axis in metres, `[S, H, W]` float32.
        poses: Camera to world, `[S, 4, 4]` float64.
        intrinsics: Pinhole matrix in pixels, `[3, 3]` float64, shared by all frames.
        overlap: `[S, S]` float32; entry (i, j) is the share of the pixels of frame i that frame j sees too.
        rooms: Floor rectangles (x_min, y_min, x_max, y_max) in metres, `[8, 4]` float64, in the order of the walk.
        room_of_frame: Index into `rooms` for each frame, `[S]` int64.
    """

    images: Tensor
    depth: Tensor
    poses: Tensor
    intrinsics: Tensor
    overlap: Tensor
    rooms: Tensor
    room_of_frame: Tensor

    def covisible_pairs(self, threshold: float = 0.05) -> Tensor:
        """Return the ordered pairs (i, j), i != j, of frames that share a view, `[E, 2]` int64.

        Both (i, j) and (j, i) are listed when either overlap exceeds the threshold.

        Args:
            threshold: Share of pixels, in [0, 1).

        Raises:
            ValueError: If the threshold is not in [0, 1).
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be a share of pixels in [0, 1), got {threshold}")
        seen = torch.maximum(self.overlap, self.overlap.T) > threshold
        return seen.fill_diagonal_(False).nonzero()


def walk(
    num_frames: int = 48,
    height: int = 252,
    width: int = 336,
    seed: int = 0,
    *,
    field_of_view: float = 75.0,
) -> RenderedWalk:
    """Render a walk once around the flat; the last frames are back in the first room, close to the first frame.

    The frames are equally spaced along the path, about 0.75 m apart for 48 frames. With fewer than about 24, neighbours
    may share no view. Deterministic for given arguments.

    Args:
        num_frames: `S`, at least 1.
        height: Image height in pixels.
        width: Image width in pixels.
        seed: Decides the floor plan's measures, the colours, the patterns and the furniture.
        field_of_view: Horizontal, in degrees, between 10 and 150.

    Raises:
        ValueError: If a size is not positive or the field of view is out of range.
    """
    if min(num_frames, height, width) < 1:
        raise ValueError(f"num_frames, height and width must be at least 1, got {num_frames}, {height}, {width}")
    if not 10 <= field_of_view <= 150:
        raise ValueError(f"field_of_view must be between 10 and 150 degrees, got {field_of_view}")

    flat = _build_flat(np.random.default_rng(seed))
    poses = _poses(flat.path, num_frames)
    focal = width / (2 * math.tan(math.radians(field_of_view) / 2))
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])

    renderer = _Renderer(flat)
    images = np.empty((num_frames, 3, height, width), dtype=np.float32)
    depth = np.empty((num_frames, height, width), dtype=np.float32)
    for frame, pose in enumerate(poses):
        images[frame], depth[frame] = renderer.render(pose, intrinsics, height, width)

    eyes = poses[:, None, :2, 3]
    inside = ((eyes >= flat.rooms[:, :2] - SHELL) & (eyes <= flat.rooms[:, 2:] + SHELL)).all(2)
    return RenderedWalk(
        images=torch.from_numpy(images),
        depth=torch.from_numpy(depth),
        poses=torch.from_numpy(poses),
        intrinsics=torch.from_numpy(intrinsics),
        overlap=torch.from_numpy(_overlap(depth, poses, intrinsics)),
        rooms=torch.from_numpy(flat.rooms),
        room_of_frame=torch.from_numpy(inside.argmax(1)),
    )


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


def _build_flat(random: np.random.Generator) -> Flat:
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


def _poses(path: np.ndarray, num_frames: int) -> np.ndarray:
    """Return camera-to-world poses `[S, 4, 4]` at equal steps along the closed path, looking where it leads."""
    step = np.linalg.norm(np.roll(path, -1, axis=0) - path, axis=1)
    travelled, length = np.cumsum(step) - step, step.sum()
    laps = np.linspace(-length, 2 * length, 6000)
    x, y = (np.interp(laps, travelled, coordinate, period=length) for coordinate in path.T)
    yaw = np.unwrap(np.arctan2(np.diff(y), np.diff(x)))
    turned = np.cumsum(yaw) * (laps[1] - laps[0])  # the integral of yaw, whose differences give mean directions

    here = np.arange(num_frames) * length / num_frames
    behind, ahead = 1.0, 2.0  # metres of the path that the direction is the mean of, so that turns are gradual
    yaw = np.interp(here + ahead, laps[1:], turned) - np.interp(here - behind, laps[1:], turned)
    yaw /= behind + ahead
    pitch = math.radians(-6)
    forward = np.stack([np.cos(yaw) * math.cos(pitch), np.sin(yaw) * math.cos(pitch), 0 * yaw + math.sin(pitch)], 1)
    right = np.stack([np.sin(yaw), -np.cos(yaw), 0 * yaw], axis=1)

    poses = np.zeros((num_frames, 4, 4))
    poses[:, :3, :3] = np.stack([right, np.cross(forward, right), forward], axis=2)
    poses[:, :3, 3] = np.stack([np.interp(here, laps, x), np.interp(here, laps, y), np.full(num_frames, EYE)], axis=1)
    poses[:, 3, 3] = 1
    return poses


class _Renderer:
    """Casts one ray per pixel against the boxes of a flat."""

    def __init__(self, flat: Flat) -> None:
        materials = [box.material for box in flat.boxes]
        self.low, self.high = np.stack([box.corners for box in flat.boxes], axis=1).astype(np.float32)  # [K, 3] each
        self.first = np.array([material.first for material in materials], dtype=np.float32)
        self.second = np.array([material.second for material in materials], dtype=np.float32)
        self.scale = np.array([material.scale for material in materials], dtype=np.float32)
        self.pattern = np.array([PATTERNS.index(material.pattern) for material in materials])
        self.room = flat.rooms.astype(np.float32)[[box.room for box in flat.boxes]]  # [K, 4]
        self.light = np.array(LIGHT, dtype=np.float32)
        self.lattice = np.random.default_rng(0).random((64, 64), dtype=np.float32)

    def render(
        self,
        to_world: np.ndarray,  # [4, 4]
        to_pixels: np.ndarray,  # [3, 3]
        height: int,
        width: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the image `[3, H, W]` and the depth along the optical axis `[H, W]`."""
        pixels = _pixels(np.arange(height), np.arange(width))
        rays = (to_world[:3, :3] @ np.linalg.inv(to_pixels) @ pixels).astype(np.float32)  # 1 along the optical axis
        rays = np.where(abs(rays) < 1e-9, np.float32(1e-9), rays)
        eye = to_world[:3, 3].astype(np.float32)

        windows = self._windows(to_world, to_pixels, height, width)
        depth, box = self._nearest(eye, rays.reshape(3, height, width), windows)
        image = self._shade(eye[:, None] + depth * rays, rays, depth / np.float32(to_pixels[0, 0]), box)
        return image.reshape(3, height, width), depth.reshape(height, width)

    def _windows(
        self,
        to_world: np.ndarray,  # [4, 4]
        to_pixels: np.ndarray,  # [3, 3]
        height: int,
        width: int,
    ) -> np.ndarray:
        """Return the image region each box can appear in: (top, bottom, left, right) `[K, 4]`; empty if none."""
        ends = np.stack([self.low, self.high]).astype(np.float64)  # [2, K, 3]
        corners = np.stack([ends[[i, j, k], :, [0, 1, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])  # [8, 3, K]
        x, y, z = (to_pixels @ to_world[:3, :3].T @ (corners - to_world[:3, 3:])).swapaxes(0, 1)  # [8, K] each
        ahead = np.maximum(z, 1e-3)
        column, row = x / ahead, y / ahead
        window = np.stack([row.min(0), row.max(0) + 1, column.min(0), column.max(0) + 1], axis=1)
        window = np.clip(np.floor(window), 0, [height, height, width, width])
        window[z.min(0) < 1e-3] = 0, height, 0, width  # reaches behind the eye: anywhere
        window[z.max(0) < 1e-3] = 0  # lies behind the eye: nowhere
        return window.astype(np.int64)

    def _nearest(
        self,
        eye: np.ndarray,  # [3]
        rays: np.ndarray,  # [3, H, W]
        windows: np.ndarray,  # [K, 4]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return depth and box index of the first hit of each ray, each `[H * W]`, by the slab test."""
        inverse = 1 / rays
        depth = np.full_like(rays[0], np.inf)
        index = np.zeros(depth.shape, dtype=np.int64)
        for box, (top, bottom, left, right) in enumerate(windows.tolist()):
            if top >= bottom or left >= right:
                continue
            slope = inverse[:, top:bottom, left:right]
            to_low = (self.low[box] - eye)[:, None, None] * slope
            to_high = (self.high[box] - eye)[:, None, None] * slope
            enter, leave = np.minimum(to_low, to_high).max(0), np.maximum(to_low, to_high).min(0)
            nearest = depth[top:bottom, left:right]
            hit = (enter > 0) & (enter <= leave) & (enter < nearest)
            np.copyto(nearest, enter, where=hit)
            np.copyto(index[top:bottom, left:right], box, where=hit)
        return depth.ravel(), index.ravel()

    def _shade(
        self,
        point: np.ndarray,  # [3, R]
        rays: np.ndarray,  # [3, R]
        footprint: np.ndarray,  # [R] size of a pixel on the surface, metres
        box: np.ndarray,  # [R]
    ) -> np.ndarray:
        """Return the colours `[3, R]`: pattern, light by the side a face looks to, darker along room edges."""
        axis = np.minimum(abs(point - self.low[box].T), abs(point - self.high[box].T)).argmin(0)  # normal of the face
        scale = self.scale[box]
        across = np.where(axis == 0, point[1], point[0]) / scale
        up = np.where(axis == 2, point[1], point[2]) / scale

        mix = np.zeros_like(across)
        pattern = self.pattern[box]
        for number in np.unique(pattern):
            chosen = pattern == number
            mix[chosen] = self._pattern(PATTERNS[number], across[chosen], up[chosen])
        sharpness = np.clip(1.5 - 4 * footprint / scale, 0, 1)  # a pattern finer than a pixel fades into its mean
        colour = _blend(self.first[box].T, self.second[box].T, _blend(0.5, mix, sharpness))

        light = self.light[2 * axis + (np.take_along_axis(rays, axis[None], 0)[0] < 0)]
        x_min, y_min, x_max, y_max = self.room[box].T
        x, y, z = point
        to_wall = [np.minimum(x - x_min, x_max - x), np.minimum(y - y_min, y_max - y), np.minimum(z, CEILING - z)]
        edge = np.sort(to_wall, axis=0)[1]  # the nearest plane of a wall point is the wall itself, the second its edge
        return np.clip(colour * light * (0.7 + 0.3 * np.sqrt(np.clip(edge / 0.5, 0, 1))), 0, 1)

    def _pattern(self, name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the mix of the two colours, in [0, 1], at surface coordinates measured in pattern scales."""
        if name == "stripes":
            return 0.8 * (np.floor(u) % 2) + 0.2 * self._noise(4 * u, 4 * v)
        if name == "checker":
            return 0.9 * ((np.floor(u) + np.floor(v)) % 2) + 0.1 * self._noise(4 * u, 4 * v)
        if name == "bricks":
            row = np.floor(3 * v)
            joint = ((3 * v) % 1 < 0.12) | ((u + row / 2) % 1 < 0.04)
            return np.where(joint, 1, 0.7 * self._noise(np.floor(u + row / 2) * 7.3, row * 3.7))
        if name == "planks":
            board = np.floor(v)
            joint = (v % 1 < 0.05) | ((u / 6 + board * 0.37) % 1 < 0.008)
            grain = 0.4 * self._noise(board * 5.3, board * 1.7) + 0.2 * self._noise(u, 9 * v)
            return np.where(joint, 0, 0.4 + grain)
        if name == "marble":
            return np.clip(0.96 * self._noise(u, v) + 0.64 * self._noise(3 * u + 7, 3 * v + 3) - 0.3, 0, 1)
        if name == "plaster":
            return 0.6 * self._noise(2 * u, 2 * v) + 0.4 * self._noise(9 * u, 9 * v)
        return np.full_like(u, 0.5)

    def _noise(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return smooth noise in [0, 1] that takes random values at integer coordinates."""
        column, row = np.floor(u), np.floor(v)
        s, t = ((3 - 2 * w) * w * w for w in (u - column, v - row))
        left, below = column.astype(np.int64) % 64, row.astype(np.int64) % 64
        right, above = (left + 1) % 64, (below + 1) % 64
        lower = _blend(self.lattice[left, below], self.lattice[right, below], s)
        upper = _blend(self.lattice[left, above], self.lattice[right, above], s)
        return _blend(lower, upper, t)


def _blend(start: np.ndarray | float, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    return start + (end - start) * share


def _pixels(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the homogeneous pixel coordinates (u, v, 1) of a grid, `[3, rows * columns]`, row by row."""
    v, u = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([u, v, np.ones_like(u)]).reshape(3, -1).astype(np.float64)


def _overlap(
    depth: np.ndarray,  # [S, H, W]
    poses: np.ndarray,  # [S, 4, 4]
    to_pixels: np.ndarray,  # [3, 3]
    tolerance: float = 0.05,
) -> np.ndarray:
    """Return `[S, S]`: the share of the pixels of frame i that frame j sees, tested on a grid of about 1000 pixels.

    A point of frame i is seen in frame j if it projects into the image of j and its depth there agrees with one of the
    four pixels around it within `tolerance`, and within 15 cm, less than a wall is thick.
    """
    frames, height, width = depth.shape
    stride = max(1, round(math.sqrt(height * width / 1000)))
    rows, columns = (np.arange((size - 1) % stride // 2, size, stride) for size in (height, width))
    rays = np.linalg.inv(to_pixels) @ _pixels(rows, columns)  # [3, n]
    to_camera = np.linalg.inv(poses)
    maps = depth.reshape(frames, -1)
    overlap = np.empty((frames, frames), dtype=np.float32)
    for frame in range(frames):
        relative = to_camera @ poses[frame]  # [S, 4, 4] from this camera to all cameras
        points = relative[:, :3, :3] @ (rays * depth[frame][np.ix_(rows, columns)].ravel()) + relative[:, :3, 3:]
        x, y, z = (to_pixels @ points).swapaxes(0, 1)  # [S, n] each
        column, row = x / np.maximum(z, 1e-3), y / np.maximum(z, 1e-3)
        inside = (z > 0) & (abs(column - (width - 1) / 2) < width / 2) & (abs(row - (height - 1) / 2) < height / 2)
        left, top = (
            np.clip(np.floor(at), 0, last).astype(np.int64) for at, last in ((column, width - 1), (row, height - 1))
        )
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        around = [row * width + column for row in (top, bottom) for column in (left, right)]
        error = np.min([abs(np.take_along_axis(maps, pixel, axis=1) - z) for pixel in around], axis=0)
        overlap[frame] = (inside & (error < np.minimum(tolerance * z, 0.15))).mean(1)
    return overlap
