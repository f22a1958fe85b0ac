"""Families of camera paths: where the frames of a scene are taken and where they look.

| family | cameras |
|---|---|
| walk | along the tour of the rooms, looking ahead and around |
| room | around the middle of one room, looking inwards or outwards |
| photos | anywhere in one to three rooms, in no order, looking at one spot of each |
| revisit | along the tour and back again, looking as on the way out |
| forward | along the tour, looking straight ahead: the motion is along the optical axis |
| rotation | from one point in all directions: no motion at all |
| sideways | along the tour of a row of rooms, looking to one side; **held out**, never trained on nor tuned with |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .draws import Draws
from .flats import Flats

HELD_OUT = "sideways"
NEAR_WALL = 1.0
MARGIN = 0.45


class Path(NamedTuple):
    """Cameras before they have a height.

    Attributes:
        eye: `[B, S, 2]` metres.
        yaw: Direction of view `[B, S]`, radians from x towards y.
        sway: Deviation of the height among the frames of a scene, metres.
    """

    eye: Tensor
    yaw: Tensor
    sway: float = 0.04


def draw_cameras(flats: Flats, frames: int, families: Mapping[str, float], difficulty: float, draws: Draws) -> Tensor:
    """Draw cameras in each flat; return their poses, camera to world, `[B, S, 4, 4]`.

    Args:
        flats: A batch of flats.
        frames: Cameras of each scene, S.
        families: How often each family is drawn, relative to the others.
        difficulty: From 0, small steps and much overlap, to 1.
        draws: Random numbers.
    """
    batch = flats.batch
    paths = [FAMILIES[family](flats, frames, difficulty, draws) for family in families]
    chosen = draws.choice(tuple(families.values()), batch)
    scene = torch.arange(batch, device=draws.device)
    eye = torch.stack([path.eye for path in paths])[chosen, scene]
    yaw = torch.stack([path.yaw for path in paths])[chosen, scene]
    sway = torch.stack([torch.full((1,), path.sway, device=draws.device) for path in paths])[chosen]
    height = draws.uniform(1.1, 1.75, batch, 1) + sway * draws.normal(batch, frames).clamp(-2, 2)
    pitch = draws.uniform(-0.22, 0.08, batch, 1) + 0.07 * draws.normal(batch, frames)
    roll = 0.04 * draws.normal(batch, frames)
    return looking(torch.cat([eye, height[..., None]], -1), yaw, pitch, roll)


def looking(eye: Tensor, yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Return poses `[..., 4, 4]`, camera to world, of cameras at `eye` `[..., 3]` that look along yaw and pitch.

    Camera axes: x right, y down, z forward.
    """
    level = torch.zeros_like(yaw)
    forward = torch.stack([yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), pitch.sin()], -1)
    right = torch.stack([yaw.sin(), -yaw.cos(), level], -1)
    down = torch.linalg.cross(forward, right)
    cos, sin = roll.cos()[..., None], roll.sin()[..., None]
    pose = torch.zeros(*yaw.shape, 4, 4, device=yaw.device)
    pose[..., :3, :3] = torch.stack([cos * right + sin * down, cos * down - sin * right, forward], -1)
    pose[..., :3, 3] = eye
    pose[..., 3, 3] = 1
    return pose


