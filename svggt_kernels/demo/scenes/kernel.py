"""The renderer as one Triton kernel: a program casts the rays of a block of pixels of one frame against all boxes.

The formulas are those of `renderer`, which explains them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import boxes as table
from . import renderer, surfaces

CENTRE, HALF = tl.constexpr(table.CENTRE), tl.constexpr(table.HALF)
COS, SIN = tl.constexpr(table.COS), tl.constexpr(table.SIN)
ORIGIN, SEED, COLOURS = tl.constexpr(table.ORIGIN), tl.constexpr(table.SEED), tl.constexpr(table.COLOURS)
FREQUENCY, PATTERN = tl.constexpr(table.FREQUENCY), tl.constexpr(table.PATTERN)
STRENGTH, PERIOD = tl.constexpr(table.STRENGTH), tl.constexpr(table.PERIOD)
LAMP, LAMP_POWER, SUN = tl.constexpr(table.LAMP), tl.constexpr(table.LAMP_POWER), tl.constexpr(table.SUN)
COLUMNS = tl.constexpr(table.COLUMNS)
STRIPES, CHECKER, BRICKS = tl.constexpr(surfaces.STRIPES), tl.constexpr(surfaces.CHECKER), tl.constexpr(surfaces.BRICKS)
AMBIENT, NEAR, BACKGROUND = (tl.constexpr(x) for x in (renderer.AMBIENT, renderer.NEAR, renderer.BACKGROUND))
OCTAVES, LACUNARITY, GAIN = (tl.constexpr(x) for x in (renderer.OCTAVES, renderer.LACUNARITY, renderer.GAIN))
CAMERA = tl.constexpr(16)  # three rows of the pose, then fx, fy, cx, cy
PIXELS = 512


def render_by_triton(boxes: Tensor, poses: Tensor, intrinsics: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Do what `renderer.render` does, on CUDA or in Triton's interpreter."""
    height, width = size
    batch, frames = poses.shape[:2]
    images = torch.empty(batch, frames, 3, height, width, device=boxes.device)
    depth = torch.empty(batch, frames, height, width, device=boxes.device)
    cameras = torch.cat([poses[..., :3, :].flatten(2), intrinsics[:, None].expand(-1, frames, -1)], -1).contiguous()
    grid = (triton.cdiv(height * width, PIXELS), batch * frames)
    _render[grid](
        boxes.contiguous(), cameras, images, depth, boxes.shape[1], frames, height, width, BLOCK=PIXELS, num_warps=4
    )
    return images, depth


