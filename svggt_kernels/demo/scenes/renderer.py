"""Rays against boxes: images and exact depth. On CUDA a Triton kernel, elsewhere the same formulas in plain PyTorch.

The ray of a pixel is scaled so that its component along the optical axis is 1; the parameter of a hit is then depth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import boxes as table
from .surfaces import BRICKS, CHECKER, STRIPES

AMBIENT = 0.5
NEAR = 0.01
BACKGROUND = 1e9
OCTAVES, LACUNARITY, GAIN = 4, 2.17, 0.75
BOXES_AT_ONCE = 64


def render(boxes: Tensor, poses: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return images `[B, S, 3, H, W]` in [0, 1] and depth `[B, S, H, W]` in metres, 0 where no box is hit; float32.

    Args:
        boxes: `[B, K, COLUMNS]`.
        poses: Camera to world, `[B, S, 4, 4]`.
        intrinsics: fx, fy, cx, cy of each scene, `[B, 4]` pixels; pixel centres are at integers.
        size: Height and width.
    """
    if boxes.is_cuda:
        from .kernel import render_by_triton

        return render_by_triton(boxes, poses, intrinsics, size)
    return render_by_pytorch(boxes, poses, intrinsics, size)


def render_by_pytorch(boxes: Tensor, poses: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Do what `render` does, frame by frame."""
    height, width = size
    device = boxes.device
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    images, depths = [], []
    for scene, (fx, fy, cx, cy) in enumerate(intrinsics):
        x, y, ahead = torch.broadcast_tensors((columns - cx) / fx, (rows - cy) / fy, torch.ones((), device=device))
        rays = torch.stack([x, y, ahead], -1).flatten(0, 1)
        for pose in poses[scene]:
            direction = rays @ pose[:3, :3].mT
            depth, index = nearest_hit(boxes[scene], pose[:3, 3], direction)
            colour = _shade(boxes[scene][index], pose[:3, 3], direction, depth, 1 / fx)
            hit = depth < BACKGROUND
            images.append((colour * hit[:, None]).mT.view(3, height, width))
            depths.append((depth * hit).view(height, width))
    shape = poses.shape[:2]
    return torch.stack(images).unflatten(0, shape), torch.stack(depths).unflatten(0, shape)


def nearest_hit(boxes: Tensor, eye: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return depth and box of the first hit of each ray, `[N]` each; BACKGROUND where there is none.

    Args:
        boxes: `[K, COLUMNS]`.
        eye: `[3]`.
        direction: Rays `[N, 3]`.
    """
    best = torch.full_like(direction[:, 0], BACKGROUND)
    index = torch.zeros_like(best, dtype=torch.long)
    present = (boxes[:, table.CENTRE + 2] > table.NOWHERE / 2).nonzero()[:, 0]
    for some in present.split(BOXES_AT_ONCE):
        slabs = _slabs(boxes[some], eye, direction[:, None])
        entry, leave = slabs.entry.amax(-1), slabs.leave.amin(-1)
        depth, which = torch.where((entry > NEAR) & (entry <= leave), entry, BACKGROUND).min(1)
        index = torch.where(depth < best, some[which], index)
        best = torch.minimum(best, depth)
    return best, index


class _Slabs(NamedTuple):
    """A ray in the axes of a box: origin, direction, and the depths at which it enters and leaves each slab."""

    origin: Tensor
    direction: Tensor
    entry: Tensor
    leave: Tensor


def _slabs(box: Tensor, eye: Tensor, direction: Tensor) -> _Slabs:
    cos, sin = box[..., table.COS], box[..., table.SIN]

    def local(vector: Tensor) -> Tensor:
        x, y, z = vector.unbind(-1)
        return torch.stack(torch.broadcast_tensors(cos * x + sin * y, cos * y - sin * x, z), -1)

    origin, direction = local(eye - box[..., table.CENTRE : table.CENTRE + 3]), local(direction)
    direction = torch.where(direction.abs() < 1e-7, 1e-7, direction)
    middle = -origin / direction
    reach = box[..., table.HALF : table.HALF + 3] / direction.abs()
    return _Slabs(origin, direction, middle - reach, middle + reach)


def _shade(box: Tensor, eye: Tensor, direction: Tensor, depth: Tensor, pixel: Tensor) -> Tensor:
    """Return the colours `[N, 3]` of hits at `depth` on boxes `[N, COLUMNS]`; `pixel` is a pixel's size at depth 1."""
    slabs = _slabs(box, eye, direction)
    axis = slabs.entry.argmax(-1)
    outward = -slabs.direction.gather(1, axis[:, None])[:, 0].sign()
    x, y, z = (slabs.origin + depth[:, None] * slabs.direction + box[:, table.ORIGIN : table.ORIGIN + 3]).unbind(-1)
    u, v = torch.where(axis == 0, y, x), torch.where(axis == 2, y, z)
    seed = box[:, table.SEED].long() * 8 + axis * 2 + (outward > 0)
    footprint = depth * pixel
    first, second = _blend(u, v, seed, box[:, table.FREQUENCY], footprint)
    gain = (1 + _pattern(box, u, v, footprint)) * _light(box, eye + depth[:, None] * direction, axis, outward)
    one, two, three = box[:, table.COLOURS : table.COLOURS + 9].unflatten(1, (3, 3)).unbind(1)
    colour = one + first[:, None] * (two - one)
    return ((colour + second[:, None] * (three - colour)) * gain[:, None]).clamp(0, 1)


def _blend(u: Tensor, v: Tensor, seed: Tensor, frequency: Tensor, footprint: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of the second and of the third colour: noise of several octaves, faded before it aliases."""
    total, weight, amplitude = torch.zeros_like(u), torch.zeros_like(u), 1.0
    for octave in range(OCTAVES):
        f = frequency * LACUNARITY**octave
        fade = (1.6 - 2 * f * footprint).clamp(0, 1) * amplitude
        total = total + fade * (_noise(u * f, v * f, seed + 1000 * octave) - 0.5)
        weight = weight + fade * fade
        amplitude *= GAIN
    first = (0.5 + 1.9 * total / (weight.sqrt() + 1e-4) * (weight / (weight + 0.1))).clamp(0, 1)
    coarse = _noise(u * frequency * 0.8 + 3.7, v * frequency * 0.8 + 9.1, seed + 77777)
    return first, ((coarse - 0.5) * 3.5).clamp(0, 1)


def _pattern(box: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """Return by what share stripes, squares or joints make each hit brighter or darker."""
    kind, period = box[:, table.PATTERN], box[:, table.PERIOD]
    pu, pv = u * period, v * period
    brick = pu * 0.5 + 0.5 * _parity(pv)
    joint = (pv - pv.floor() < 0.14) | (brick - brick.floor() < 0.07)
    value = torch.where(kind == BRICKS, 1.0 - joint.float(), 0.5)
    value = torch.where(kind == CHECKER, _parity(pu.floor() + pv.floor()), value)
    value = torch.where(kind == STRIPES, _parity(pu), value)
    return (value - 0.5) * box[:, table.STRENGTH] * (1.5 - 2 * period * footprint).clamp(0, 1)


def _light(box: Tensor, point: Tensor, axis: Tensor, outward: Tensor) -> Tensor:
    """Return ambient light, that of the room's lamp with its fall-off, and that of a direction."""
    normal = torch.zeros_like(point).scatter(1, axis[:, None], outward[:, None])
    cos, sin = box[:, table.COS], box[:, table.SIN]
    x, y, z = normal.unbind(1)
    normal = torch.stack([cos * x - sin * y, sin * x + cos * y, z], 1)
    to_lamp = box[:, table.LAMP : table.LAMP + 3] - point
    squared = to_lamp.square().sum(1)
    facing = ((normal * to_lamp).sum(1) / (squared + 1e-4).sqrt()).clamp(min=0)
    lamp = box[:, table.LAMP_POWER] * facing / (1 + squared / 9)
    return AMBIENT + lamp + (normal * box[:, table.SUN : table.SUN + 3]).sum(1)


def _parity(x: Tensor) -> Tensor:
    """Return 0 where the floor of x is even, 1 where it is odd."""
    return x.floor() % 2


def _noise(u: Tensor, v: Tensor, seed: Tensor) -> Tensor:
    """Return smooth noise in [0, 1): random values at integers, interpolated (Perlin 1985's value noise)."""
    iu, iv = u.floor(), v.floor()
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    iu, iv = iu.long(), iv.long()
    low = torch.lerp(_hash(iu, iv, seed), _hash(iu + 1, iv, seed), fu)
    high = torch.lerp(_hash(iu, iv + 1, seed), _hash(iu + 1, iv + 1, seed), fu)
    return torch.lerp(low, high, fv)


def _hash(ix: Tensor, iy: Tensor, seed: Tensor) -> Tensor:
    """Return a number in [0, 1) for three integers, computed modulo 2^32."""
    mask = 0xFFFFFFFF
    h = (ix * 374761393 + iy * 668265263 + seed * 974634777) & mask
    h = ((h ^ (h >> 15)) * 739995813) & mask
    h = ((h ^ (h >> 12)) * 668265263) & mask
    return ((h ^ (h >> 15)) & 0xFFFFFF).float() / 2**24