def _walk(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    distance = _strides(flats, frames, difficulty, draws)
    backwards = math.pi * draws.chance(0.2 * difficulty, flats.batch, 1)
    return Path(flats.along(distance), _around(flats, distance, difficulty, draws) + backwards)


def _revisit(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    distance = _strides(flats, frames, difficulty, draws)
    out = (frames + 1) // 2
    there_and_back = torch.cat([distance[:, :out], distance[:, : frames - out].flip(1)], 1)
    there_and_back = there_and_back + 0.05 * draws.normal(flats.batch, frames)
    return Path(flats.along(there_and_back), _around(flats, there_and_back, difficulty, draws))


def _forward(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    distance = _strides(flats, frames, difficulty, draws, unsteadiness=0.01)
    return Path(flats.along(distance), _direction(flats, distance, 0.1, 0.4), sway=0.01)


def _sideways(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    distance = _strides(flats, frames, difficulty, draws)
    eye = flats.along(distance)
    side = torch.where(draws.chance(0.5, flats.batch, 1), 1.0, -1.0) * draws.uniform(1.2, 1.6, flats.batch, 1)
    aside = side * _away_from_doors(flats, eye) + 0.05 * draws.normal(flats.batch, frames)
    return Path(eye, _direction(flats, distance, 0.4, 1.2) + aside)


def _room(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    batch = flats.batch
    home = draws.integers(0, flats.rooms, batch, 1)
    centre = _of_room(flats.middle, home)
    reach = (_of_room(flats.size, home) / 2 - 0.5) * draws.uniform(0.45, 0.95, batch, 1, 1)
    turn = 2 * math.pi * draws.uniform(0.15, 0.4 + 0.6 * difficulty, batch, 1)
    share = torch.arange(frames, device=draws.device) / max(1, frames - 1)
    angle = draws.uniform(0, 2 * math.pi, batch, 1) + turn * share + 0.05 * draws.normal(batch, frames)
    eye = centre + reach * torch.stack([angle.cos(), angle.sin()], -1)
    target = centre + 0.35 * reach * draws.uniform(-1, 1, batch, 1, 2)
    view = torch.where(draws.chance(0.65, batch, 1, 1), target - eye, eye - centre)
    yaw = _angle(view) + 0.1 * draws.normal(batch, frames)
    return Path(eye, _facing_the_room(flats, eye, yaw, home.expand(-1, frames), draws))


def _photos(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    batch = flats.batch
    ahead = draws.uniform(0, 1, batch, frames) * draws.uniform(1, 1 + 2 * difficulty, batch, 1)
    room = (draws.integers(0, flats.rooms, batch, 1) + ahead.long()) % flats.rooms
    low, size = _of_room(flats.inner[..., :2], room), _of_room(flats.size, room)
    eye = low + MARGIN + draws.uniform(0, 1, batch, frames, 2) * (size - 2 * MARGIN)
    spots = flats.middle + 0.45 * flats.size * draws.uniform(-1, 1, batch, flats.rooms, 2)
    yaw = _angle(_of_room(spots, room) - eye) + (0.1 + 0.4 * difficulty) * draws.normal(batch, frames)
    return Path(eye, _facing_the_room(flats, eye, yaw, room, draws), sway=0.19)


def _rotation(flats: Flats, frames: int, difficulty: float, draws: Draws) -> Path:
    batch = flats.batch
    home = draws.integers(0, flats.rooms, batch, 1)
    eye = _of_room(flats.middle, home) + 0.25 * _of_room(flats.size, home) * draws.uniform(-1, 1, batch, 1, 2)
    turn = 2 * math.pi * draws.uniform(0.2, 0.4 + 0.6 * difficulty, batch, 1)
    share = torch.arange(frames, device=draws.device) / max(1, frames - 1)
    yaw = draws.uniform(0, 2 * math.pi, batch, 1) + turn * share + 0.05 * draws.normal(batch, frames)
    return Path(eye.expand(-1, frames, -1), yaw, sway=0.0)


FAMILIES: dict[str, Callable[[Flats, int, float, Draws], Path]] = {
    "walk": _walk,
    "room": _room,
    "photos": _photos,
    "revisit": _revisit,
    "forward": _forward,
    "rotation": _rotation,
    HELD_OUT: _sideways,
}


def _strides(flats: Flats, frames: int, difficulty: float, draws: Draws, unsteadiness: float = 0.05) -> Tensor:
    """Return how far along the tour each camera is `[B, S]`, in steps of one length a scene."""
    start = draws.uniform(0, 1, flats.batch, 1) * flats.path_length()
    stride = draws.uniform(0.15, 0.25 + 0.45 * difficulty, flats.batch, 1)
    number = torch.arange(frames, device=draws.device)
    return start + number * stride + unsteadiness * draws.normal(flats.batch, frames)


def _around(flats: Flats, distance: Tensor, difficulty: float, draws: Draws) -> Tensor:
    """Return the yaw of somebody who looks ahead and around; it depends on the distance along the tour."""
    batch, frames = distance.shape
    wave = distance / draws.uniform(4.0, 12.0, batch, 1) + draws.uniform(0, 1, batch, 1)
    swing = draws.uniform(0, 0.3 + 1.2 * difficulty, batch, 1) * torch.sin(2 * math.pi * wave)
    swing = swing * _away_from_doors(flats, flats.along(distance))
    return _direction(flats, distance, 0.4, 1.2) + swing + 0.05 * draws.normal(batch, frames)


def _direction(flats: Flats, distance: Tensor, behind: float, ahead: float) -> Tensor:
    """Return the yaw from a point of the tour `behind` metres back to one `ahead` metres on."""
    return _angle(flats.along(distance + ahead) - flats.along(distance - behind))


def _away_from_doors(flats: Flats, eye: Tensor) -> Tensor:
    """Return 0 for cameras in a door, 1 for cameras in a room, `[B, S]`: in a door one looks ahead."""
    if not flats.plan.doors:
        return torch.ones_like(eye[..., 0])
    to_door = (eye[:, :, None] - flats.doors.position[:, None]).norm(dim=-1).amin(-1)
    return ((to_door - 0.5) / 0.8).clamp(0, 1)


def _facing_the_room(flats: Flats, eye: Tensor, yaw: Tensor, room: Tensor, draws: Draws) -> Tensor:
    """Return the yaw, turned to the middle of the room where the camera would look at a wall close by."""
    direction = torch.stack([yaw.cos(), yaw.sin()], -1)
    low, high = _of_room(flats.inner[..., :2], room), _of_room(flats.inner[..., 2:], room)
    gap = torch.where(direction > 0, high, low) - eye
    free = (gap / torch.where(direction.abs() < 1e-3, 1e-3, direction)).abs().amin(-1)
    inwards = _angle(_of_room(flats.middle, room) - eye) + 0.2 * draws.normal(*yaw.shape)
    return torch.where(free < NEAR_WALL, inwards, yaw)


def _of_room(values: Tensor, room: Tensor) -> Tensor:
    """Return values `[B, R, 2]` of the room of each camera `[B, S]`."""
    return values.gather(1, room[..., None].expand(-1, -1, 2))


def _angle(direction: Tensor) -> Tensor:
    return torch.atan2(direction[..., 1], direction[..., 0])
