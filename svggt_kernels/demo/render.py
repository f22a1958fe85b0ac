"""A renderer of axis-aligned boxes: a pixel's depth is the exact nearest intersection of its ray with a box.

Patterns are computed from the hit point; there are no texture files. Camera axes follow OpenCV: x right, y down, z
forward. Pixel centres are at integer coordinates: the top left pixel is (0, 0).
"""

from __future__ import annotations

import numpy as np

from .flat import CEILING, Flat

PATTERNS = ("plain", "stripes", "checker", "bricks", "planks", "marble", "plaster")
LIGHT = (0.78, 0.92, 0.72, 0.86, 0.95, 1.0)  # brightness of faces that look to -x, +x, -y, +y, -z, +z


class Renderer:
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
        pixels = pixel_grid(np.arange(height), np.arange(width))
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


def pixel_grid(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the homogeneous pixel coordinates (u, v, 1) of a grid, `[3, rows * columns]`, row by row."""
    v, u = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([u, v, np.ones_like(u)]).reshape(3, -1).astype(np.float64)


def _blend(start: np.ndarray | float, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    return start + (end - start) * share