@triton.jit(do_not_specialize=["count", "frames"])
def _render(boxes, cameras, images, depths, count, frames, height, width, BLOCK: tl.constexpr):
    frame = tl.program_id(1)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    camera = cameras + frame * CAMERA
    ex, ey, ez = tl.load(camera + 3), tl.load(camera + 7), tl.load(camera + 11)
    fx, fy, cx, cy = tl.load(camera + 12), tl.load(camera + 13), tl.load(camera + 14), tl.load(camera + 15)
    a = ((pixel % width).to(tl.float32) - cx) / fx
    b = ((pixel // width).to(tl.float32) - cy) / fy
    dx = tl.load(camera) * a + tl.load(camera + 1) * b + tl.load(camera + 2)
    dy = tl.load(camera + 4) * a + tl.load(camera + 5) * b + tl.load(camera + 6)
    dz = tl.load(camera + 8) * a + tl.load(camera + 9) * b + tl.load(camera + 10)

    scene = boxes + (frame // frames).to(tl.int64) * count * COLUMNS
    best = tl.full([BLOCK], BACKGROUND, tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for k in range(count):
        box = scene + k * COLUMNS
        ox, oy, oz, lx, ly, lz = _local(box, ex, ey, ez, dx, dy, dz)
        hx, hy, hz = tl.load(box + HALF), tl.load(box + HALF + 1), tl.load(box + HALF + 2)
        ix, iy, iz = 1 / lx, 1 / ly, 1 / lz
        mx, my, mz = -ox * ix, -oy * iy, -oz * iz
        wx, wy, wz = hx * tl.abs(ix), hy * tl.abs(iy), hz * tl.abs(iz)
        entry = tl.maximum(tl.maximum(mx - wx, my - wy), mz - wz)
        leave = tl.minimum(tl.minimum(mx + wx, my + wy), mz + wz)
        hit = (entry > NEAR) & (entry <= leave) & (entry < best)
        best = tl.where(hit, entry, best)
        index = tl.where(hit, k, index)

    box = scene + index * COLUMNS
    hit = best < BACKGROUND
    first, second, gain = _surface(box, ex, ey, ez, dx, dy, dz, best, best / fx)
    inside = pixel < height * width
    image = images + frame.to(tl.int64) * 3 * height * width + pixel
    for channel in tl.static_range(3):
        one = tl.load(box + COLOURS + channel)
        colour = one + first * (tl.load(box + COLOURS + 3 + channel) - one)
        colour = (colour + second * (tl.load(box + COLOURS + 6 + channel) - colour)) * gain
        tl.store(image + channel * height * width, tl.where(hit, _clamp(colour, 0.0, 1.0), 0.0), inside)
    tl.store(depths + frame.to(tl.int64) * height * width + pixel, tl.where(hit, best, 0.0), inside)


@triton.jit
def _local(box, ex, ey, ez, dx, dy, dz):
    """Return origin and direction of a ray in the axes of a box."""
    cos, sin = tl.load(box + COS), tl.load(box + SIN)
    qx, qy, qz = ex - tl.load(box + CENTRE), ey - tl.load(box + CENTRE + 1), ez - tl.load(box + CENTRE + 2)
    lx, ly = cos * dx + sin * dy, cos * dy - sin * dx
    lx = tl.where(tl.abs(lx) < 1e-7, 1e-7, lx)
    ly = tl.where(tl.abs(ly) < 1e-7, 1e-7, ly)
    lz = tl.where(tl.abs(dz) < 1e-7, 1e-7, dz)
    return cos * qx + sin * qy, cos * qy - sin * qx, qz, lx, ly, lz


@triton.jit
def _surface(box, ex, ey, ez, dx, dy, dz, depth, footprint):
    """Return the shares of the second and third colour, and by what the colour is multiplied."""
    ox, oy, oz, lx, ly, lz = _local(box, ex, ey, ez, dx, dy, dz)
    hx, hy, hz = tl.load(box + HALF), tl.load(box + HALF + 1), tl.load(box + HALF + 2)
    ix, iy, iz = 1 / lx, 1 / ly, 1 / lz
    entry_x, entry_y, entry_z = -ox * ix - hx * tl.abs(ix), -oy * iy - hy * tl.abs(iy), -oz * iz - hz * tl.abs(iz)
    on_x = (entry_x >= entry_y) & (entry_x >= entry_z)
    on_y = (entry_y > entry_x) & (entry_y >= entry_z)
    on_z = (on_x | on_y) == 0
    outward = tl.where(tl.where(on_x, lx, tl.where(on_y, ly, lz)) > 0, -1.0, 1.0)
    x = ox + depth * lx + tl.load(box + ORIGIN)
    y = oy + depth * ly + tl.load(box + ORIGIN + 1)
    z = oz + depth * lz + tl.load(box + ORIGIN + 2)
    u, v = tl.where(on_x, y, x), tl.where(on_z, y, z)
    axis = tl.where(on_x, 0, tl.where(on_y, 1, 2))
    seed = tl.load(box + SEED).to(tl.int32) * 8 + axis * 2 + (outward > 0).to(tl.int32)
    first, second = _blend(u, v, seed, tl.load(box + FREQUENCY), footprint)

    # The normal in the world, and the light that falls on it.
    cos, sin = tl.load(box + COS), tl.load(box + SIN)
    nx, ny, nz = tl.where(on_x, outward, 0.0), tl.where(on_y, outward, 0.0), tl.where(on_z, outward, 0.0)
    gx, gy = cos * nx - sin * ny, sin * nx + cos * ny
    tx = tl.load(box + LAMP) - (ex + depth * dx)
    ty = tl.load(box + LAMP + 1) - (ey + depth * dy)
    tz = tl.load(box + LAMP + 2) - (ez + depth * dz)
    squared = tx * tx + ty * ty + tz * tz
    facing = tl.maximum((gx * tx + gy * ty + nz * tz) / tl.sqrt(squared + 1e-4), 0.0)
    light = AMBIENT + tl.load(box + LAMP_POWER) * facing / (1 + squared / 9)
    light += gx * tl.load(box + SUN) + gy * tl.load(box + SUN + 1) + nz * tl.load(box + SUN + 2)
    return first, second, (1 + _pattern(box, u, v, footprint)) * light


@triton.jit
def _blend(u, v, seed, frequency, footprint):
    total = tl.zeros_like(u)
    weight = tl.zeros_like(u)
    f = frequency
    amplitude = 1.0
    for octave in tl.static_range(OCTAVES):
        fade = _clamp(1.6 - 2 * f * footprint, 0.0, 1.0) * amplitude
        total += fade * (_noise(u * f, v * f, seed + 1000 * octave) - 0.5)
        weight += fade * fade
        f = f * LACUNARITY
        amplitude = amplitude * GAIN
    first = _clamp(0.5 + 1.9 * total / (tl.sqrt(weight) + 1e-4) * (weight / (weight + 0.1)), 0.0, 1.0)
    coarse = _noise(u * frequency * 0.8 + 3.7, v * frequency * 0.8 + 9.1, seed + 77777)
    return first, _clamp((coarse - 0.5) * 3.5, 0.0, 1.0)


@triton.jit
def _pattern(box, u, v, footprint):
    kind, period = tl.load(box + PATTERN), tl.load(box + PERIOD)
    pu, pv = u * period, v * period
    brick = pu * 0.5 + 0.5 * _parity(pv)
    joint = ((pv - tl.floor(pv) < 0.14) | (brick - tl.floor(brick) < 0.07)).to(tl.float32)
    value = tl.where(kind == BRICKS, 1 - joint, 0.5)
    value = tl.where(kind == CHECKER, _parity(tl.floor(pu) + tl.floor(pv)), value)
    value = tl.where(kind == STRIPES, _parity(pu), value)
    return (value - 0.5) * tl.load(box + STRENGTH) * _clamp(1.5 - 2 * period * footprint, 0.0, 1.0)


@triton.jit
def _parity(x):
    half = tl.floor(x) * 0.5
    return (half - tl.floor(half)) * 2


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _noise(u, v, seed):
    iu, iv = tl.floor(u), tl.floor(v)
    fu, fv = u - iu, v - iv
    fu = fu * fu * (3 - 2 * fu)
    fv = fv * fv * (3 - 2 * fv)
    iu = iu.to(tl.int32)
    iv = iv.to(tl.int32)
    a, b = _hash(iu, iv, seed), _hash(iu + 1, iv, seed)
    c, d = _hash(iu, iv + 1, seed), _hash(iu + 1, iv + 1, seed)
    low = a + fu * (b - a)
    high = c + fu * (d - c)
    return low + fv * (high - low)


@triton.jit
def _hash(ix, iy, seed):
    h = ix.to(tl.uint32) * 374761393 + iy.to(tl.uint32) * 668265263 + seed.to(tl.uint32) * 974634777
    h = (h ^ (h >> 15)) * 739995813
    h = (h ^ (h >> 12)) * 668265263
    h = h ^ (h >> 15)
    return (h & 0xFFFFFF).to(tl.int32).to(tl.float32) * (1 / 16777216)
